"""python scripts/qad_report.py study-0.json study-1.json --modelopt modelopt.json --out docs/results/qad

Joins what qad_study.py and compare_modelopt.py measured: writes OUT.json (a list of records), OUT.png (gap closed) and
OUT-tokens.png (gap closed over tokens), and prints the tables of docs/results/qad.md. With --keep, records of an
earlier file that these do not measure (step times, ModelOpt, rows of another teacher) stay, with their own commit and
conditions.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from study import MADE, made_by, markdown

from mimo_qat.evaluate import FP8_ROW, NOISE, REFERENCE
from mimo_qat.provenance import with_earlier, write_json
from mimo_qat.qat.plots import plot_gap_closed, plot_token_curve

PEAK_BF16 = 989e12  # operations a second, dense: H100 and H200, from NVIDIA's data sheets
BASELINES = (REFERENCE, NOISE, FP8_ROW, "RTN mse", "RTN even", "RTN rceil", "RTN floor")
TABLES = {  # title: rows, each compared with the short QAD run
    "Scale rule": ("qad short", "qad short mse", "qad short rceil", "qad short floor"),
    "Exporting with other rounding": ("qad short rceil", "exported like ModelOpt"),
    "Objective": ("qad short", "kl + 0.1 ce short", "kl + hidden short", "ce short"),
    "Learning rate x steps": (
        *("qad short lr x3", "qad short", "qad short lr x0.3", "qad short lr x0.1"),
        *("qad quarter lr x3", "qad quarter", "qad quarter lr x0.3", "qad long"),
    ),
    "Masters": (
        *("qad short", "qad short bf16 masters", "qad short lr x0.1", "qad short bf16 masters lr x0.1"),
    ),
    "What trains": ("qad short", "experts+router short", "body short"),
    "Seeds": (
        *("qad short", "qad short seed 1", "qad short seed 2", "ce short", "ce short seed 1", "ce short seed 2"),
    ),
}  # fmt: skip


def join(paths: Sequence[str]) -> dict[str, Any]:
    """One document of several; ValueError where two files disagree about a row that needs no training."""
    docs = [json.loads(Path(p).read_text()) for p in paths]
    whole: dict[str, Any] = {"rows": {}, "runs": {}, "left_out": {}, "step_times": {}, "made": {}}
    for doc in docs:
        for name in BASELINES:
            first, other = whole["rows"].get(name), doc["rows"].get(name)
            if first and other and abs(first["kl_mean"] - other["kl_mean"]) > 1e-3 * max(1e-2, first["kl_mean"]):
                raise ValueError(f"{name}: KL {first['kl_mean']} and {other['kl_mean']}; the files are of two teachers")
        for part in ("rows", "runs", "left_out", "step_times"):
            whole[part] |= doc.get(part, {})
        whole["made"] |= {name: made_by(doc, name) for name in doc["rows"]}
        if doc.get("step_times"):
            whole["made"]["step_times"] = made_by(doc, "step_times")
    return whole | {k: docs[0][k] for k in (*MADE, "eval_rows")}


def span(row: dict[str, Any]) -> str:
    if row.get("gap_closed") is None:
        return ""
    low, high = row["gap_closed_ci95"]
    return f"{100 * row['gap_closed']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def table(doc: dict[str, Any], names: Iterable[str]) -> str:
    """Markdown of the rows that were measured; those that were not are named below it."""
    rows, absent = [], []
    for name in names:
        row, run = doc["rows"].get(name), doc["runs"].get(name, {})
        if row is None:
            absent.append(f"{name} ({doc['left_out'].get(name, 'not run')})")
            continue
        tokens = f"{run['tokens'] / 1e6:.1f} M" if run else ""
        codes = f"{100 * run['codes_changed']:.2f} %" if run else ""
        kl = [f"{row[k]:.4g}" for k in ("kl_mean", "kl_p99", "kl_p99.9")]
        rows.append([name, tokens, *kl, f"{100 * row['top1_agreement']:.1f} %", span(row), codes])
    header = ("row", "tokens", "KL", "99 %", "99.9 %", "top-1", "gap closed", "codes changed")
    return markdown(header, rows) + "".join(f"\n\nNot measured: {a}" for a in absent)


def records(doc: dict[str, Any], modelopt: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The named figures first, then the KL of every row."""

    def record(name: str, value: float, unit: str, made: dict[str, Any], **more: Any) -> dict[str, Any]:
        conditions = {"hardware": made["hardware"], "versions": made["versions"], "seed": 0}
        conditions |= {"held_out_rows": doc["eval_rows"]} | more
        figure = {"name": name, "value": value, "unit": unit, "conditions": conditions}
        return figure | {key: made[key] for key in ("command", "commit")}

    trained = {n: doc["rows"][n] | doc["runs"][n] for n in doc["runs"] if "gap_closed" in doc["rows"][n]}
    out = []
    within = {n: r for n, r in trained.items() if r["tokens"] <= 35.5e6 and r["changes"].get("kl_weight", 1.0)}
    for figure, among in (("kl_gap_closed_35m", within), ("kl_gap_closed_best", trained)):
        best = max(among, key=lambda n: among[n]["gap_closed"])
        row = among[best]
        more = {"run": best, "tokens": row["tokens"], "ci95": row["gap_closed_ci95"]}
        out.append(record(figure, row["gap_closed"], "fraction", doc["made"][best], **more))
    times = doc["step_times"]
    if times:
        timed = doc["made"]["step_times"]
        out += [record(n, times[n], "ratio", timed) for n in ("snap_fraction_of_step", "qad_over_sft_step")]
        out.append(record("qad_over_sft_step_checkpointed", times["qad_over_sft_step_checkpointed"], "ratio", timed))
        for name, rate in mfu(times).items():
            out += [record(f"mfu_{name}", rate, "fraction", timed, peak=PEAK_BF16)]
            out += [record(f"tokens_per_s_{name}", times["tokens_per_step"] / times[name], "tokens/s", timed)]
            if f"{name}_peak_gb" in times:
                out += [record(f"peak_memory_{name}", times[f"{name}_peak_gb"], "GB", timed)]
    if modelopt:
        more = {"variants": {}}
        for name in modelopt:
            if isinstance(modelopt[name], dict) and "step_seconds" in modelopt[name]:
                held = {k: v["kl"] for k, v in modelopt[name]["held_out"].items()}
                facts = {k: modelopt[name][k] for k in ("step_seconds", "peak_gb", "tokens_per_s")}
                more["variants"][name] = facts | {"held_out_kl": held}
        ours, theirs = more["variants"]["snapped_even"], more["variants"]["modelopt_bf16"]
        ratio, made = theirs["step_seconds"] / ours["step_seconds"], {k: modelopt.get(k, doc[k]) for k in MADE}
        out.append(record("step_speedup_vs_modelopt", ratio, "ratio", made, **more))
    for name, row in doc["rows"].items():
        run = doc["runs"].get(name, {})
        more = {"seed": run.get("changes", {}).get("seed", 0)}
        more |= {k: run[k] for k in ("changes", "tokens", "tokens_per_s", "peak_gb", "codes_changed") if k in run}
        keep = ("kl_p99", "kl_p99.9", "top1_agreement", "gap_closed", "gap_closed_ci95", "kl_ci95")
        more |= {k: row.get(k) for k in keep}
        out.append(record(f"kl {name}", row["kl_mean"], "nats/token", doc["made"][name], **more))
    return out


