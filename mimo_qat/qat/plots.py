"""Figures of QAT runs: the curves of one run, bars of the gap closed, and gap closed over tokens.

matplotlib is optional (mimo-qat[report]); without it each function prints one line and returns None.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Okabe and Ito's palette, without its yellow, which is hard to see on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": "small",
    "font.size": 9.5,
    "savefig.dpi": 150,
}


def pyplot() -> Any:
    """matplotlib.pyplot drawing into files, or None (said in one line) where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("no figures: matplotlib is not installed; pip install 'mimo-qat[report]'")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl in order of steps, each with `total_tokens`, the tokens trained on up to its step.

    A line holds the tokens of its own step only; steps that were not logged count like the next logged one. ValueError
    without the file or with an empty one.
    """
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the output folder of a QAT run")
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    if not rows:
        raise ValueError(f"{path} is empty; the run has not logged a step yet")
    total = step = 0
    for row in sorted(rows, key=lambda r: r["step"]):
        total += row["tokens"] * (row["step"] - step)
        step = row["step"]
        row["total_tokens"] = total
    return sorted(rows, key=lambda r: r["step"])


def plot_run(folder: str | Path) -> Path | None:
    """Draws the KL, the flips, the learning rate and the speed of a run folder over its tokens; -> curves.png in it.

    The PTQ line is `kl_rtn` of qat.json, which a finished run has.
    """
    rows = read_metrics(folder)
    plt = pyplot()
    if plt is None:
        return None
    report = Path(folder) / "qat.json"
    ptq = json.loads(report.read_text()).get("kl_rtn") if report.is_file() else None
    with plt.rc_context(STYLE):
        figure, ((kl, flips), (rate, speed)) = plt.subplots(2, 2, figsize=(9, 5.6), sharex=True, layout="constrained")
        _draw_kl(kl, rows, ptq)
        _draw_flips(flips, rows)
        _curve(rate, rows, "learning_rate", COLOURS[0])
        rate.set_title("Learning rate")
        rate.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        _curve(speed, rows, "tokens_per_s", COLOURS[0])
        speed.set_title("Training tokens per second")
        speed.yaxis.set_major_formatter(_si_formatter())
        for axes in (kl, rate, speed):
            axes.set_ylim(0, 1.03 * axes.get_ylim()[1])
        for axes in (rate, speed):
            axes.set_xlabel("training tokens")
            axes.xaxis.set_major_formatter(_si_formatter())
        rate.set_xlim(0, None)
        return save_figure(plt, figure, Path(folder) / "curves.png")


def _curve(axes: Any, rows: list[dict[str, Any]], key: str, colour: str, **options: Any) -> None:
    """A line through the rows that have `key`; where there are few points, they are marked."""
    points = [(r["total_tokens"], r[key]) for r in rows if r.get(key) is not None]
    if points:
        marker = "." if len(points) <= 25 else None
        axes.plot(*zip(*points, strict=True), color=colour, **({"marker": marker, "linewidth": 1.4} | options))


def _draw_kl(axes: Any, rows: list[dict[str, Any]], ptq: float | None) -> None:
    _curve(axes, rows, "kl", COLOURS[0], label="training batch", alpha=0.75)
    if any("kl" not in r or abs(r["loss"] - r["kl"]) > 1e-9 for r in rows):  # not the KL alone, or without a teacher
        _curve(axes, rows, "loss", COLOURS[2], label="loss", linestyle=":")
    _curve(axes, rows, "eval_kl", COLOURS[1], label="held out", marker="o", markersize=4.5)
    if ptq is not None:
        axes.axhline(ptq, color="#555555", linestyle="--", linewidth=1.1, label="held out, PTQ")
    axes.set_title("KL to the unquantized model, nats per token")
    axes.legend(loc="lower left")


def _draw_flips(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Both are fractions of the expert weights, but of different sizes: a logarithmic axis holds them."""
    positive = [r | {k: r.get(k) or None for k in ("flip_fraction", "codes_changed")} for r in rows]
    _curve(axes, positive, "flip_fraction", COLOURS[0], label="flipped in this step")
    _curve(axes, positive, "codes_changed", COLOURS[1], label="differ from PTQ")
    axes.set_title("Expert weights that changed value")
    if axes.lines:
        values = [value for line in axes.lines for value in line.get_ydata()]
        axes.set_yscale("log")
        axes.set_ylim(10 ** math.floor(math.log10(min(values))), 10 ** math.ceil(math.log10(1.1 * max(values))))
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        axes.yaxis.set_minor_formatter("")
        axes.legend()


