"""The shape every command shares: verbs, YAML == flag == dataclass field, one-line errors, JSON last."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Verb:
    """One subcommand: `module` holds the dataclass `config` and `main(config) -> dict`."""

    module: str
    config: str
    help: str
    positional: str = ""
    """names of the fields that may be given without their flags, in order"""


def run(prog: str, description: str, verbs: dict[str, Verb], argv: Sequence[str] | None = None) -> int:
    """Parses `argv`, runs the verb and prints its JSON document; returns the exit code.

    A ValueError or OSError of the verb becomes one `error:` line and code 1, wrong usage code 2, and a document whose
    "ok" is false code 1. Only the chosen verb's module is imported, so `--help` starts at once.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(f"usage: {prog} VERB [--config FILE.yaml] [--FIELD VALUE ...]\n\n{description}\n\nverbs:")
        width = max(map(len, verbs))
        for name, verb in verbs.items():
            print(f"  {name:<{width}} {verb.help}")
        print(f"\n{prog} VERB --help lists the fields of a verb; --print_config prints them as YAML.")
        return 0 if args else 2
    if args[0] == "--version":
        from mimo_qat.provenance import versions

        print(json.dumps(versions()))
        return 0
    if args[0] not in verbs:
        print(f"error: {prog} has no verb {args[0]!r}; choose from {', '.join(verbs)}", file=sys.stderr)
        return 2
    name, *rest = args
    verb = verbs[name]
    module = import_module(verb.module)
    for i, field in enumerate(verb.positional.split()):
        if i >= len(rest) or rest[i].startswith("-"):
            break
        rest[i] = f"--{field}={rest[i]}"
    return run_one(f"{prog} {name}", getattr(module, verb.config), module.main, rest)


def run_one(
    prog: str,
    config_class: type,
    main: Callable[[Any], dict[str, Any] | None],
    args: Sequence[str] | None = None,
) -> int:
    """Parses `args` (or the command line) into `config_class`, runs `main` on it and prints its document.

    Modules use it directly under `accelerate launch -m`; only the first process prints.
    """
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=prog, description=main.__doc__)
    parser.add_argument("--config", action="config", help="YAML file with these fields")
    parser.add_class_arguments(config_class, as_group=False)
    values = parser.instantiate(parser.parse_args(args))
    try:
        document = main(config_class(**{k: v for k, v in vars(values).items() if k != "config"}))
    except (ValueError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 1
    if document is None:
        return 0
    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps(document))
    return 0 if document.get("ok", True) else 1
