"""Figures of made-up sweeps: every shape of sweep can be drawn, and from the CSV as from memory."""

import itertools
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

from spd import figures
from spd.errors import UserError
from spd.figures import _lines, _notes, plot_curve, plot_sensitivity, read_points
from spd.plan import ModelIdentity
from spd.sensitivity import SensitivityReport

DROPS = (0.0, 0.25, 0.5, 0.75, 1.0)


def make_points(model: str = "ref_llama", tp_size: int = 4, drops: tuple[float, ...] = DROPS) -> pd.DataFrame:
    rows = []
    for drop in drops:
        saved = tp_size * drop
        rows.append(
            {
                "model": model,
                "tp_size": tp_size,
                "strategy": "zs",
                "drop": drop,
                "num_dropped": round(12 * drop),
                "fraction_dropped": round(12 * drop) / 12,
                "dropped_blocks": " ".join(map(str, range(round(12 * drop)))),
                "perplexity": 3 + 2 * drop**3,
                "accuracy_mean": 0.84 - 0.2 * drop**3,
                "accuracy_mean_stderr": 0.01,
                "ttft_speedup_percent": saved,
                "ttft_speedup_percent_low": saved - 1,
                "ttft_speedup_percent_high": saved + 2,
                "status": "done",
                "error": None,
                "key": "k",
            }
        )
    return pd.DataFrame(rows)


def without(points: pd.DataFrame, *names: str) -> pd.DataFrame:
    return points.assign(**{column: None for column in points if column.startswith(names)})


def with_a_failed_point() -> pd.DataFrame:
    points = make_points()
    measured = [name for name in points if name.startswith(("perplexity", "accuracy", "ttft"))]
    points.loc[2, measured] = None
    points.loc[2, ["status", "error"]] = ["failed", "the disk is full"]
    return points


def with_settings(**values: list[Any]) -> pd.DataFrame:
    """A sweep over further settings, in columns as `to_frame` puts them."""
    parts = []
    for one in itertools.product(*values.values()):
        part = make_points()
        for name, value in zip(values, one, strict=True):
            part.insert(part.columns.get_loc("drop"), name, value)
        parts.append(part)
    return pd.concat(parts)


SWEEPS: dict[str, pd.DataFrame] = {
    "one line": make_points(),
    "one point": make_points(drops=(0.0,)),
    "nine lines": pd.concat([make_points(model, tp) for model in ("a", "b", "c") for tp in (2, 4, 8)]),
    "two tp sizes, the same latency": pd.concat([make_points(tp_size=2), make_points(tp_size=2).assign(tp_size=4)]),
    "two orders": with_settings(**{"strategy.order": ["suffix", "alone"]}),
    "five settings": with_settings(seed=[0, 1], a=["none", "x"], b=[0.05, 1.0], c=[1, 2], d=["[]", "[a,b]"]),
    "no latency": without(make_points(), "ttft"),
    "latency without intervals": without(make_points(), "ttft_speedup_percent_"),
    "latency of some points": pd.concat([make_points(), without(make_points(tp_size=2), "ttft")]),
    "no accuracy": without(make_points(), "accuracy"),
    "accuracy without errors": without(make_points(), "accuracy_mean_stderr"),
    "no perplexity": without(make_points(), "perplexity"),
    "a failed point": with_a_failed_point(),
    "perplexity over decades": make_points().assign(perplexity=[3.0, 5, 50, 700, 9000]),
    "all at one place": make_points().assign(ttft_speedup_percent=0.0, accuracy_mean=0.5),
}


@pytest.mark.parametrize("name", SWEEPS)
def test_any_sweep_can_be_drawn(name: str, tmp_path: Path) -> None:
    plot_curve(SWEEPS[name], tmp_path / "new folder" / "curve.png")
    image = matplotlib.image.imread(tmp_path / "new folder" / "curve.png")
    assert image.shape[1] == 1350
    assert image.std() > 0.05, "an empty page"
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["curve.png"]


