"""The figures of a folder of experiments.gpu_latency.measure: python -m experiments.gpu_latency.draw FOLDER [MODEL]

speedup.png: what dropping saves, beside the ceilings. timeline.png: the kernels of one block of a model (llama2_7b),
TP and SPD, batch 1.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from experiments.gpu_latency.measure import phase_of
from spd.figures import COLOURS, MARKERS

CEILING = "no attention all-reduce"
KINDS = {"all-reduce": COLOURS[1], "matrix product": COLOURS[0], "attention": COLOURS[2], "the rest": COLOURS[5]}


def draw_speedups(rows: pd.DataFrame, path: Path) -> Figure:
    """A column a phase, a row a tp size and interconnect; lines are models, each with its ceiling.

    Returns what is drawn.
    """
    rows = rows.fillna({"decode_at": 0})
    phases = rows[["metric", "batch_size", "prompt_length", "decode_at"]].drop_duplicates()
    links = list(rows[["tp_size", "interconnect"]].drop_duplicates().itertuples(index=False, name=None))
    models = list(rows["model"].unique())
    figure = Figure(figsize=(2.9 * len(phases), 2.7 * len(links) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(links), len(phases), squeeze=False, sharex=True, sharey="row")
    for column, phase in enumerate(phases.itertuples(index=False)):
        of_phase = rows.merge(pd.DataFrame([phase]))
        for row, (tp_size, link) in enumerate(links):
            axes, of_row = panels[row, column], (of_phase["tp_size"] == tp_size) & (of_phase["interconnect"] == link)
            for k, model in enumerate(models):
                draw_saved(axes, of_phase[of_row & (of_phase["model"] == model)], k, model)
            panel(axes)
            if row == 0:
                axes.set_title(_phase(phase), fontsize=10)
            if column == 0:
                axes.set_ylabel(f"tp {tp_size}, {link}: saved, %")
            if row == len(links) - 1:
                axes.set_xlabel("blocks dropped, %")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(
        [*handles, Line2D([], [], color="#555555", linewidth=2.5)],
        [*labels, CEILING],
        loc="outside lower center",
        ncols=len(handles) + 1,
        frameon=False,
    )
    figure.savefig(path, dpi=110)
    return figure


def _phase(phase: Any) -> str:
    return f"{phase_of(phase.metric, phase.prompt_length, phase.decode_at)}, batch {phase.batch_size}"


def draw_saved(axes: Axes, rows: pd.DataFrame, k: int, label: str, linestyle: str = "-") -> Any:
    """Percent saved by percent of blocks dropped, of one phase, model and interconnect, in the `k`-th colour and with
    its marker; at the right edge the ceiling. Returns what a legend shows."""
    arms = rows[rows["drop"].notna()].sort_values("drop")
    saved = arms["speedup_percent_median"]
    spread = [saved - arms["speedup_percent_low"], arms["speedup_percent_high"] - saved]
    style: dict[str, Any] = {"color": COLOURS[k], "marker": MARKERS[k % len(MARKERS)], "linestyle": linestyle}
    for most in rows.loc[rows["arm"] == CEILING, "speedup_percent_median"]:
        axes.plot([101, 106], [most, most], color=COLOURS[k], linewidth=2.5, solid_capstyle="butt")
    return axes.errorbar(
        100 * arms["drop"], saved, yerr=spread, label=label, capsize=2, markersize=4, linewidth=1.4, **style
    )


def panel(axes: Axes) -> None:
    """What is behind the lines of a panel."""
    axes.axhline(0, color="#555555", linewidth=0.8)
    axes.grid(color="#e5e5e5")
    axes.spines[["top", "right"]].set_visible(False)


def kind_of(kernel: dict[str, Any]) -> str:
    """Which of `KINDS` a kernel is, by its name."""
    if kernel["communicates"]:
        return "all-reduce"
    name = kernel["name"].lower()
    if "flex_attention" in name:
        return "attention"
    if name.startswith("triton_poi"):  # elementwise, whatever else it stands beside and so has in its name
        return "the rest"
    # In decoding attention is Triton kernels: scores (a sum over the transposed queries), softmax, and its product.
    attention = ("flash", "fmha", "attention", "cudnn_generated", "softmax", "sum_transpose")
    products = ("gemm", "nvjet", "cutlass", "gemv", "splitk")
    if any(word in name for word in attention):
        return "attention"
    # Triton's with one token: a reduction over a transposed weight; elementwise kernels have the products' names too.
    triton = name.startswith(("triton_red", "triton_per")) and "_mm_" in name and "_t_" in name
    return "matrix product" if triton or any(word in name for word in products) else "the rest"


def draw_timelines(found: list[dict[str, Any]], path: Path) -> Figure:
    """A panel a session and phase: the kernels of a TP block over those of an SPD block, in microseconds.

    Sessions are those of `spd.gpu.latency`, each with its "model". Returns what is drawn.
    """
    panels = [
        (session, metric, arms)
        for session in found
        for metric, arms in (session["timeline"][0] or {}).items()
        if len(arms) == 2 and all(arms.values())
    ]
    if not panels:
        raise SystemExit(f"{path.name}: there is no whole trace of a block to draw")
    figure = Figure(figsize=(11, 1.5 * len(panels) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (session, metric, arms) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        for place, kernels in enumerate(arms.values()):
            for kernel in kernels:
                part = [(kernel["start_us"], kernel["end_us"] - kernel["start_us"])]
                axes.broken_barh(part, (-place - 0.35, 0.7), color=KINDS[kind_of(kernel)], edgecolor="white", lw=0.4)
            axes.text(kernels[-1]["end_us"], -place, f" {kernels[-1]['end_us']:.0f} us", va="center", fontsize=9)
        phase = phase_of(metric, session["prompt_length"], session["decode_at"])
        link = f"tp {session['tp_size']}, {session['interconnect']}"
        axes.set_title(f"{session['model']}, {link}, {phase}, batch {session['batch_size']}", fontsize=10)
        axes.set_yticks([0, -1], ["TP", "SPD"])
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.08)
        axes.set_xlim(left=0)
    axes.set_xlabel("microseconds")
    patches = [Patch(color=colour, label=kind) for kind, colour in KINDS.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(KINDS), frameon=False)
    figure.savefig(path, dpi=110)
    return figure


if __name__ == "__main__":
    folder, model = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "llama2_7b"
    draw_speedups(pd.read_csv(folder / "latency.csv", dtype={"arm": str}), folder / "speedup.png")
    entries = json.loads((folder / "sessions.json").read_text()).values()
    sessions = [
        session | {"model": model}
        for entry in entries
        if entry["model"] == model
        for session in entry["sessions"].values()
        if session["batch_size"] == 1
    ]
    draw_timelines(sessions, folder / "timeline.png")
