"""Figures of drafters; matplotlib is optional (mimo-qat[report]): without it a function prints one line."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mimo_qat.qat.plots import COLOURS, MARKERS, STYLE, pyplot, save_figure


def plot_survival(curves: Mapping[str, Sequence[float]], path: str | Path) -> Path | None:
    """How many drafts verifications accept: a line of P(accepted >= k), k = 1.., for each label; -> `path`.

    The area under a line, plus 1, is the acceptance length. ValueError without curves.
    """
    if not curves:
        raise ValueError("no survival curves to plot; give at least one")
    plt = pyplot()
    if plt is None:
        return None
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        for i, (label, survival) in enumerate(curves.items()):
            look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 4.5}
            name = f"{label}: {1 + sum(survival):.2f} tokens a verification"
            axes.plot(range(len(survival) + 1), [1.0, *survival], label=name, linewidth=1.4, **look)
        axes.set_ylim(0, 1.03)
        axes.set_xlim(0, None)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel="drafts", ylabel="verifications that accept at least so many")
        axes.legend()
        return save_figure(plt, figure, path)
