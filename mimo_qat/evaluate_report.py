"""What a person reads of an evaluation: evaluate.md and the figures, both made from the document of evaluate.json."""

from pathlib import Path
from typing import Any

import numpy as np

from mimo_qat.qat import plots

Document = dict[str, Any]


def survival(kl: np.ndarray, points: int = 61) -> list[list[float]]:
    """[share, KL]: that share of the tokens has at least that KL; shares from 1 to 1 / tokens, evenly in logarithm."""
    shares = np.logspace(0, -np.log10(max(len(kl), 10)), points)
    return [[float(s), float(q)] for s, q in zip(shares, np.quantile(kl, 1 - shares), strict=True)]


def _span(value: float | None, ends: list[float] | None, form: str) -> str:
    if value is None:
        return ""
    return f"{value:{form}}" + (f" [{ends[0]:{form}}, {ends[1]:{form}}]" if ends else "")


def _table(header: list[str], lines: list[list[str]]) -> list[str]:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return ["| " + " | ".join(cells) + " |" for cells in (header, rule, *lines)] + [""]


def _kl_rows(document: Document) -> list[str]:
    header = ["row", "KL mean [95 %]", "median", "p99", "p99.9", "worst window", "top-1 agreement [95 %]"]
    lines = [
        [
            name,
            _span(r["kl_mean"], r["kl_ci95"], ".3g"),
            *(f"{r[key]:.3g}" for key in ("kl_median", "kl_p99", "kl_p99.9", "kl_max_window")),
            _span(r["top1_agreement"], r["top1_ci95"], ".2%"),
        ]
        for name, r in document["rows"].items()
    ]
    return _table(header, lines)


def _other_rows(document: Document) -> list[str]:
    header = ["row", "gap closed [95 %]", "perplexity [95 %]", "ratio [95 %]", "router overlap"]
    header += ["codes changed", "weight error", "seconds"]
    lines = [
        [
            name,
            _span(r["gap_closed"], r["gap_closed_ci95"], ".1%"),
            _span(r["perplexity"], r["perplexity_ci95"], ".4g"),
            _span(r["perplexity_ratio"], r["perplexity_ratio_ci95"], ".4f"),
            f"{r['router_overlap']:.2%}",
            _span(r["codes_changed"], None, ".2%"),
            f"{r['weight_error']:.3g}",
            f"{r['seconds']:.1f}",
        ]
        for name, r in document["rows"].items()
    ]
    return _table(header, lines)


def _task_part(document: Document) -> list[str]:
    lines: list[str] = []
    for task, part in document["tasks"].items():
        lines += [f"## {task}: {part['items']} items", ""]
        header = ["row", "accuracy [95 %]", "tokens an answer", "cut off"]
        lines += _table(header, [
            [name, _span(a["accuracy"], a["ci95"], ".1%"), f"{a['mean_tokens']:.0f}", f"{a['truncated']:.1%}"]
            for name, a in part["accuracy"].items()
        ])  # fmt: skip
        header = ["pair", "difference [95 %]", "only first", "only second", "McNemar p", "detectable"]
        lines += _table(header, [
            [f"{t['first']} - {t['second']}", _span(t["difference"], t["ci95"], "+.1%"), str(t["only_first"]),
             str(t["only_second"]), f"{t['mcnemar_p']:.3g}", f"{t['minimum_detectable_effect']:.1%}"]
            for t in part["tests"]
        ])  # fmt: skip
    return lines


