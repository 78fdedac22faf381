"""mimo-runtime generate runs/demo/release --prompt "Write a haiku about locks."

`mimo-runtime VERB`: decode with an FP4-DFlash release, measure its speed, judge its quality.
"""

import importlib.metadata
import os
import sys
from collections.abc import Sequence
from typing import Any

from mimo_runtime.config import BenchConfig, GenerateConfig, QualityConfig
from mimo_runtime.serve_config import ServeConfig

USAGE = """usage: mimo-runtime VERB FOLDER [--config FILE.yaml] [--FIELD VALUE ...]

verbs:
  generate   decode after one prompt, with the release's drafter
  bench      speed with and without the drafter, acceptance of its drafts; --synthetic flash instead of FOLDER measures
             a published geometry without its weights
  quality    a release against its unquantised reference
  serve      an OpenAI-compatible server

torchrun --nproc_per_node N -m mimo_runtime VERB FOLDER ... shares the model among N GPUs (all verbs but quality).
mimo-runtime VERB --help lists the fields of a verb; --print_config prints them as YAML."""


def generate(cfg: GenerateConfig) -> None:
    """Generates after one prompt and prints the text as it is committed; speed goes to standard error."""
    from mimo_runtime.detokenize import Decoder, Detokenizer
    from mimo_runtime.engine import Engine
    from mimo_runtime.parallel import world
    from mimo_runtime.prompts import encode, load_tokenizer

    if cfg.prompt is None and world()[1] > 1:
        raise ValueError("several processes cannot share standard input; give --prompt")
    tokenizer = load_tokenizer(cfg.folder)
    ids = encode(tokenizer, sys.stdin.read() if cfg.prompt is None else cfg.prompt, cfg.chat)
    engine, text = Engine(cfg.folder, cfg), Detokenizer(Decoder(tokenizer))
    out = engine.generate(ids, cfg, on_tokens=lambda tokens: print(text.push(tokens), end="", flush=True))
    print(text.flush())
    if engine.ranks.rank:
        return
    full = [r.accepted + 1 for r in out.rounds if not r.cut]
    rate = f", {sum(full) / len(full):.2f} tokens a round" if full and engine.drafter else ""
    print(
        f"{len(ids)} prompt tokens in {out.prefill_seconds:.2f} s; {len(out.tokens)} tokens at "
        f"{out.tokens_per_second:.1f} tokens/s{rate} ({out.finish})",
        file=sys.stderr,
    )


def bench(cfg: BenchConfig) -> dict[str, Any]:
    """Decoding speed with and without the drafter, and how much of its drafts is accepted."""
    from mimo_runtime.bench import main

    return main(cfg)


def quality(cfg: QualityConfig) -> dict[str, Any]:
    """A release against its unquantised reference, beside plain quantisation and numerical noise."""
    from mimo_runtime.quality import main

    return main(cfg)


def serve(cfg: ServeConfig) -> None:
    """An OpenAI-compatible server over one engine, until SIGTERM or SIGINT. Of several processes the first one serves,
    and the others do their part of each request."""
    try:
        from mimo_runtime.server import main
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise ValueError(f"serve needs {error.name}; run: pip install 'mimo-qat[serve]'") from None
    main(cfg)


VERBS: dict[str, tuple[type, Any]] = {
    "generate": (GenerateConfig, generate),
    "bench": (BenchConfig, bench),
    "quality": (QualityConfig, quality),
    "serve": (ServeConfig, serve),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code. The folder may be given without `--folder`."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if args else 2
    if args[0] == "--version":
        print(importlib.metadata.version("mimo-qat"))
        return 0
    if args[0] not in VERBS:
        print(f"error: mimo-runtime has no verb {args[0]!r}; choose from {', '.join(VERBS)}", file=sys.stderr)
        return 2
    from mimo_qat.commands import run_one

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if args[0] == "quality":
            print("error: quality runs in one process; generate, bench and serve run in several", file=sys.stderr)
            return 2
        if int(os.environ.get("RANK", 0)):  # the first rank speaks for all, the others for their errors
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  open to the end of the process
    name, *rest = args
    if rest and not rest[0].startswith("-"):
        rest[0] = f"--folder={rest[0]}"
    config, verb = VERBS[name]
    return run_one(f"mimo-runtime {name}", config, verb, rest)


if __name__ == "__main__":
    raise SystemExit(main())
