"""What qad_study.py, dflash_study.py and their reports share.

A clock, a JSON file that is rewritten after each arm, and for every figure the command and commit that measured it.
"""

import argparse
import json
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mimo_qat.provenance import command_line, commit, hardware, versions, write_json

MADE = ("command", "commit", "versions", "hardware")


class Study:
    """Options, clock and study.json. Finished runs of an earlier call are kept, with the command that made them."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.began, self.work = options, time.monotonic(), Path(options.work)
        self.path = Path(options.out or self.work / "study.json")
        self.doc: dict[str, Any] = json.loads(self.path.read_text()) if self.path.is_file() else {}
        for run in self.doc.setdefault("runs", {}).values():
            for key in ("command", "commit"):
                run.setdefault(key, self.doc[key])
        self.doc |= {"command": command_line(), "commit": commit(), "versions": versions(), "hardware": hardware()}
        self.doc["left_out"] = {}

    def left(self) -> float:
        """Seconds until no run may begin any more."""
        return self.options.seconds - (time.monotonic() - self.began)

    def add(self, name: str, run: dict[str, Any]) -> None:
        self.doc["runs"][name] = run | {key: self.doc[key] for key in ("command", "commit")}

    def leave_out(self, name: str, why: str) -> None:
        print(f"{name}: {why}", flush=True)
        self.doc["left_out"][name] = why
        self.save()

    def save(self) -> None:
        write_json(self.path, self.doc)

    def chosen(self, name: str) -> bool:
        """Whether --arms and --skip take this arm."""
        wanted = not self.options.arms or re.search(self.options.arms, name)
        return bool(wanted and not (self.options.skip and re.search(self.options.skip, name)))

    def end(self) -> None:
        """Prints what was left out; exit code 1 where time was short or a run failed."""
        self.save()
        print(json.dumps({"left_out": self.doc["left_out"], "seconds": round(time.monotonic() - self.began, 1)}))
        raise SystemExit(int(any("s left" in why or why.startswith("failed") for why in self.doc["left_out"].values())))


def study_parser(description: str | None) -> argparse.ArgumentParser:
    """The flags of every study."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True)
    parser.add_argument("--out", help="JSON file; WORK/study.json without it")
    parser.add_argument("--seconds", type=float, default=1e9, help="no run begins that would end later")
    parser.add_argument("--arms", help="regular expression: only these")
    parser.add_argument("--skip", help="regular expression: not these")
    parser.add_argument("--max_length", type=int, default=1024)
    return parser


def made_by(doc: dict[str, Any], name: str) -> dict[str, Any]:
    """Command, commit, versions and hardware of a figure of a study's document."""
    run = doc["runs"].get(name, {})
    return {key: run.get(key, doc[key]) for key in MADE}


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [list(header), ["---"] * len(header), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