def mfu(times: dict[str, Any]) -> dict[str, float]:
    """Operations that a step needs over what the card's peak does in its time."""
    flops = times["flops_per_token"]
    learn = flops["student_forward"] + flops["student_backward"]
    needed = {"qad": learn + flops["teacher_forward"], "sft": learn}
    return {n: needed[n] * times["tokens_per_step"] / times[n] / PEAK_BF16 for n in needed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", help="JSON files of qad_study.py")
    parser.add_argument("--modelopt", help="JSON file of compare_modelopt.py")
    parser.add_argument("--keep", help="earlier records, for what these files did not measure")
    parser.add_argument("--out", required=True, help="path without suffix")
    options = parser.parse_args()
    doc = join(options.studies)
    modelopt = json.loads(Path(options.modelopt).read_text()) if options.modelopt else None
    write_json(f"{options.out}.json", with_earlier(records(doc, modelopt), options.keep, "kl "))
    shown = [*BASELINES[1:], "ce short", "qad short", "qad long"]
    print(table(doc, [*BASELINES, "ce short", "qad short", "qad long"]))
    for title, names in TABLES.items():
        print(f"\n## {title}\n\n{table(doc, names)}")
    if doc["step_times"]:
        print("\n## Speed\n\n" + json.dumps(doc["step_times"] | {"mfu": mfu(doc["step_times"])}, indent=1))
    bars = []
    for name in shown:
        row = doc["rows"].get(name, {})
        if row.get("gap_closed") is not None:
            low, high = row["gap_closed_ci95"]
            error = (row["gap_closed"] - low, high - row["gap_closed"])
            bars.append({"label": name, "gap_closed": row["gap_closed"], "error": error})
    plot_gap_closed(bars, f"{options.out}.png")
    plain, curve = doc["rows"]["RTN even"]["kl_mean"], doc["runs"].get("qad long", {}).get("curve", [])
    if curve:
        floor = doc["rows"][NOISE]["kl_mean"]
        points = [(p["tokens"], (plain - p["kl"]) / (plain - floor)) for p in curve]
        points.append((doc["runs"]["qad long"]["tokens"], doc["rows"]["qad long"]["gap_closed"]))
        plot_token_curve({"one run of QAD": points}, f"{options.out}-tokens.png")


if __name__ == "__main__":
    main()
