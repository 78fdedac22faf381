"""Figures: token counts and limits by hand, what is drawn read back from the axes, and life without matplotlib."""

import builtins
import json

import pytest

from mimo_qat.qat import plots

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def run_folder(tmp_path):
    """A finished run of 30 steps, logged every 10, evaluated at 20 and 30."""
    base = {"grad_norm": 1.0, "learning_rate": 1e-5, "tokens_per_s": 5e4, "flips": 10, "codes_changed": 0.01}
    rows = [
        {"step": step, "loss": 0.1, "kl": 0.1, "flip_fraction": fraction, "tokens": tokens, **base}
        for step, tokens, fraction in ((10, 100, 2e-4), (20, 200, 1e-4), (30, 50, 0.0))
    ]
    for row, kl in zip(rows[1:], (0.08, 0.06), strict=True):
        row["eval_kl"] = kl
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "qat.json").write_text('{"kl_rtn": 0.12}')
    return tmp_path


@pytest.fixture
def drawn(monkeypatch):
    """The axes of the figures that are saved, kept from being closed."""
    pytest.importorskip("matplotlib")
    kept = []
    save = plots.save_figure

    def keep(plt, figure, path):
        kept.append(figure.axes)
        figure.canvas.draw()
        return save(plt, figure, path)

    monkeypatch.setattr(plots, "save_figure", keep)
    return kept


def line(axes, label):
    found = next(line for line in axes.lines if line.get_label() == label)
    return list(found.get_xdata()), list(found.get_ydata())


def test_tokens_between_logged_steps_count(run_folder):
    assert [row["total_tokens"] for row in plots.read_metrics(run_folder)] == [1000, 3000, 3500]


@pytest.mark.parametrize("text, what", [(None, "no such file"), ("\n", "is empty")])
def test_no_metrics(tmp_path, text, what):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=what):
        plots.plot_run(tmp_path)


def test_curves_hold_the_metrics(run_folder, drawn):
    path = plots.plot_run(run_folder)
    assert path == run_folder / "curves.png" and path.read_bytes().startswith(PNG)
    kl, flips, rate, speed = drawn[0]
    assert line(kl, "training batch") == ([1000, 3000, 3500], [0.1, 0.1, 0.1])
    assert line(kl, "held out") == ([3000, 3500], [0.08, 0.06])
    assert line(kl, "held out, PTQ")[1] == [0.12, 0.12]
    assert line(flips, "flipped in this step") == ([1000, 3000], [2e-4, 1e-4])  # a logarithmic axis has no 0
    assert flips.get_ylim() == pytest.approx((1e-4, 1e-1))
    labels = {t.get_text() for t in flips.get_yticklabels()}
    assert {"0.01 %", "0.1 %", "1 %", "10 %"} <= labels
    assert list(rate.lines[0].get_ydata()) == [1e-5] * 3
    assert list(speed.lines[0].get_ydata()) == [5e4] * 3


def test_a_run_without_a_teacher_has_its_loss(run_folder, drawn):
    """`kl_weight` 0: no batch has a KL, the held-out rows do."""
    rows = [json.loads(row) for row in (run_folder / "metrics.jsonl").read_text().splitlines()]
    lines = [json.dumps({k: v for k, v in row.items() if k != "kl"}) for row in rows]
    (run_folder / "metrics.jsonl").write_text("\n".join(lines))
    plots.plot_run(run_folder)
    assert [line.get_label() for line in drawn[0][0].lines] == ["loss", "held out", "held out, PTQ"]


def test_a_run_that_goes_on_has_no_ptq_line(run_folder, drawn):
    (run_folder / "qat.json").unlink()
    plots.plot_run(run_folder)
    assert [line.get_label() for line in drawn[0][0].lines] == ["training batch", "held out"]


def test_bars_of_the_gap_closed(tmp_path, drawn):
    rows = [
        {"label": "a", "gap_closed": 0.5, "error": 0.1},
        {"label": "b", "gap_closed": 0.25, "error": (0.2, 0.05)},
        {"label": "c", "gap_closed": -0.1},
    ]
    assert plots.plot_gap_closed(rows, tmp_path / "gap.png").read_bytes().startswith(PNG)
    axes = drawn[0][0]
    assert [bar.get_width() for bar in axes.patches] == [50, 25, -10]
    assert [t.get_text() for t in axes.texts] == ["50 %", "25 %", "-10 %"]
    ends = [sorted(x for x, _ in segment) for segment in axes.collections[0].get_segments()]
    assert ends == [[40, 60], pytest.approx([5, 30]), [-10, -10]]


def test_token_curve(tmp_path, drawn):
    series = {"one": [(1e6, 0.4, 0.1), (1e5, 0.2, 0.05)], "two": [(1e5, -0.3)]}
    assert plots.plot_token_curve(series, tmp_path / "tokens.png").read_bytes().startswith(PNG)
    axes = drawn[0][0]
    assert axes.get_xscale() == "log"
    assert list(axes.lines[0].get_xdata()) == [1e5, 1e6] and list(axes.lines[0].get_ydata()) == [20, 40]
    low, high = axes.get_ylim()
    assert low < -30 and high > 100
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["one", "two"]


def test_nothing_to_plot(tmp_path):
    with pytest.raises(ValueError, match="no rows"):
        plots.plot_gap_closed([], tmp_path / "x.png")
    with pytest.raises(ValueError, match="no series"):
        plots.plot_token_curve({}, tmp_path / "x.png")
    with pytest.raises(ValueError, match="'a': a curve needs points"):
        plots.plot_token_curve({"a": [(0, 0.5)]}, tmp_path / "x.png")


def test_without_matplotlib(run_folder, monkeypatch, capsys):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert plots.plot_run(run_folder) is None
    assert plots.plot_gap_closed([{"label": "a", "gap_closed": 0.5}], run_folder / "x.png") is None
    assert plots.plot_token_curve({"a": [(1, 0.5)]}, run_folder / "x.png") is None
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert not list(run_folder.glob("*.png"))
