"""Figures and tables from records: the accuracy-against-latency curve of a sweep, the sensitivities of a model.

All of them are drawn from what is kept (points.csv, a report) and can be drawn again at any time:

    figures.plot_curve(figures.read_points("points.csv"), "curve.png")
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter, StrMethodFormatter
from matplotlib.transforms import Bbox

from spd.errors import UserError
from spd.results import line_columns

if TYPE_CHECKING:
    from spd.sensitivity import SensitivityReport

# Okabe and Ito's colours, told apart with any colour vision; black last, for many lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", ":", "-.")
MOST_LINES = 16
"""In one part of a figure: more cannot be told apart."""
Line = tuple[pd.DataFrame, dict[str, Any]]
"""The points of one line and how matplotlib shall draw it."""

_NEEDED = (
    "model",
    "tp_size",
    "strategy",
    "drop",
    "fraction_dropped",
    "status",
    "accuracy_mean",
    "accuracy_mean_stderr",
    "perplexity",
    "ttft_speedup_percent",
)
_STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "axes.axisbelow": True,
    "lines.markersize": 5.5,
    "errorbar.capsize": 2,
    "legend.frameon": False,
}


def read_points(path: str | Path) -> pd.DataFrame:
    """A sweep's points.csv (its columns: `spd.results.to_frame`).

    Raises:
        UserError: it is not there, or not such a table.
    """
    try:
        points = pd.read_csv(path, dtype={"dropped_blocks": str, "error": str, "key": str})
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        raise UserError(f"{path} cannot be read as a table of points: {error}") from error
    missing = [name for name in _NEEDED if name not in points]
    if missing:
        raise UserError(
            f"{path} is no points.csv of a sweep: it has no column {', '.join(missing)}; "
            "of an older one, type the sweep's command again, which takes finished points as they are."
        )
    return points


def plot_curve(points: pd.DataFrame, path: str | Path) -> None:
    """Draw a sweep as PNG: accuracy against time to first token, and accuracy and perplexity against blocks dropped.

    Dropped is a whole number of blocks: its fraction need not be what was asked for.

    One line for each model, tp size, strategy and whatever else was swept over (`spd.results.line_columns`); where they
    are many, a part of the figure for each model, and then each tp size. Points that failed are left out, and so is a
    panel for which nothing was measured.

    Args:
        points: rows as in points.csv (see `read_points`).
        path: of the PNG.

    Raises:
        UserError: no point is done, or none has anything to draw.
    """
    points = points[points["status"] == "done"].sort_values("drop")
    pages = [page for page in _pages(points) if page[["accuracy_mean", "perplexity"]].notna().any(axis=None)]
    if not pages:
        raise UserError("there is nothing to draw: no point is done and has an accuracy or a perplexity")
    with matplotlib.rc_context(_STYLE):
        heights = [4.3 + 0.2 * (len(list(_lines(page, points))) // _across(page)) for page in pages]
        figure = Figure(figsize=(9.0, sum(heights)), layout="constrained")
        FigureCanvasAgg(figure)
        parts = figure.subfigures(len(pages), 1, squeeze=False, height_ratios=heights)[:, 0]
        labelled = [_draw_page(part, page, points) for part, page in zip(parts, pages, strict=True)]
        figure.draw_without_rendering()  # the layout is settled by this: places on the page are known from here on
        figure.set_layout_engine("none")
        for axes, lines, quality in filter(None, labelled):
            _label_points(axes, lines, quality)
        _save(figure, path)


def _pages(points: pd.DataFrame) -> list[pd.DataFrame]:
    """The points of each part of the figure: as few parts as have no more than `MOST_LINES` lines each, if any do.

    They are parted by what varies first, models and then tp sizes, but never by what varies last: lines of one part can
    be compared.
    """
    varying = _varying(points)
    for number in range(max(1, len(varying))):
        pages = [page for _, page in points.groupby(varying[:number])] if number else [points]
        if max(len(page[varying].drop_duplicates()) for page in pages) <= MOST_LINES:
            break
    return pages


def _across(page: pd.DataFrame) -> int:
    """Columns of a part's legend: values of what varies first, as far as there is room."""
    varying = _varying(page)
    return min(6, int(page[varying[0]].nunique())) if varying else 1


