"""The latency axis of the paper's figure 7, from every latency.csv here: python -m experiments.gpu_latency.figure7

The paper's definition: time to the first token, batch 1, 128 prompt tokens. A panel a model, a line a tp size and
interconnect; what was published stands beside it. Its other axis is the accuracy of `python run.py`.
"""

import math
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.gpu_latency.draw import CEILING, draw_saved, panel

HERE = Path(__file__).parent
LINKS = {"native": "-", "lbw": "--", "socket": ":"}
PUBLISHED = {"llama2_70b": (70, 19.7, "published: tp 8, lbw, A100")}
"""Model -> percent of blocks dropped, percent saved, and where (Kim et al., ICML 2025)."""


def draw(rows: pd.DataFrame, path: Path) -> Figure:
    """Percent of the time to the first token saved by fraction of blocks dropped; at the right edge the ceiling."""
    rows = rows[(rows["metric"] == "ttft_ms") & (rows["batch_size"] == 1) & (rows["prompt_length"] == 128)]
    models, sizes = list(rows["model"].unique()), sorted(rows["tp_size"].unique())
    across = min(4, len(models))
    figure = Figure(figsize=(3.1 * across, 2.9 * math.ceil(len(models) / across) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(math.ceil(len(models) / across), across, squeeze=False, sharex=True, sharey=True)
    handles: dict[str, Any] = {}
    for axes, model in zip(panels.flat, models, strict=False):
        for (size, link, gpu), line in rows[rows["model"] == model].groupby(["tp_size", "interconnect", "gpu"]):
            label = f"tp {size}, {link}, {gpu.removeprefix('NVIDIA ').split()[0]}"
            handles[label] = draw_saved(axes, line, sizes.index(size), label, LINKS[link])
        if model in PUBLISHED:
            dropped, saved, where = PUBLISHED[model]
            handles[where] = axes.scatter(dropped, saved, marker="*", s=90, color="black", zorder=3)
        axes.set_title(model, fontsize=10)
        panel(axes)
    for axes in panels.flat[len(models) :]:
        axes.set_visible(False)
    for axes in panels.flat[max(0, len(models) - across) : len(models)]:  # the lowest of each column
        axes.set_xlabel("blocks dropped, %")
        axes.tick_params(labelbottom=True)
    for axes in panels[:, 0]:
        axes.set_ylabel("time to first token saved, %")
    handles[f"ceiling: {CEILING}"] = Line2D([], [], color="#555555", linewidth=2.5)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
    return figure


def read(folder: Path) -> pd.DataFrame:
    """The rows of every machine.

    Raises:
        SystemExit: two folders have the same measurement.
    """
    rows = pd.concat([pd.read_csv(file, dtype={"arm": str}) for file in sorted(folder.glob("*/latency.csv"))])
    keys = ["model", "gpu", "tp_size", "interconnect", "batch_size", "prompt_length", "metric", "arm"]
    if len(twice := rows[rows.duplicated(keys)]):
        raise SystemExit(f"{', '.join(twice['model'].unique())}: in two folders of {folder}; keep one of them.")
    return rows


if __name__ == "__main__":
    draw(read(HERE), HERE / "figure7.png")
