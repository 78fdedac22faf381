"""python -m mimo_runtime.verdict runs/node-check: what a release does on this machine, beside what was published.

Reads the JSON documents that scripts/node_check.sh kept of `mimo-qat env`, `mimo-qat check`, `mimo-runtime bench` and
`mimo-runtime quality`, computes nothing anew, and prints a table in Markdown and one JSON document. A claim that is not
reached is a verdict; only a step that failed makes the exit code nonzero.
"""

import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mimo_qat.commands import run_one

# Published for MiMo-V2.5-Pro-FP4-DFlash on one 8-GPU node (model card and blog posts of Xiaomi and TileRT, 2026);
# prompts, temperature and the kind of GPU were not.
SPEED, SPEED_TEXT = 1000.0, "1,000 to 1,200 tokens/s"
ACCEPTANCE = {"code": 6.30, "reasoning": 5.56}
PARITY = 1.01  # "on par" was published without a number; ours: perplexity at most 1 % above the reference's


@dataclass(kw_only=True)
class VerdictConfig:
    """Compare what was measured with what was published."""

    folder: str
    """output folder of scripts/node_check.sh"""


@dataclass
class Step:
    """One command of the check: its document is None where it printed none."""

    command: str
    document: dict[str, Any] | None

    @property
    def ok(self) -> bool:
        """It ended with a document that reports no failure."""
        return self.document is not None and self.document.get("ok", True)


@dataclass
class Row:
    """A line of the table."""

    claim: str
    published: str
    measured: str
    verdict: str


def read_steps(folder: str | Path) -> dict[str, Step]:
    """The steps that ran: NAME.command holds a step's command, NAME.log what it printed, its document among it."""
    steps = {}
    for path in sorted(Path(folder).glob("*.command")):
        log = path.with_suffix(".log")
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
        document = next((line for line in reversed(lines) if line.startswith("{") and line.endswith("}")), None)
        steps[path.stem] = Step(path.read_text().strip(), json.loads(document) if document else None)
    if not steps:
        raise ValueError(f"{folder} holds no steps of a check; run: bash scripts/node_check.sh RELEASE")
    return steps


def judge(steps: dict[str, Step]) -> list[Row]:
    """The rows of the table, from the documents alone."""
    rows = [_check_row(steps.get("check"))]
    bench = steps.get("bench")
    if bench is None or bench.document is None:
        return [*rows, _missing("speed", SPEED_TEXT, bench), _quality_row(steps.get("quality"))]
    b = bench.document
    domains = [d for d in ACCEPTANCE if d in b["domains"]]
    rows += [_lossless_row(b), _speed_row("speed, all prompts", b, b)]
    rows += [_speed_row(f"speed, {d}", b["domains"][d], b) for d in domains]
    rows += [_acceptance_row(d, b) for d in domains]
    return [*rows, _quality_row(steps.get("quality"))]


def _missing(claim: str, published: str, step: Step | None) -> Row:
    return Row(claim, published, "-", "not measured" if step is None else "FAILED: the command gave no result")


def _check_row(step: Step | None) -> Row:
    if step is None or step.document is None:
        return _missing("release is whole", "-", step)
    d = step.document
    measured = f"{d['errors']} errors, {d.get('expert_tensors', 0)} expert tensors in {d.get('files', 0)} files"
    return Row("release is whole", "-", measured, "yes" if d["ok"] else "FAILED")


def _lossless_row(b: dict[str, Any]) -> Row:
    claim, published = "same output with and without drafts", "lossless"
    if b["identical"] is None:
        return Row(claim, published, "no drafter", "not measured")
    apart = len({d["prompt"] for d in b["divergences"]})
    measured = f"{b['prompts'] - apart} of {b['prompts']} prompts identical"
    verdict = "yes" if b["identical"] else "up to rounding of near-ties" if b["ok"] else "FAILED"
    return Row(claim, published, measured, verdict)


