"""`mimo-qat push` against a stand-in for the hub on 127.0.0.1: what is sent, what is not, and what an error says."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml

from mimo_qat.card import MARK, CardConfig, cell, eval_entries, limits, model_card, parts_table, read_results
from mimo_qat.checkpoint.layout import parameters, target_tensors
from mimo_qat.checkpoint.reader import TensorFolder
from mimo_qat.cli import VERBS
from mimo_qat.commands import run
from mimo_qat.release import PushConfig, main, redact, release_files

ROOT = Path(__file__).parents[2]
TOKEN = "hf_" + "Secret0123456789" * 3
REPO = "org/tiny"


class Hub(BaseHTTPRequestHandler):
    """Just enough of the hub's HTTP interface; state lives on the server object."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, document, status=200, **headers):
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def handle_any(self):
        hub, url = self.server.hub, urlsplit(self.path)
        path, length = unquote(url.path), self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        hub.requests.append((self.command, path))
        if not path.startswith("/lfs/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            said = f"Invalid credentials{hub.echo and ' ' + str(self.headers.get('Authorization'))}"
            return self.reply({"error": said}, 401, X_Error_Message=said)
        for failure in list(hub.failures):
            if failure.search(f"{self.command} {path}"):
                how = hub.failures[failure].pop(0)
                if not hub.failures[failure]:
                    del hub.failures[failure]
                if how == "drop":
                    self.close_connection = True
                    return self.connection.close()
                return self.reply({"error": "try later"}, how)
        return hub.answer(self, path, parse_qs(url.query), body)

    do_GET = do_POST = do_PUT = handle_any


class Store:
    """The repository behind the stand-in: revision -> {path: bytes}, LFS objects, and every request received."""

    def __init__(self):
        self.revisions, self.objects, self.requests, self.failures = {}, {}, [], {}
        self.sent: list[str] = []
        self.private, self.commits = None, 0
        self.address = self.echo = ""

    def fail(self, pattern, *how):
        self.failures[re.compile(pattern)] = list(how)

    def answer(self, http, path, query, body):
        api = f"/api/models/{REPO}"
        if path == "/api/repos/create":
            status = 409 if self.revisions else 200
            if not self.revisions:
                self.revisions["main"], self.private = {}, json.loads(body)
            return http.reply({"url": f"{self.address}/{REPO}"}, status)
        if path == "/api/validate-yaml":  # of the card's front matter
            self.front_matter = json.loads(body)["content"]
            return http.reply({"errors": [], "warnings": []})
        if path.startswith(f"{api}/branch/"):
            self.revisions.setdefault(path.split("/branch/")[1], dict(self.revisions["main"]))
            return http.reply({})
        if path.startswith(f"{api}/preupload/"):
            held = self.revisions[path.split("/preupload/")[1]]
            return http.reply({"files": [self.mode(f, held) for f in json.loads(body)["files"]]})
        if path == f"/{REPO}.git/info/lfs/objects/batch":
            return http.reply({"transfer": "basic", "objects": [self.action(o) for o in json.loads(body)["objects"]]})
        if path.startswith("/lfs/"):
            assert hashlib.sha256(body).hexdigest() == path[5:]
            self.objects[path[5:]] = body
            self.sent.append(path[5:])
            return http.reply({})
        if path.startswith(f"{api}/commit/"):
            return self.commit(http, path.split("/commit/")[1], query, body)
        if path.startswith(f"{api}/revision/"):
            return http.reply({"id": REPO, "sha": f"{self.commits:040d}", "siblings": []})
        if path.startswith(f"{api}/tree/"):
            held = self.revisions[path.split("/tree/")[1]]
            return http.reply([{"type": "file", "path": p, "size": len(d), "oid": "0" * 40} for p, d in held.items()])
        return http.reply({"error": f"no such address {path}"}, 404)

    def mode(self, file, held):
        large = file["path"].endswith((".safetensors", ".pt"))
        known = held.get(file["path"])
        blob = None if known is None else b"blob %d\0" % len(known) + known
        oid = None if known is None else (hashlib.sha256(known) if large else hashlib.sha1(blob)).hexdigest()
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def action(self, wanted):
        if wanted["oid"] in self.objects:
            return wanted
        return wanted | {"actions": {"upload": {"href": f"{self.address}/lfs/{wanted['oid']}"}}}

    def commit(self, http, revision, query, body):
        opened = "create_pr" in query
        if opened:
            self.revisions["refs/pr/1"] = dict(self.revisions[revision])
            revision = "refs/pr/1"
        lines = [json.loads(line) for line in body.splitlines()]
        for line in lines[1:]:
            value = line["value"]
            raw = line["key"] == "file"
            data = base64.b64decode(value["content"]) if raw else self.objects[value["oid"]]
            self.revisions[revision][value["path"]] = data
        self.commits += 1
        pull = f"{self.address}/{REPO}/discussions/1" if opened else None
        address = f"{self.address}/{REPO}/commit/{self.commits:040d}"
        http.reply({"commitUrl": address, "commitOid": f"{self.commits:040d}", "pullRequestUrl": pull})


@pytest.fixture
def hub(monkeypatch):
    """A running stand-in, and a client that uploads by LFS (basic transfer) with TOKEN."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    server.hub = store = Store()
    store.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield store
    server.shutdown()
    server.server_close()


@pytest.fixture
def results(tmp_path):
    """A result file of two records, one of them on a benchmark of the hub."""
    common = {"command": f"mimo-runtime quality r --note {TOKEN}", "commit": "0123abcd"}
    records = [
        {"name": "kl", "value": 0.0123456, "unit": "nats/token", "conditions": {"text": "stdlib a|b", "gpus": []}},
        {"name": "pass", "value": 41, "unit": "%", "conditions": {"dataset": "G", "dataset_id": "o/g", "task_id": "g"}},
    ]
    path = tmp_path / "results.json"
    path.write_text(json.dumps([r | common for r in records]))
    return path


@pytest.fixture
def push(release, hub, results):
    """push(**changes) pushes the tiny release to the stand-in; returns the document."""

    def go(**changes):
        values = {"folder": str(release.path), "repo": REPO, "license": "mit", "results": [str(results)]}
        return main(PushConfig(**values | {"endpoint": hub.address, "base_model": "org/base", "samples": 0} | changes))

    return go


def on_disk(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_every_byte_arrives_and_local_leftovers_stay(push, hub, release):
    wanted = set(on_disk(release.path)) | {"README.md", ".eval_results/mimo-qat.yaml"}
    for name in ("checkpoints/step/x.safetensors", "runs/log.txt", "dflash/.x.tmp", "__pycache__/a.pyc", "train.log"):
        (release.path / name).parent.mkdir(parents=True, exist_ok=True)
        (release.path / name).write_bytes(b"leftover")
    document = push(private=True)
    held = hub.revisions["main"]
    assert set(held) == wanted
    assert held == {n: d for n, d in on_disk(release.path).items() if n in wanted}
    assert document["files"] == len(wanted) and document["bytes"] == sum(map(len, held.values()))
    assert document["ok"] and document["commit_url"].endswith(f"/commit/{1:040d}") and document["revision"] == "main"
    assert hub.private.get("private", hub.private.get("visibility")) in (True, "private")
    assert hub.front_matter == held["README.md"].decode()  # the hub was asked whether it likes the card's metadata
    assert TOKEN not in json.dumps(document) and not any(TOKEN.encode() in d for d in held.values())


def test_pushing_again_sends_nothing_and_a_changed_file_alone_is_sent(push, hub, release):
    push()
    first = list(hub.sent)
    assert len(first) == 4  # two files of the target, the drafter, its mask embedding
    assert push()["commit"] == f"{1:040d}" and hub.sent == first and hub.commits == 1
    (release.path / "tokenizer_config.json").write_text('{"model_max_length": 8}')
    push()
    assert hub.sent == first and hub.revisions["main"]["tokenizer_config.json"] == b'{"model_max_length": 8}'


def test_an_interrupted_upload_resumes_without_sending_finished_files_again(push, hub, release):
    drafter = hashlib.sha256((release.path / "dflash/dflash_draft_model.safetensors").read_bytes()).hexdigest()
    hub.fail(f"PUT /lfs/{drafter}", 403)
    with pytest.raises(ValueError, match=r"run the same command again|may write") as error:
        push()
    assert "\n" not in str(error.value) and hub.commits == 0 and hub.revisions["main"] == {}
    assert drafter not in hub.sent and len(hub.sent) >= 1
    document = push()
    assert document["ok"] and len(hub.sent) == len(set(hub.sent)) == 4  # each object once over both runs
    assert hub.revisions["main"]["dflash/dflash_draft_model.safetensors"]


def test_one_failed_answer_is_retried_inside_the_run(push, hub):
    hub.fail("PUT /lfs/", 500)
    assert push()["ok"] and hub.commits == 1
    assert len(hub.sent) == len(set(hub.sent)) == 4


def test_a_dropped_connection_costs_one_more_run_at_most(push, hub):
    hub.fail("PUT /lfs/", "drop")
    try:
        document = push()  # newer clients try again by themselves
    except ValueError as error:
        assert "run the same command again" in str(error) and "\n" not in str(error)
        document = push()
    assert document["ok"] and hub.commits == 1 and len(hub.sent) == len(set(hub.sent)) == 4


def test_a_refused_commit_is_one_line_and_resumes(push, hub):
    hub.fail("POST .*/commit/", 400)
    with pytest.raises(
        ValueError, match=r"pushing to org/tiny: the hub answered 400 \(.*try later.*run the same command"
    ):
        push()
    sent = list(hub.sent)
    assert push()["ok"] and hub.sent == sent


def test_a_file_that_did_not_arrive_whole_is_named(push, hub, monkeypatch):
    whole = Store.commit

    def short(self, http, revision, query, body):
        whole(self, http, revision, query, body)
        self.revisions[revision]["config.json"] = b"{"

    monkeypatch.setattr(Store, "commit", short)
    with pytest.raises(ValueError, match=r"1 files did not arrive whole, the first config\.json"):
        push()


def test_a_bad_token_is_one_clear_line_without_the_token(push, hub, monkeypatch, capsys, caplog):
    bad = "hf_" + "WrongToken4567" * 3
    monkeypatch.setenv("HF_TOKEN", bad)
    with caplog.at_level("DEBUG"), pytest.raises(ValueError, match=r"401.*hf auth login") as error:
        push()
    assert error.value.__cause__ is None and error.value.__suppress_context__
    printed = capsys.readouterr()
    for text in (str(error.value), printed.out, printed.err, caplog.text):
        assert "WrongToken" not in text
    hub.echo = True  # a server that repeats the credentials in its error
    with pytest.raises(ValueError, match="401") as error:
        push()
    assert "WrongToken" not in str(error.value) and "hf_***" in str(error.value) and "\n" not in str(error.value)


def test_no_connection_is_one_line(push, hub, release):
    with pytest.raises(ValueError, match=r"creating org/tiny: .*run the same command again") as error:
        push(endpoint="http://127.0.0.1:9")
    assert "\n" not in str(error.value)


def test_a_storage_service_that_refuses_is_one_line(push, hub, monkeypatch):
    """With the client's chunked uploader on, and a hub that gives no token for it."""
    pytest.importorskip("hf_xet")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(ValueError, match="pushing to org/tiny: ") as error:
        push()
    assert "\n" not in str(error.value) and "Secret" not in str(error.value)
    assert any("xet-write-token" in path for _, path in hub.requests)


def test_branches_and_pull_requests(push, hub):
    assert push(revision="fp4")["revision"] == "fp4"
    assert hub.revisions["main"] == {} and "config.json" in hub.revisions["fp4"]
    document = push(create_pr=True)
    assert document["pr_url"].endswith("/discussions/1") and "config.json" in hub.revisions["refs/pr/1"]
    assert hub.revisions["main"] == {}


def test_dry_run_sends_nothing_and_writes_nothing(push, hub, release, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    before = on_disk(release.path)
    document = push(dry_run=True)
    assert hub.requests == [] and on_disk(release.path) == before
    printed = capsys.readouterr().out
    lines = re.findall(r"^ +([\d,]+)  (\S+)$", printed, re.MULTILINE)
    listed = {name: int(size.replace(",", "")) for size, name in lines}
    assert listed.keys() == before.keys() | {"README.md", ".eval_results/mimo-qat.yaml"}
    assert {n: listed[n] for n in before} == {n: len(d) for n, d in before.items()}
    assert document["bytes"] == sum(listed.values()) and document["dry_run"] is True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert push()["bytes"] == document["bytes"]  # it told the truth


def test_a_folder_that_fails_check_is_refused_unless_forced(push, hub, release, rewrite):
    rewrite(release.path, {"model.norm.weight": None})
    with pytest.raises(ValueError, match=r"fails `mimo-qat check` \(.*missing.*--force"):
        push()
    assert hub.requests == []
    assert push(force=True)["check_errors"] > 0 and "config.json" in hub.revisions["main"]


def test_a_token_inside_a_file_is_refused(push, hub, release):
    (release.path / "dflash/notes.txt").write_text(f"export HF_TOKEN={TOKEN}")
    with pytest.raises(ValueError, match=r"dflash/notes\.txt holds what looks like a hub token") as error:
        push(force=True)
    assert "Secret" not in str(error.value) and hub.requests == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repo": "tiny"}, "is not ORG/NAME"),
        ({"repo": "org/tiny/x"}, "is not ORG/NAME"),
        ({"folder": "/nowhere"}, "no config.json"),
        ({"create_pr": True, "revision": "x"}, "leave --revision out"),
        ({"license": None}, "--license"),
        ({"license": "other"}, "--license_link"),
        ({"results": ["/nowhere.json"]}, "does not exist"),
    ],
)
def test_wrong_options_are_refused_before_a_request(push, hub, changes, message):
    with pytest.raises(ValueError, match=message):
        push(**changes)
    assert hub.requests == []