def markdown(document: Document) -> str:
    """The tables of an evaluation, with what they mean and how they were made."""
    c = document["conditions"]
    lines = ["# Evaluation", "", "## Divergence from the reference", ""]
    lines += ["KL(reference || row) in nats a token, over the whole vocabulary.", "", *_kl_rows(document)]
    lines += [
        "## Recovery, perplexity and weights",
        "",
        f"Gap closed: 0 % is {c['plain_row']}, 100 % the noise row. Codes changed: share of expert weights that differ "
        f"from {c['plain_row']}, for rows in MXFP4. Weight error: squared, relative, mean over layers.",
        "",
        *_other_rows(document),
    ]
    if document["tests"]:
        lines += ["## Paired differences of the mean KL", ""]
        lines += _table(
            ["pair", "difference [95 %]", "p"],
            [
                [f"{t['first']} - {t['second']}", _span(t["difference"], t["ci95"], "+.3g"), f"{t['p']:.2g}"]
                for t in document["tests"]
            ],
        )
    lines += _task_part(document)
    config = c["config"]
    lines += ["## Conditions", ""]
    lines += [
        f"* {c['windows']} packed held-out windows of up to {c['window_tokens']} tokens: {c['tokens']} tokens, "
        f"{c['labels']} of them with a next token; {config['dataset_name']}, seed {config['seed']}.",
        f"* Intervals: bootstrap over windows (tasks: items), {c['bootstrap_draws']} draws, the same for all rows.",
        f"* Reference {config['model']}, batches of {config['batch_size']}; logits in float32.",
        f"* {', '.join(c['hardware']['gpus']) or c['hardware']['cpu']}; {c['seconds']:.0f} s; commit {c['commit']}; "
        + ", ".join(f"{k} {v}" for k, v in c["versions"].items()),
    ]
    lines += [f"* {name}: {r['folder']}" for name, r in document["rows"].items() if r["kind"] == "candidate"]
    return "\n".join(lines) + "\n"


def plot_all(document: Document, folder: Path) -> list[Path]:
    """Writes gap_closed.png, kl_survival.png and weight_error.png; without matplotlib one line says so."""
    plt = plots.pyplot()
    if plt is None:
        return []
    rows = document["rows"]
    bars = [
        {
            "label": name,
            "gap_closed": r["gap_closed"],
            "error": (max(0.0, r["gap_closed"] - low), max(0.0, high - r["gap_closed"])),
        }
        for name, r in rows.items()
        if r["gap_closed"] is not None and r["kind"] in ("baseline", "candidate")
        for low, high in [r["gap_closed_ci95"] or (r["gap_closed"], r["gap_closed"])]
    ]
    drawn = [plots.plot_gap_closed(bars, folder / "gap_closed.png")] if bars else []
    with plt.rc_context(plots.STYLE):
        drawn += [_survival_figure(plt, rows, folder), _layers_figure(plt, rows, folder)]
    return [path for path in drawn if path]


def _look(i: int) -> dict[str, Any]:
    colours = plots.COLOURS
    return {"color": colours[i % len(colours)], "linestyle": ("-", "--", ":")[i // len(colours) % 3]}


def _survival_figure(plt: Any, rows: Document, folder: Path) -> Path | None:
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    shown = {name: r for name, r in rows.items() if r["kind"] != "reference"}
    for i, (name, r) in enumerate(shown.items()):
        points = [(kl, share) for share, kl in r["kl_survival"] if kl > 0]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1.4, **_look(i))
    if not axes.lines:
        plt.close(figure)
        return None
    axes.set(xscale="log", yscale="log", xlabel="KL of a token, nats", ylabel="share of tokens with at least that KL")
    axes.legend()
    return plots.save_figure(plt, figure, folder / "kl_survival.png")


def _layers_figure(plt: Any, rows: Document, folder: Path) -> Path | None:
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    shown = {name: r for name, r in rows.items() if any(r["weight_error_layers"])}
    for i, (name, r) in enumerate(shown.items()):
        axes.plot(r["weight_error_layers"], label=name, marker=".", linewidth=1.2, **_look(i))
    if not axes.lines:
        plt.close(figure)
        return None
    axes.set(yscale="log", xlabel="MoE layer", ylabel="relative squared error of the expert weights")
    axes.legend()
    return plots.save_figure(plt, figure, folder / "weight_error.png")
