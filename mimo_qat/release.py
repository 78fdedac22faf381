"""mimo-qat push release/ --repo ORG/NAME --base_model XiaomiMiMo/MiMo-V2.5 --license mit --dry_run true

Publishes a release folder on the Hugging Face hub: proves it first (`mimo-qat check`), writes its model card from the
measured JSON, uploads, and compares what the hub then holds with what was sent. Run it again after an interruption:
files that arrived are not sent again. The token comes from HF_TOKEN or `hf auth login`; it is no option here, so that
it stands in no shell history, and every message is cleared of it.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimo_qat.card import MARK, CardConfig, eval_entries, model_card, read_results
from mimo_qat.provenance import atomic_write

# What a run may leave in a release folder and nobody wants to download. fnmatch: `*` crosses folders.
LOCAL_ONLY = ["checkpoints/*", "runs/*", "*.tmp", "*.partial", "*.partial/*", "*.old/*", "*.log", "*.lock"]
LOCAL_ONLY += ["__pycache__/*", "*/__pycache__/*", ".cache/*", ".git/*", "*/.git/*", ".DS_Store", "*/.DS_Store"]
EVAL_FILE = ".eval_results/mimo-qat.yaml"
MAX_SCANNED = 2**20
_TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{8,}")
_REAL_TOKEN = re.compile(rb"\b(?:hf|api_org)_[A-Za-z0-9]{30,}")


@dataclass(kw_only=True)
class PushConfig(CardConfig):
    """Publish a release folder on the hub, with a model card made from measured results."""

    folder: str
    """release folder, as `mimo-qat convert` writes it"""
    repo: str
    """ORG/NAME on the hub; made where it does not exist"""
    dry_run: bool = False
    """list files and bytes; no request is sent, no token is needed, nothing is written"""
    print_card: bool = False
    """print the model card"""
    private: bool = False
    """make a new repository private; an existing one stays as it is"""
    revision: str | None = None
    """branch to push to; made from main where it does not exist"""
    create_pr: bool = False
    """open a pull request instead of committing to main"""
    force: bool = False
    """push although `mimo-qat check` found errors"""
    overwrite_card: bool = False
    """replace a README.md that was not made by this command"""
    samples: int = 16
    """weights of each format whose values `mimo-qat check` reads; -1 reads all and compares checksums"""
    message: str = "Upload release"
    """commit message"""
    endpoint: str | None = None
    """address of another hub; without it HF_ENDPOINT, else huggingface.co"""


def redact(text: str, token: str | None = None) -> str:
    """`text` without anything that looks like a hub token, and without `token`."""
    if token:
        text = text.replace(token, "hf_***")
    return _TOKEN.sub("hf_***", text)


@contextmanager
def hub_errors(what: str, token: str | None) -> Iterator[None]:
    """Turns every failure of the hub client into one ValueError line that says what to do and holds no token."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        remedy = {
            401: "log in with `hf auth login`, or set HF_TOKEN to a token that may write",
            403: "use a token that may write to this repository",
            404: "check the name, and that the token may see the repository",
        }.get(status, "run the same command again: files that arrived are not sent again")
        said = error.server_message or str(error).split("\n", 1)[0]
        message = f"{what}: the hub answered {status} ({said}); {remedy}"
    except Exception as error:  # sockets, certificates, the Rust uploader: each has exceptions of its own
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = str(cause).split("\n", 1)[0] or type(cause).__name__
        message = f"{what}: {reason}; run the same command again: files that arrived are not sent again"
    else:
        return
    raise ValueError(redact(" ".join(message.split()), token)) from None


def release_files(folder: Path) -> dict[str, int]:
    """{path in the repository: bytes} of what a push sends, in order; ValueError for a file that holds a hub token."""
    from huggingface_hub.utils import filter_repo_objects

    found = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    sizes = {name: (folder / name).stat().st_size for name in filter_repo_objects(found, ignore_patterns=LOCAL_ONLY)}
    for name, size in sizes.items():
        if size <= MAX_SCANNED and _REAL_TOKEN.search((folder / name).read_bytes()):
            raise ValueError(f"{name} holds what looks like a hub token; remove it there, and revoke that token")
    return sizes