def test_the_command_line(release, hub, results, capsys):
    rest = ["--repo", REPO, "--license", "mit", "--endpoint", hub.address]
    code = run("mimo-qat", "", VERBS, ["push", str(release.path), *rest, "--results", json.dumps([str(results)])])
    assert code == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["ok"] and document["repo"] == REPO
    assert run("mimo-qat", "", VERBS, ["push", str(release.path / "dflash/gone"), *rest]) == 1
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.slow
def test_the_script_goes_from_folders_to_the_hub_and_can_be_run_again(hub, bf16_folder, drafter_folder, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"t{i}"}) + "\n" for i in range(40)))
    environment = os.environ | {
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "LICENSE": "mit",
        "PYTHON": sys.executable,
        "PUSH_ARGS": f"--endpoint {hub.address}",
        "QUALITY_ARGS": f"--text {text} --windows 2 --length 16",
    }

    def script(**changes):
        command = [
            "bash",
            str(ROOT / "scripts/release.sh"),
            bf16_folder.path.name,
            drafter_folder.path.name,
            "out",
            REPO,
        ]
        return subprocess.run(command, cwd=tmp_path, env=environment | changes, capture_output=True, text=True)

    first = script()
    assert first.returncode == 0, first.stderr
    assert hub.requests == [] and '"dry_run": true' in first.stdout.splitlines()[-1]
    second = script(PUSH="1")
    assert second.returncode == 0, second.stderr
    assert [line for line in second.stdout.splitlines() if line.endswith("done before")] == [
        "== convert: done before",
        "== check: done before",
        "== quality: done before",
    ]
    card = hub.revisions["main"]["README.md"].decode()
    assert "| kl_mean |" in card and "python -m mimo_runtime quality" in card and "top1_agreement" in card
    (tmp_path / "out/config.json").write_text("{}")
    (tmp_path / "out/conversion.json").unlink()
    assert script().returncode != 0  # not what this script made any more: left alone
    assert (tmp_path / "out/config.json").read_text() == "{}"


