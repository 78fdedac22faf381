"""python scripts/report.py runs/demo --seconds 600: one report (md, json, png) of a demo's steps.

Reads the JSON documents that the commands printed, computes nothing anew, and prints the report.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from mimo_qat.provenance import commit, hardware, versions, write_json

Documents = dict[str, dict[str, Any]]


def read_steps(folder: Path) -> Documents:
    """Step name -> the document it printed, with its command and seconds."""
    steps = {}
    for path in sorted((folder / "steps").glob("*.json")):
        document = json.loads(path.read_text())
        document["_command"] = path.with_suffix(".command").read_text().strip()
        document["_seconds"] = int(path.with_suffix(".seconds").read_text())
        steps[path.stem] = document
    return steps


def records(steps: Documents, seconds: int) -> list[dict[str, Any]]:
    """The figures as records {name, value, unit, conditions, command, commit}."""
    qad, quality, bench = steps["qad"], steps["quality"], steps["bench"]
    machine = {**hardware(), **versions()}
    rows = {row["name"]: row for row in quality["rows"]}
    held_out = {"text": "held-out functions of the standard library", "tokens": quality["tokens"]}
    decoding = {"prompts": bench["prompts"], "max_new_tokens": bench["max_new_tokens"], "temperature": 0}
    decoding |= {"dtype": bench["dtype"], "aggregate": "pooled", "cap": bench["block_size"]}
    table: list[tuple[str, float, str, dict[str, Any], str]] = [
        ("kl_rtn", rows["rtn"]["kl_mean"], "nats/token", held_out, "quality"),
        ("kl_qad", rows["release"]["kl_mean"], "nats/token", held_out | {"steps": qad["steps"]}, "quality"),
        ("top1_rtn", rows["rtn"]["top1"], "fraction", held_out, "quality"),
        ("top1_qad", rows["release"]["top1"], "fraction", held_out, "quality"),
        ("acceptance_length", bench["acceptance_length"], "tokens/verify", decoding, "bench"),
        ("tokens_per_s", bench["tokens_per_s"], "tokens/s", decoding, "bench"),
        ("tokens_per_s_no_draft", bench["tokens_per_s_no_draft"], "tokens/s", decoding, "bench"),
        ("forward_vs_file_bits", steps["convert"]["changed_elements"], "elements", {}, "convert"),
        ("demo_seconds", seconds, "s", {"steps": {n: d["_seconds"] for n, d in steps.items()}}, "bench"),
    ]
    return [
        {
            "name": name,
            "value": value,
            "unit": unit,
            "conditions": machine | conditions,
            "command": "bash scripts/demo.sh" if name == "demo_seconds" else steps[step]["_command"],
            "commit": commit(),
        }
        for name, value, unit, conditions, step in table
    ]


def markdown(steps: Documents, found: list[dict[str, Any]]) -> str:
    """The report for people."""
    figure = {r["name"]: r["value"] for r in found}
    machine = hardware()
    lines = [
        "# From a dense model to an FP4-DFlash release",
        "",
        f"SmolLM2-135M-Instruct, upcycled. {machine['cpu']}, {machine['cores']} cores, GPUs: "
        f"{', '.join(machine['gpus']) or 'none'}; torch {versions()['torch']}, "
        f"transformers {versions()['transformers']}; commit {commit()}.",
        "",
        "| figure | value | unit |",
        "|---|---|---|",
        *(f"| `{r['name']}` | {r['value']:.4g} | {r['unit']} |" for r in found),
        "",
        f"QAD closes {100 * (1 - figure['kl_qad'] / figure['kl_rtn']):.0f} % of the KL that round-to-nearest loses.",
        "",
        "## Quality against the unquantized model, held-out text",
        "",
        "| row | KL mean | KL 99.9 % | top-1 | perplexity (95 % CI) |",
        "|---|---|---|---|---|",
    ]
    for row in steps["quality"]["rows"]:
        low, high = row["ppl_ci"]
        lines.append(
            f"| {row['name']} | {row['kl_mean']:.4g} | {row['kl_p999']:.4g} | {row['top1']:.2%} "
            f"| {row['ppl']:.2f} ({low:.2f} to {high:.2f}) |"
        )
    bench = steps["bench"]
    low, high = bench["acceptance_length_ci"]
    lines += [
        "",
        "## Decoding, held-out prompts, greedy",
        "",
        f"Acceptance length {bench['acceptance_length']:.2f} (95 % CI {low:.2f} to {high:.2f}, cap "
        f"{bench['block_size']}, pooled over {bench['prompts']} prompts); n-gram lookup reaches "
        f"{bench['ngram_acceptance_length']:.2f}; distinct-3 {bench['distinct_3']:.2f}. Output with the drafter equals "
        f"output without it: {bench['identical']}.",
        "",
        "Survival of the draft slots: " + ", ".join(f"{s:.2f}" for s in bench["survival"]) + ".",
        "",
        "## Steps",
        "",
        "| step | seconds | command |",
        "|---|---|---|",
        *(f"| {name} | {d['_seconds']} | `{d['_command']}` |" for name, d in steps.items()),
    ]
    return "\n".join(lines) + "\n"


def plot(folder: Path, steps: Documents) -> None:
    """Training curves, quality bars and draft survival in one picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    axes = figure.subplots(1, 4)
    for axis, run, key, title in ((axes[0], "qat", "kl", "QAD: KL to the teacher"), (axes[1], "drafter", "loss", "DFlash: loss")):
        lines = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
        curve = [(line["step"], line[key]) for line in lines if key in line]
        axis.plot(*zip(*curve, strict=True))
        axis.set(title=title, xlabel="step", ylabel="nats a token", ylim=(0, None))
    axes[0].axhline(steps["qad"]["kl_rtn"], color="gray", linestyle=":", label="round to nearest, held out")
    axes[0].plot(steps["qad"]["steps"], steps["qad"]["kl_qad"], "o", label="QAD, held out")
    axes[0].legend(frameon=False, fontsize=8)
    rows = steps["quality"]["rows"]
    axes[2].bar([r["name"] for r in rows], [r["kl_mean"] for r in rows])
    axes[2].set(title="KL to the unquantized model", ylabel="nats a token")
    survival = steps["bench"]["survival"]
    axes[3].bar(range(1, len(survival) + 1), survival)
    axes[3].set(title=f"Draft slots accepted (length {steps['bench']['acceptance_length']:.2f})", xlabel="slot", ylim=(0, 1))
    figure.savefig(folder / "report.png", dpi=110)


def main() -> None:
    """Writes and prints the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=int, required=True, help="wall time of the whole demo, set-up included")
    options = parser.parse_args()
    steps = read_steps(options.folder)
    found = records(steps, options.seconds)
    write_json(options.folder / "report.json", found)
    text = markdown(steps, found)
    (options.folder / "report.md").write_text(text)
    plot(options.folder, steps)
    print(text)


if __name__ == "__main__":
    main()