@pytest.mark.parametrize(
    "name", ["one line", "no latency", "a failed point", "nine lines", "two orders", "five settings"]
)
def test_the_figure_can_be_drawn_again_from_the_csv(name: str, tmp_path: Path) -> None:
    points = SWEEPS[name]
    points.to_csv(tmp_path / "points.csv", index=False)
    plot_curve(points, tmp_path / "first.png")
    plot_curve(read_points(tmp_path / "points.csv"), tmp_path / "again.png")
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "again.png").read_bytes()


def test_drawing_leaves_the_points_as_they_are(tmp_path: Path) -> None:
    points = make_points().sample(frac=1, random_state=0)
    before = points.copy()
    plot_curve(points, tmp_path / "curve.png")
    pd.testing.assert_frame_equal(points, before)


def test_every_line_looks_different_and_its_label_says_what_differs() -> None:
    def look(style: dict[str, Any]) -> tuple[Any, ...]:
        return style["color"], style["marker"], style["linestyle"]

    lines = list(_lines(SWEEPS["nine lines"], SWEEPS["nine lines"]))
    assert len({look(style) for _, style in lines}) == 9
    assert [style["label"] for _, style in lines][:3] == ["a, tp 2", "a, tp 4", "a, tp 8"]
    assert all(len(points) == len(DROPS) for points, _ in lines)


def test_many_lines_are_parted_by_model_and_then_tp_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    models = [make_points(model, tp) for model in ("b", "a") for tp in (8, 4)]
    many = pd.concat([page.assign(strategy=f"s{number}") for page in models for number in range(5)])
    seen: list[Any] = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: seen.append(figure))
    more = pd.concat([many, many.assign(strategy=many["strategy"] + "x")])
    for points, parts in ((many, ["a", "b"]), (more, ["a, tp 4", "a, tp 8", "b, tp 4", "b, tp 8"])):
        plot_curve(points, tmp_path / "curve.png")
        assert [part.get_suptitle() for part in seen.pop().subfigs] == [
            f"Dropping sync points: {part}" for part in parts
        ]
    sizes = pd.concat([make_points(tp_size=tp) for tp in range(1, 20)])
    plot_curve(sizes, tmp_path / "curve.png")
    assert len(seen.pop().subfigs) == 1, "parts of one line each would compare nothing"
    assert len({(style["color"], style["marker"]) for _, style in _lines(sizes, sizes)}) == 19


def test_a_strategy_looks_the_same_in_every_part_of_a_figure() -> None:
    a, b = (
        pd.concat([make_points(model).assign(strategy=f"s{n}") for n in of])
        for model, of in (("a", (1, 2)), ("b", (0, 2)))
    )
    looks = [{style["label"]: style["color"] for _, style in _lines(part, pd.concat([a, b]))} for part in (a, b)]
    assert looks[0]["s2"] == looks[1]["s2"]
    assert looks[0]["s1"] != looks[1]["s0"]


def test_whatever_a_sweep_was_over_parts_its_lines() -> None:
    lines = list(_lines(SWEEPS["two orders"], SWEEPS["two orders"]))
    assert [style["label"] for _, style in lines] == ["strategy.order=alone", "strategy.order=suffix"]
    assert [set(points["strategy.order"]) for points, _ in lines] == [{"alone"}, {"suffix"}]
    assert lines[0][1]["color"] != lines[1][1]["color"]
    labels = [style["label"] for _, style in _lines(SWEEPS["five settings"], SWEEPS["five settings"])]
    assert len(set(labels)) == 32
    assert labels[0] == "seed=0, a=none, b=0.05, c=1, d=[]"


def test_a_note_says_how_sure_the_intervals_are() -> None:
    has = {"accuracy_mean": True}
    five = make_points().assign(latency_confidence=0.9375)
    assert "across: 93.75 % interval of the median over launches" in _notes(five, has, False)
    both = pd.concat([five, make_points(tp_size=8).assign(latency_confidence=0.75)])
    assert "across: 75 % or 93.75 % interval" in _notes(both, has, False)
    assert "across: interval of" in _notes(make_points(), has, False), "a table from before it was said"