def test_a_card_written_by_hand_is_kept(push, hub, release, capsys):
    (release.path / "README.md").write_text("# mine\n")
    push()
    assert hub.revisions["main"]["README.md"] == b"# mine\n" and "is kept" in capsys.readouterr().out
    push(overwrite_card=True)
    assert MARK in hub.revisions["main"]["README.md"].decode()
    push(base_model="org/other")  # its own card is made anew each time
    assert "org/other" in hub.revisions["main"]["README.md"].decode()


def test_the_card_tells_what_is_stored_and_what_was_measured(release, results):
    records = read_results([str(results)])
    text = model_card(release.path, REPO, CardConfig(license="mit", base_model="org/base", language=["en"]), records)
    _, front, body = text.split("---\n", 2)
    data = yaml.safe_load(front)
    assert data["license"] == "mit" and data["base_model"] == "org/base" and data["language"] == ["en"]
    assert data["base_model_relation"] == "quantized" and data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation" and {"mxfp4", "dflash", "moe"} <= set(data["tags"])
    (entry, other) = data["model-index"][0]["results"]
    assert entry["metrics"] == [{"type": "kl", "value": 0.0123456, "name": "kl (nats/token)"}]
    assert entry["dataset"] == {"name": "stdlib a|b", "type": "stdlib-a-b"} and other["dataset"]["type"] == "o/g"
    assert "| kl | 0.01235 nats/token | text stdlib a\\|b; gpus [] |" in body
    assert "| pass | 41 % | dataset G; dataset_id o/g; task_id g |" in body and "(commit 0123abcd)" in body
    experts = next(line for line in body.splitlines() if line.startswith("| routed experts"))
    assert experts == "| routed experts | MXFP4: E2M1 codes, one E8M0 scale for 32 values | 144 | 442,368 | 235,008 |"
    for word in ("AutoModelForCausalLM", "vllm serve org/tiny", "sglang.launch_server", "mimo-runtime generate tiny"):
        assert word in body
    assert '"num_speculative_tokens": 7' in body and "{%" not in text and "{{" not in text
    assert "\n\n\n" not in body and all(len(line) == len(line.rstrip()) for line in body.splitlines())