def _speed_row(claim: str, row: dict[str, Any], b: dict[str, Any]) -> Row:
    speed, plain = row.get("tokens_per_second"), row["plain_tokens_per_second"]
    with_drafts = f"{speed:,.1f} tokens/s ({plain:,.1f} without drafts)" if speed is not None else ""
    measured = with_drafts or f"{plain:,.1f} tokens/s, no drafter"
    if b["forced_acceptance"] is not None:
        return Row(claim, SPEED_TEXT, measured, "not measured: the acceptance was forced")
    return Row(claim, SPEED_TEXT, measured, _verdict(plain if speed is None else speed, SPEED))


def _acceptance_row(domain: str, b: dict[str, Any]) -> Row:
    claim = ACCEPTANCE[domain]
    name, published = f"acceptance length, {domain}", f"{claim:.2f} of 8"
    row = b["domains"][domain]
    a = row.get("acceptance")
    if b["forced_acceptance"] is not None or not a or not a["rounds"]:
        return Row(name, published, "-", "not measured: no round of a drafter counted")
    low, high = a["ci95"]
    measured = (
        f"{a['length']:.2f} ({low:.2f} to {high:.2f}) of {a['cap']}; n-gram copier {row['lookup_length'] or 0:.2f}"
    )
    return Row(name, published, measured, _verdict(a["length"], claim, high))


def _quality_row(step: Step | None) -> Row:
    claim, published = "quality", "on par"
    if step is None:
        return Row(claim, published, "-", "not measured: give --reference")
    if step.document is None:
        return _missing(claim, published, step)
    rows = step.document["rows"]
    release, reference = rows["release"], rows["reference"]
    plain = next(r for name, r in rows.items() if name.startswith("plain"))
    ratio = release["perplexity"] / reference["perplexity"]
    measured = (
        f"perplexity {release['perplexity']:.3f}, {ratio - 1:+.2%} of the reference's; "
        f"KL {release['kl_mean']:.2g} (round to nearest {plain['kl_mean']:.2g}); "
        f"top-1 agreement {release['top1_agreement']:.1%}"
    )
    return Row(claim, f"{published} (here: at most {PARITY - 1:+.0%})", measured, _verdict(-ratio, -PARITY))


def _verdict(value: float, claim: float, high: float | None = None) -> str:
    """`high` is the upper end of the 95 % interval of `value`."""
    if value >= claim:
        return "reached"
    return "not reached" if high is None or high < claim else "open: the interval holds the claim"


def markdown(rows: list[Row], steps: dict[str, Step]) -> str:
    """The table under the conditions that it was measured in."""
    lines = []
    env = steps["env"].document if "env" in steps else None
    if env:
        h = env["hardware"]
        machine = f"{len(h['gpus'])} x {h['gpus'][0]}" if h["gpus"] else f"{h['cpu']}, {h['cores']} cores, no GPU"
        lines.append(f"{machine}; torch {env['versions']['torch']}; commit {env['commit']}")
    bench = steps["bench"].document if "bench" in steps else None
    if bench:
        s = bench["conditions"]["settings"]
        lines.append(
            f"{bench['prompts']} prompts, {s['max_new_tokens']} tokens each, temperature {s['temperature']}, "
            f"{s['dtype']}, batch 1 on {s['device']}; published for 1.02 T parameters on one 8-GPU node"
        )
    lines += ["", "| claim | published | measured here | verdict |", "|---|---|---|---|"]
    lines += [f"| {r.claim} | {r.published} | {r.measured} | {r.verdict} |" for r in rows]
    return "\n".join(lines)


def main(cfg: VerdictConfig) -> dict[str, Any]:
    """Prints what a release does on this machine, beside what was published."""
    steps = read_steps(cfg.folder)
    rows = judge(steps)
    print(markdown(rows, steps))
    failed = [name for name, step in steps.items() if not step.ok]
    for name in failed:
        print(f"\nFAILED: {steps[name].command}\n  see {Path(cfg.folder) / name}.log")
    return {
        "ok": not failed,
        "failed": failed,
        "rows": [asdict(row) for row in rows],
        "commands": {name: shlex.split(step.command) for name, step in steps.items()},
        "documents": {name: step.document for name, step in steps.items()},
    }


if __name__ == "__main__":
    raise SystemExit(run_one("python -m mimo_runtime.verdict", VerdictConfig, main))
