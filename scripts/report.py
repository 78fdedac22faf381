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
    for path in sorted((folder / "steps").glob("*.json"), key=lambda p: p.stat().st_mtime):
        document = json.loads(path.read_text())
        document["_command"] = path.with_suffix(".command").read_text().strip()
        document["_seconds"] = int(path.with_suffix(".seconds").read_text())
        steps[path.stem] = document
    return steps


def records(steps: Documents, seconds: int) -> list[dict[str, Any]]:
    """The figures as records {name, value, unit, conditions, command, commit}.

    `seconds` are of the last call of the demo; one that went on with an earlier one took at least its steps' time.
    """
    took = {name: document["_seconds"] for name, document in steps.items()}
    qad, rows, bench = steps["qad"], steps["quality"]["rows"], steps["bench"]
    plain, release = _plain_row(rows), rows["release"]
    machine = {**hardware(), **versions()}
    settings = steps["quality"]["conditions"]["settings"]
    held_out = {
        "text": "held-out functions of the Python standard library",
        "windows": settings["windows"],
        "length": settings["length"],
        "dtype": settings["dtype"],
        "scale_rule": qad["scale_rule"],
        "qad_steps": qad["steps"],
    }
    decoding = {k: bench["conditions"]["settings"][k] for k in ("max_new_tokens", "temperature", "dtype", "seed")}
    decoding |= {"block": bench["conditions"]["block"], "prompts": bench["prompts"], "aggregate": "pooled"}
    decoding["ngram_lookup"] = bench["lookup_length"]
    table: list[tuple[str, float, str, dict[str, Any], str]] = [
        ("kl_rtn", plain["kl_mean"], "nats/token", held_out, "quality"),
        ("kl_qad", release["kl_mean"], "nats/token", held_out, "quality"),
        ("top1_rtn", plain["top1_agreement"], "fraction", held_out, "quality"),
        ("top1_qad", release["top1_agreement"], "fraction", held_out, "quality"),
        ("acceptance_length", bench["acceptance"]["length"], "tokens/verify", decoding, "bench"),
        ("tokens_per_s", bench["tokens_per_second"], "tokens/s", decoding, "bench"),
        ("tokens_per_s_no_draft", bench["plain_tokens_per_second"], "tokens/s", decoding, "bench"),
        ("forward_vs_file_bits", steps["convert"]["expert_elements_changed"], "differing weights", {}, "convert"),
        ("demo_seconds", max(seconds, sum(took.values())), "s", {"steps": took}, "bench"),
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


def _plain_row(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return next(row for name, row in rows.items() if name.startswith("plain"))


def markdown(steps: Documents, found: list[dict[str, Any]]) -> str:
    """The report for people."""
    figure = {r["name"]: r["value"] for r in found}
    machine, bench = hardware(), steps["bench"]
    accepted = bench["acceptance"]
    low, high = accepted["ci95"]
    lines = [
        "# From a dense model to an FP4-DFlash release",
        "",
        f"SmolLM2-135M-Instruct, upcycled. {machine['cpu']}, {machine['cores']} cores, GPUs: "
        f"{', '.join(machine['gpus']) or 'none'}; Python {versions()['python']}, torch {versions()['torch']}, "
        f"transformers {versions()['transformers']}; commit {commit()}.",
        "",
        "| figure | value | unit |",
        "|---|---|---|",
        *(f"| `{r['name']}` | {r['value']:.4g} | {r['unit']} |" for r in found),
        "",
        f"QAD closes {100 * (1 - figure['kl_qad'] / figure['kl_rtn']):.0f} % of the KL that round-to-nearest loses.",
        "",
        "## Quality against the unquantized model, on held-out text",
        "",
        "| row | KL mean | KL 99.9 % | top-1 | perplexity (95 % CI) |",
        "|---|---|---|---|---|",
    ]
    for name, row in steps["quality"]["rows"].items():
        interval = "{:.2f} to {:.2f}".format(*row["perplexity_ci95"])
        lines.append(
            f"| {name} | {row['kl_mean']:.3g} | {row['kl_p99.9']:.3g} | {row['top1_agreement']:.2%} "
            f"| {row['perplexity']:.2f} ({interval}) |"
        )
    lines += [
        "",
        "## Decoding held-out prompts, greedy",
        "",
        f"Acceptance length {accepted['length']:.2f} (95 % CI {low:.2f} to {high:.2f}, cap {accepted['cap']}, pooled "
        f"over {bench['prompts']} prompts). Copying from the context (n-gram lookup) would reach "
        f"{bench['lookup_length']:.2f}; distinct-3 of the output is {bench['distinct_3']:.2f}. Output with the drafter "
        f"equals output without it: {bench['identical']}"
        + "".join(f" (parts at a near tie, logit gap {d['gap']:.1g})" for d in bench["divergences"] if d["near_tie"])
        + ".",
        "",
        f"Plain decoding moves {bench['roofline']['gb_per_s']:.1f} GB/s of weights, of "
        f"{bench['roofline']['measured_gb_per_s']:.1f} GB/s that this machine can read.",
        "",
        "Draft slots accepted, first to last: " + ", ".join(f"{s:.2f}" for s in accepted["survival"]) + ".",
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
    curves = (("qat", "kl", "QAD: KL to the teacher"), ("drafter", "loss", "DFlash: loss"))
    for axis, (run, key, title) in zip(axes, curves, strict=False):
        lines = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
        curve = [(line["step"], line[key]) for line in lines if key in line]
        axis.plot(*zip(*curve, strict=True))
        axis.set(title=title, xlabel="step", ylabel="nats a token")
    axes[0].axhline(steps["qad"]["kl_rtn"], color="gray", linestyle=":", label="round to nearest, held out")
    axes[0].plot(steps["qad"]["steps"], steps["qad"]["kl_qad"], "o", label="QAD, held out")
    axes[0].legend(frameon=False, fontsize=8)
    for axis in axes[:2]:
        axis.set_ylim(bottom=0)
    rows = {n: r for n, r in steps["quality"]["rows"].items() if n != "reference"}
    axes[2].barh(list(rows)[::-1], [r["kl_mean"] for r in rows.values()][::-1])
    axes[2].set(title="KL to the unquantized model", xlabel="nats a token")
    accepted = steps["bench"]["acceptance"]
    survival = accepted["survival"]
    axes[3].bar(range(1, len(survival) + 1), survival)
    axes[3].set(title=f"Slots accepted (length {accepted['length']:.2f})", xlabel="slot", ylim=(0, 1))
    figure.savefig(folder / "report.png", dpi=110)


def main() -> None:
    """Writes and prints the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=int, required=True, help="wall time of the demo's last call, set-up included")
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