def test_the_card_of_a_release_without_drafter_results_and_base(release):
    shutil.rmtree(release.path / "dflash")
    (release.path / "conversion.json").unlink()
    text = model_card(release.path, REPO, CardConfig(license="other", license_link="https://x/L"), [])
    front = yaml.safe_load(text.split("---\n")[1])
    assert "base_model" not in front and "model-index" not in front and front["license_link"] == "https://x/L"
    assert "dflash" not in text and "Nothing was measured" in text and "conversion.json" not in text


def test_parts_count_every_tensor_once(release):
    specs = TensorFolder(release.path).specs
    rows = parts_table(specs)
    assert sum(r["tensors"] for r in rows) == len(specs)
    assert sum(r["bytes"] for r in rows) == sum(s.nbytes for s in specs.values())
    assert sum(r["parameters"] for r in rows) == parameters(specs)
    assert {r["part"]: r["tensors"] for r in rows}["multi-token-prediction blocks"] == 16


def test_limits_name_what_engines_would_get_wrong(config):
    def said(experts="mxfp4", spine="fp8", **changes):
        values = config | changes
        return " ".join(limits(values, target_tensors(values, experts=experts, spine=spine), None))

    assert "mixes the heads up" in said(spine="bf16") and "mixes the heads up" not in said()
    assert "mixes the heads up" not in said(spine="bf16", num_key_value_heads=1, swa_num_key_value_heads=1)
    assert "needs one that divides 2" in said() and "intermediate_size 160" in said()
    assert "intermediate_size" not in said(intermediate_size=256)
    assert "leaves out" in said(add_full_attention_sink_bias=True)
    assert "do not tie" in said(tie_word_embeddings=True) and "compute with 1." in said(routed_scaling_factor=2.5)
    assert "do not tie" not in said() and "compute with 1." not in said(routed_scaling_factor=1.0)
    assert "9 in SGLang, and here as in vLLM" in said()
    assert "here as in SGLang" in said(swa_window_convention="sglang")


