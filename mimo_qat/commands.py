"""The shape every command shares: verbs, YAML == flag == dataclass field, one-line errors, JSON last."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class Verb:
    """One subcommand: `module` holds the dataclass `config` and `main(config) -> dict`."""

    module: str
    config: str
    help: str
    positional: str | None = None
    """name of the field that may be given without its flag"""


def run(prog: str, description: str, verbs: dict[str, Verb], argv: Sequence[str] | None = None) -> int:
    """Parses `argv`, runs the verb and prints its JSON document; returns the exit code.

    A ValueError or OSError of the verb becomes one `error:` line and code 1, wrong usage code 2, and a document whose
    "ok" is false code 1. Only the chosen verb's module is imported, so `--help` starts at once.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(f"usage: {prog} VERB [--config FILE.yaml] [--FIELD VALUE ...]\n\n{description}\n\nverbs:")
        for name, verb in verbs.items():
            print(f"  {name:<10} {verb.help}")
        print(f"\n{prog} VERB --help lists the fields of a verb; --print_config prints them as YAML.")
        return 0 if args else 2
    if args[0] == "--version":
        from mimo_qat.provenance import versions

        print(json.dumps(versions()))
        return 0
    if args[0] not in verbs:
        print(f"error: {prog} has no verb {args[0]!r}; choose from {', '.join(verbs)}", file=sys.stderr)
        return 2
    return _run_verb(f"{prog} {args[0]}", verbs[args[0]], args[1:])


def _run_verb(prog: str, verb: Verb, args: list[str]) -> int:
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    module = import_module(verb.module)
    config_class = getattr(module, verb.config)
    if verb.positional and args and not args[0].startswith("-"):
        args = [f"--{verb.positional}={args[0]}", *args[1:]]
    parser = ArgumentParser(prog=prog, description=verb.help)
    parser.add_argument("--config", action="config", help="YAML file with these fields")
    parser.add_class_arguments(config_class, as_group=False)
    values = parser.instantiate(parser.parse_args(args))
    try:
        document = module.main(config_class(**{k: v for k, v in vars(values).items() if k != "config"}))
    except (ValueError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 1
    if document is not None:
        print(json.dumps(document))
    return 0 if document is None or document.get("ok", True) else 1