def plot_gap_closed(rows: Sequence[dict[str, Any]], path: str | Path) -> Path | None:
    """Horizontal bars of the fraction of the quantization gap that each method closes; -> `path`.

    A row has `label` and `gap_closed` (0 = PTQ, 1 = unquantized), and may have `error`: half of the interval, or
    (below, above). ValueError without rows.
    """
    if not rows:
        raise ValueError("no rows to plot; give at least one with label and gap_closed")
    plt = pyplot()
    if plt is None:
        return None
    with plt.rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure, axes = plt.subplots(figsize=(7, 0.9 + 0.42 * len(rows)), layout="constrained")
        values = [100 * row["gap_closed"] for row in rows]
        errors = [_both_sides(row.get("error", 0)) for row in rows]
        places = range(len(rows))
        axes.barh(places, values, height=0.62, color=COLOURS[0])
        spread = list(zip(*errors, strict=True))
        if any(map(any, spread)):
            axes.errorbar(values, places, xerr=spread, fmt="none", ecolor="black", elinewidth=1.1, capsize=3)
        for place, value, (below, above) in zip(places, values, errors, strict=True):
            end = value + above if value >= 0 else value - below
            side, offset = ("left", 5) if value >= 0 else ("right", -5)
            place_of = {"textcoords": "offset points", "xytext": (offset, 0), "va": "center", "ha": side}
            axes.annotate(f"{value:.0f} %", (end, place), **place_of)
        axes.set_yticks(places, [row["label"] for row in rows])
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.margins(x=0.14)
        axes.set_xlabel("gap closed, % (0 = round-to-nearest PTQ, 100 = unquantized)")
        return save_figure(plt, figure, path)


def plot_token_curve(
    series: dict[str, Sequence[tuple[float, float] | tuple[float, float, float]]], path: str | Path
) -> Path | None:
    """Gap closed over training tokens (logarithmic), a line each of `series`; -> `path`.

    `series` maps a label to points (tokens > 0, gap closed as a fraction, and optionally half of the interval).
    ValueError without points.
    """
    for label, points in series.items():
        if not points or any(p[0] <= 0 for p in points):
            raise ValueError(f"{label!r}: a curve needs points with more than 0 tokens")
    if not series:
        raise ValueError("no series to plot; give at least one")
    plt = pyplot()
    if plt is None:
        return None
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        for i, (label, points) in enumerate(series.items()):
            points = sorted(points)
            look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 5.5}
            tokens, gaps = [p[0] for p in points], [100 * p[1] for p in points]
            half = [100 * p[2] if len(p) > 2 else 0.0 for p in points]
            axes.errorbar(tokens, gaps, half if any(half) else None, label=label, linewidth=1.5, capsize=3, **look)
        axes.set_xscale("log")
        low, high = axes.get_ylim()
        axes.set_ylim(min(0, low), max(104, high))
        axes.axhline(100, color="#555555", linestyle="--", linewidth=1.0)
        axes.annotate("unquantized", (1, 100), xycoords=("axes fraction", "data"), textcoords="offset points",
                      xytext=(0, -4), ha="right", va="top", color="#555555")  # fmt: skip
        axes.axhline(0, color="#555555", linestyle="--", linewidth=1.0)
        axes.annotate("PTQ", (1, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                      xytext=(0, 4), ha="right", va="bottom", color="#555555")  # fmt: skip
        axes.xaxis.set_major_formatter(_si_formatter())
        axes.set(xlabel="training tokens", ylabel="gap closed, %")
        if len(series) > 1:
            axes.legend()
        return save_figure(plt, figure, path)


def _si_formatter() -> Any:
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep=" ")


def _both_sides(error: Any) -> tuple[float, float]:
    """(below, above) in percent of an error given as one number or as two."""
    below, above = error if isinstance(error, tuple | list) else (error, error)
    return 100 * below, 100 * above


def save_figure(plt: Any, figure: Any, path: str | Path) -> Path:
    """Writes a figure as PNG, whole or not at all, and closes it; -> `path`."""
    from mimo_qat.provenance import atomic_write

    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")
    plt.close(figure)
    return Path(path)