def _draw_page(figure: SubFigure, points: pd.DataFrame, every: pd.DataFrame) -> tuple[Axes, list[Line], str] | None:
    """Draws one part; returns the panel whose points there is room to label, its lines and what it shows, or None."""
    has = {name: bool(points[name].notna().any()) for name in ("accuracy_mean", "perplexity", "ttft_speedup_percent")}
    quality = "accuracy_mean" if has["accuracy_mean"] else "perplexity"
    against_drop = [name for name in ("accuracy_mean", "perplexity") if has[name]]
    lines = list(_lines(points, every))
    latency_panel = None
    if has["ttft_speedup_percent"]:
        grid = figure.add_gridspec(len(against_drop), 2, width_ratios=(5, 4))
        latency_panel = figure.add_subplot(grid[:, 0])
        panels = [figure.add_subplot(grid[row, 1]) for row in range(len(against_drop))]
    else:
        panels = list(figure.subplots(1, len(against_drop), squeeze=False)[0])
    for line, style in lines:
        for panel, name in zip(panels, against_drop, strict=True):
            _draw(panel, line, "fraction_dropped", name, style)
        if latency_panel is not None:
            _draw(latency_panel, line, "ttft_speedup_percent", quality, style)
    for panel, name in zip(panels, against_drop, strict=True):
        _label_quality(panel, name, points[name])
        panel.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        panel.set_xlim(-0.04, 1.04)
        if latency_panel is None or panel is panels[-1]:
            panel.set_xlabel("blocks dropped")
        else:
            panel.tick_params(labelbottom=False)
    if latency_panel is not None:
        latency_panel.set_xlabel("time to first token saved (%)")
        _label_quality(latency_panel, quality, points[quality])
        latency_panel.axvline(0, color="#999999", linewidth=0.8, zorder=0.5)
    figure.suptitle(_title(points), fontsize=11)
    labelled = latency_panel is not None and len(lines) <= 3  # more would not find room
    notes = _notes(points, has, labelled)
    if len(lines) > 1:
        handles = [Line2D([], [], **style) for _, style in lines]
        place: dict[str, Any] = {"loc": "outside lower center", "ncols": _across(points)}
        figure.legend(handles=handles, **place, fontsize=9, title=notes, title_fontproperties={"size": 8})
    else:
        figure.supxlabel(notes, fontsize=8, color="#666666")
    return (latency_panel, lines, quality) if latency_panel is not None and labelled else None