def test_nothing_to_draw_is_a_user_error(tmp_path: Path) -> None:
    for points in (make_points().assign(status="failed"), without(make_points(), "accuracy", "perplexity")):
        with pytest.raises(UserError, match="nothing to draw"):
            plot_curve(points, tmp_path / "curve.png")
    assert list(tmp_path.iterdir()) == []


def test_a_table_that_is_none_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"points\.csv cannot be read"):
        read_points(tmp_path / "points.csv")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(UserError, match="cannot be read as a table"):
        read_points(tmp_path / "empty.csv")
    (tmp_path / "other.csv").write_text("model,drop\na,0\n")
    with pytest.raises(UserError, match="no column tp_size, strategy, fraction_dropped, status"):
        read_points(tmp_path / "other.csv")


@pytest.mark.parametrize(
    "sensitivities", [[0.92, 0.02, -0.004, 0.0, 12.0], [0.0, 0.0, 0.0], [-0.1, -0.2], [0.001 * i for i in range(80)]]
)
def test_sensitivities_can_be_drawn(sensitivities: list[float], tmp_path: Path) -> None:
    source = ModelIdentity(model_type="llama", num_blocks=len(sensitivities), hidden_size=32, weights="cafe")
    report = SensitivityReport(
        order="suffix", tp_size=4, sensitivities=sensitivities, dense_perplexity=3.0, tokens=100, source=source
    )
    figure = plot_sensitivity(report, tmp_path / "sensitivity.png")
    assert matplotlib.image.imread(tmp_path / "sensitivity.png").std() > 0.02
    bars = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in figure.axes[0].patches}
    assert [bars[block] for block in range(len(sensitivities))] == sensitivities


def test_accuracy_has_its_standard_error_as_bars(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn: list[Any] = []
    errorbar = Axes.errorbar

    def watch(self: Axes, x: Any, y: Any, **options: Any) -> Any:
        drawn.append((list(y), list(options.get("yerr", []))))
        return errorbar(self, x, y, **options)

    monkeypatch.setattr(Axes, "errorbar", watch)
    points = make_points().assign(accuracy_mean_stderr=[0.01, 0.02, 0.03, 0.04, 0.05])
    plot_curve(points, tmp_path / "curve.png")
    of_accuracy = [bars for values, bars in drawn if values == points["accuracy_mean"].tolist()]
    assert of_accuracy
    assert all(bars == [0.01, 0.02, 0.03, 0.04, 0.05] for bars in of_accuracy)


def test_figures_show_the_blocks_that_are_dropped_and_not_what_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: seen.append(figure))
    plot_curve(make_points(drops=(0.0, 0.3, 0.625)), tmp_path / "curve.png")  # 4 and 8 of 12 blocks
    curve, accuracy, perplexity = seen[0].axes
    assert {text.get_text() for text in curve.texts} <= {"0%", "33.3%", "66.7%"}
    for axes in (accuracy, perplexity):
        assert np.allclose(axes.lines[0].get_xdata(), [0, 4 / 12, 8 / 12])


def test_a_label_is_nearer_to_its_own_point_than_to_any_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Two points almost upon each other, as in experiments/quickstart.
    points = make_points().assign(
        ttft_speedup_percent=[0, 9.5, 15.46, 15.43, 25], accuracy_mean=[0.93, 0.93, 0.921, 0.924, 0.76]
    )
    found: list[tuple[str, str]] = []
    save = figures._save

    def look(figure: Any, path: Any) -> None:
        axes = figure.axes[0]
        places = axes.transData.transform(points[["ttft_speedup_percent", "accuracy_mean"]])
        for text in axes.texts:
            box = text.get_window_extent()
            away = np.hypot(*(places - np.mean([box.min, box.max], axis=0)).T)
            found.append((text.get_text(), f"{100 * points['fraction_dropped'][away.argmin()]:.3g}%"))
        save(figure, path)

    monkeypatch.setattr(figures, "_save", look)
    plot_curve(points, tmp_path / "curve.png")
    assert len(found) >= 3
    assert all(label == nearest for label, nearest in found)