def checked(folder: Path, cfg: PushConfig) -> dict[str, Any]:
    """The document of `mimo-qat check`; ValueError where it found errors and `force` is not given."""
    from mimo_qat.checkpoint.check import CheckConfig
    from mimo_qat.checkpoint.check import main as check

    report = check(CheckConfig(folder=str(folder), samples=cfg.samples))
    if not report["ok"] and not cfg.force:
        kinds = sorted({f["name"] for f in report["findings"] if f["severity"] == "error"})
        raise ValueError(
            f"{folder} fails `mimo-qat check` ({', '.join(kinds)}); repair what is listed above, "
            "or give --force true to push it as it is"
        )
    return report


def written_files(folder: Path, cfg: PushConfig) -> dict[str, str]:
    """{name: text} that this push adds to the folder: the card, and results on the hub's benchmarks."""
    records = read_results(cfg.results or [])
    texts = {}
    readme = folder / "README.md"
    kept = readme.is_file() and MARK not in readme.read_text(encoding="utf-8") and not cfg.overwrite_card
    if kept:
        print("README.md was written by hand and is kept; --overwrite_card true replaces it")
    else:
        texts["README.md"] = redact(model_card(folder, cfg.repo, cfg, records))
    entries = eval_entries(records)
    if entries:
        texts[EVAL_FILE] = redact(entries)
    return texts


def validate(cfg: PushConfig) -> Path:
    """The folder; ValueError for options that cannot work, before anything is read."""
    folder = Path(cfg.folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; give a release folder, as `mimo-qat convert` writes it")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", cfg.repo):
        raise ValueError(f"--repo {cfg.repo!r} is not ORG/NAME; name the organisation or user and the repository")
    if cfg.create_pr and cfg.revision:
        raise ValueError("--create_pr opens a pull request against main; leave --revision out, or push to the branch")
    return folder


def upload(folder: Path, cfg: PushConfig, sizes: dict[str, int]) -> dict[str, Any]:
    """Creates the repository, sends the files, and compares sizes on the hub with those here."""
    from huggingface_hub import HfApi, get_token

    token = get_token()
    api = HfApi(endpoint=cfg.endpoint, library_name="mimo-qat")
    with hub_errors(f"creating {cfg.repo}", token):
        api.create_repo(cfg.repo, private=cfg.private or None, exist_ok=True)
        if cfg.revision and not cfg.revision.startswith("refs/"):
            api.create_branch(cfg.repo, branch=cfg.revision, exist_ok=True)
    with hub_errors(f"pushing to {cfg.repo}", token):
        commit = api.upload_folder(
            repo_id=cfg.repo,
            folder_path=folder,
            revision=cfg.revision,
            create_pr=cfg.create_pr or None,
            commit_message=cfg.message,
            ignore_patterns=list(LOCAL_ONLY),
        )
    where = commit.pr_revision or cfg.revision
    with hub_errors(f"listing {cfg.repo}", token):
        tree = api.list_repo_tree(cfg.repo, recursive=True, revision=where)
        held = {entry.path: entry.size for entry in tree if hasattr(entry, "size")}
    wrong = sorted(name for name, size in sizes.items() if held.get(name) != size)
    if wrong:
        raise ValueError(
            f"{cfg.repo}: {len(wrong)} files did not arrive whole, the first {wrong[0]}; run the same command again"
        )
    return {"commit_url": commit.commit_url, "commit": commit.oid, "pr_url": commit.pr_url}


def main(cfg: PushConfig) -> dict[str, Any]:
    """Checks the folder, writes its card, and pushes it; ValueError in one line where something stands in the way."""
    folder = validate(cfg)
    report = checked(folder, cfg)
    texts = written_files(folder, cfg)
    if cfg.print_card:
        print(texts.get("README.md") or (folder / "README.md").read_text(encoding="utf-8"))
    if not cfg.dry_run:
        for name, text in texts.items():
            with atomic_write(folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
    sizes = release_files(folder) | {name: len(text.encode()) for name, text in texts.items()}
    for name in sorted(sizes):
        print(f"{sizes[name]:>17,}  {name}")
    print(f"{sum(sizes.values()):>17,}  bytes in {len(sizes)} files for {cfg.repo}")
    document = {
        "ok": True,
        "repo": cfg.repo,
        "revision": cfg.revision or "main",
        "files": len(sizes),
        "bytes": sum(sizes.values()),
        "check_errors": report["errors"],
        "dry_run": cfg.dry_run,
    }
    return document if cfg.dry_run else document | upload(folder, cfg, sizes)