def plot_sensitivity(report: "SensitivityReport", path: str | Path, tau1: float = 0.05, tau2: float = 10.0) -> Figure:
    """Draw the sensitivity of every block as PNG, coloured by its class under the thresholds `tau1` and `tau2`.

    Returns what is drawn.
    """
    colours = {"ISB": COLOURS[2], "SB": COLOURS[4], "ESB": COLOURS[1]}
    meaning = {"ISB": "in-sensitive", "SB": "sensitive", "ESB": "extremely sensitive"}
    classes = report.classes(tau1, tau2)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.0, 3.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for name in colours:
            blocks = [block for block, its in enumerate(classes) if its == name]
            if blocks:
                heights = [report.sensitivities[block] for block in blocks]
                axes.bar(
                    blocks,
                    heights,
                    color=colours[name],
                    label=f"{meaning[name]} ({name}): {len(blocks)} of {report.num_blocks}",
                )
        for name, tau in (("tau1", tau1), ("tau2", tau2)):
            if tau <= 2 * max(report.sensitivities):  # one far above all bars would only squeeze them
                axes.axhline(tau, color="#666666", linewidth=0.9, linestyle="--")
                place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "center"}
                axes.annotate(f"{name} = {tau:g}", (0.995, tau), **place, bbox={"fc": "white", "ec": "none", "pad": 1})
        # Sensitivities span decades and may be below 0: linear around 0, logarithmic beyond.
        low, high = min(report.sensitivities), max(*report.sensitivities, tau1)
        axes.set_yscale("symlog", linthresh=max(tau1, 1e-3))
        axes.set_ylim(1.3 * low if low < 0 else 0, 2 * high)
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.axhline(0, color="#666666", linewidth=0.8)
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("block")
        axes.set_ylabel("added perplexity")
        axes.set_xticks(range(0, report.num_blocks, 1 + report.num_blocks // 24))
        axes.set_title(
            f"sensitivity of each block, order {report.order}, tp {report.tp_size} "
            f"(perplexity with nothing dropped {report.dense_perplexity:.3f})"
        )
        axes.legend(loc="best", fontsize=9)
        _save(figure, path)
    return figure


def _varying(points: pd.DataFrame) -> list[str]:
    return [name for name in line_columns(points) if points[name].nunique() > 1]


def _words(name: str, value: Any) -> str:
    """A column's value in a label: a name speaks for itself, a number does not."""
    if name in ("model", "strategy"):
        return str(value)
    return f"tp {value}" if name == "tp_size" else f"{name}={value}"


def _lines(points: pd.DataFrame, every: pd.DataFrame) -> Iterator[Line]:
    """Each line's points and how it looks: colour and marker tell apart what varies first, the dashes all the rest.

    A value looks the same in all parts of a figure, whose points are `every`.
    """
    varying = _varying(points)
    lines: list[tuple[Any, ...]] = [()]
    if varying:
        lines = sorted(set(points[varying].itertuples(index=False, name=None)))
    channels = (
        ("color", COLOURS, slice(0, 1)),
        ("marker", MARKERS, slice(1, 2)),
        ("linestyle", DASHES, slice(2, None)),
    )
    for line in lines:
        style: dict[str, Any] = {}
        for look, choices, part in channels:
            values = sorted(set(every[varying[part]].itertuples(index=False, name=None))) if varying[part] else [()]
            style[look] = choices[values.index(line[part]) % len(choices)]
        if len(varying) == 1:  # markers are free to tell more apart than there are colours
            place = sorted(every[varying[0]].unique()).index(line[0])
            style["marker"] = MARKERS[place // len(COLOURS) % len(MARKERS)]
        mask = np.ones(len(points), dtype=bool)
        for name, value in zip(varying, line, strict=True):
            mask &= points[name] == value
        yield points[mask], style | {"label": ", ".join(map(_words, varying, line))}


def _draw(axes: Axes, line: pd.DataFrame, x: str, y: str, style: dict[str, Any]) -> None:
    line = line.dropna(subset=[x, y])
    if line.empty:
        return
    bars: dict[str, Any] = {}
    if y == "accuracy_mean":
        bars["yerr"] = line["accuracy_mean_stderr"].astype(float)
    if f"{x}_low" in line:
        below, above = line[x] - line[f"{x}_low"], line[f"{x}_high"] - line[x]
        bars["xerr"] = np.array([below, above], dtype=float).clip(min=0)
    axes.errorbar(line[x], line[y], **bars, **style, elinewidth=0.8, linewidth=1.6)


def _label_quality(axes: Axes, name: str, values: pd.Series) -> None:
    if name == "accuracy_mean":
        axes.set_ylabel("mean accuracy")
        return
    axes.set_ylabel("perplexity")
    if values.max() > 5 * values.min():
        axes.set_yscale("log")


def _title(points: pd.DataFrame) -> str:
    words = [_words(name, points[name].iloc[0]) for name in line_columns(points) if name not in _varying(points)]
    return "Dropping sync points" + (f": {', '.join(words)}" if words else "")


def _notes(points: pd.DataFrame, has: dict[str, bool], labelled: bool) -> str:
    notes = []
    if has["accuracy_mean"] and points["accuracy_mean_stderr"].notna().any():
        notes.append("± one standard error")
    if labelled:
        notes.append("labels: blocks dropped")
    if "ttft_speedup_percent_low" in points and points["ttft_speedup_percent_low"].notna().any():
        stated = points["latency_confidence"].dropna().unique() if "latency_confidence" in points else []
        confidence = " or ".join(f"{100 * share:.4g} %" for share in sorted(stated))
        notes.append(f"across: {confidence} interval of the median over launches".replace("  ", " "))
    return "; ".join(notes)


def _label_points(axes: Axes, lines: list[Line], quality: str) -> None:
    """Write each point's fraction of blocks dropped beside it, where it covers no line, error bar or other label and no
    other point is nearer; else not at all.

    The panels against the drop fraction show the same points.
    """
    drawn = [line.get_xydata() for line in axes.lines if line.get_linestyle() != "None"]  # without the bars' caps
    for bars in axes.collections:
        if isinstance(bars, LineCollection):
            drawn += [segment for segment in bars.get_segments() if len(segment)]
    covered = np.concatenate([_dots(axes.transData.transform(path)) for path in drawn])
    inside = axes.get_window_extent()
    labels: list[Bbox] = []
    near = [(6, 4), (-6, -4), (6, -4), (-6, 4), (0, 8), (0, -8)]  # points, preferred first
    places = near if len(lines) > 1 else near + [(2 * dx, 2 * dy) for dx, dy in near]  # else beside the wrong line
    align = {1: ("left", "bottom"), -1: ("right", "top"), 0: ("center", "center")}
    done = [(line.dropna(subset=["ttft_speedup_percent", quality]), style["color"]) for line, style in lines]
    labelled = [(colour, point) for line, colour in done for _, point in line.iterrows()]
    points = axes.transData.transform([(point["ttft_speedup_percent"], point[quality]) for _, point in labelled])
    for its, (colour, point) in enumerate(labelled):
        for dx, dy in places:
            label = axes.annotate(
                f"{100 * point['fraction_dropped']:.3g}%",
                (point["ttft_speedup_percent"], point[quality]),
                xytext=(dx, dy),
                textcoords="offset points",
                ha=align[int(np.sign(dx))][0],
                va=align[int(np.sign(dy))][1],
                fontsize=8.5,
                color=colour,
            )
            box = label.get_window_extent()
            fits = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
            hits = ((covered > box.min) & (covered < box.max)).all(axis=1).any()
            away = np.hypot(*(points - np.mean([box.min, box.max], axis=0)).T)
            if fits and not hits and away.argmin() == its and not any(box.overlaps(other) for other in labels):
                labels.append(box)
                break
            label.remove()


def _dots(path: np.ndarray) -> np.ndarray:
    """Places [n, 2] every two pixels along a path [m, 2] on the page."""
    steps = [np.linspace(a, b, 2 + int(np.hypot(*(b - a)) // 2)) for a, b in itertools.pairwise(path)]
    return np.concatenate([path, *steps])


def _save(figure: Figure, path: str | Path) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.part")  # whole or not at all
    figure.savefig(draft, dpi=150, format="png")
    draft.replace(path)