def test_results_must_be_complete(tmp_path):
    path = tmp_path / "r.json"
    good = {"name": "n", "value": 1, "unit": "u", "conditions": {}, "command": "c", "commit": "k"}
    path.write_text(json.dumps({"records": [good]}))
    assert read_results([str(path)]) == [good]
    for change, message in (
        ({"conditions": 3}, "not a mapping"),
        ({"value": [1]}, "a finite number"),
        ({"value": None}, "a finite number"),
    ):
        path.write_text(json.dumps([good | change]))
        with pytest.raises(ValueError, match=message):
            read_results([str(path)])
    path.write_text(json.dumps([{k: v for k, v in good.items() if k != "commit"}]))
    with pytest.raises(ValueError, match="record 0 has no commit"):
        read_results([str(path)])
    path.write_text("3")
    with pytest.raises(ValueError, match="not a list of records"):
        read_results([str(path)])


def test_results_on_hub_benchmarks_get_their_own_file(results):
    entries = yaml.safe_load(eval_entries(read_results([str(results)])))
    assert [(e["dataset"]["id"], e["dataset"]["task_id"], e["value"]) for e in entries] == [("o/g", "g", 41)]
    assert eval_entries(read_results([str(results)])[:1]) is None


def test_shared_conditions_are_said_once(release):
    def record(name, **conditions):
        return {"name": name, "value": 1, "unit": "", "conditions": conditions, "command": "c", "commit": "k"}

    records = [record("a", gpu="H200", row="release", text="t"), record("b", gpu="H200", row="noise", text="t")]
    text = model_card(release.path, REPO, CardConfig(license="mit"), records)
    assert "| a | 1 | row release |\n| b | 1 | row noise |\n\nFor all of them: gpu H200; text t.\n" in text
    front = yaml.safe_load(text.split("---\n")[1])
    assert [r["metrics"][0]["type"] for r in front["model-index"][0]["results"]] == ["a"]
    text = model_card(release.path, REPO, CardConfig(license="mit"), records[:1])
    assert "| a | 1 | gpu H200; row release; text t |" in text and "For all" not in text


def test_cells_cannot_break_out_of_their_table():
    assert cell("a|b\nc") == "a\\|b c" and cell(1234567) == "1,234,567" and cell(0.1234567) == "0.1235"
    assert cell({"k": [1, 2]}) == '{"k": [1, 2]}' and cell(True) == "true" and cell("<b>") == "&lt;b>"


def test_tokens_are_cut_out():
    assert redact(f"a {TOKEN} b") == "a hf_*** b"
    assert redact("plain-secret in text", "plain-secret") == "hf_*** in text"
    assert redact("hf_xet and model_hf_config stay") == "hf_xet and model_hf_config stay"


def test_stray_files_are_sorted_and_filtered(tmp_path):
    for name in ("b.json", "a/c.safetensors", "checkpoints/1/x", "a/.y.tmp", "z.partial/x", ".git/config"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"12")
    assert list(release_files(tmp_path).items()) == [("a/c.safetensors", 2), ("b.json", 2)]
