"""The figure and the tables of experiments/recovery, from the sweep's points.csv.

    python run.py experiment=recovery tracker=none
    python -m experiments.recovery.draw runs/sweeps/recovery/points.csv

copies the points here, draws recovery.png and prints the tables of the README.
"""

import argparse
import shutil
from pathlib import Path

import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from spd.figures import COLOURS, MARKERS, read_points

HERE = Path(__file__).parent
STRATEGIES = ["zs", "zs_b2b", "zs_b2b_hg", "zs_correction", "zs_correction_b2b"]


def over_seeds(points: pd.DataFrame) -> pd.DataFrame:
    """One row a model, tp size, strategy and drop fraction: means over the calibration seeds, and their range.

    `accuracy_stderr` is lm-eval's standard error of one evaluation: all seeds answer the same items, so it does not
    shrink with their number. `ratio` is the perplexity over that of the dense model on the same held-out windows, which
    the seed draws too.
    """
    line = ["model", "tp_size", "strategy", "seed"]
    dense = points[points["drop"] == 0].set_index(line)["perplexity"].rename("dense")
    points = points.join(dense, on=line)
    points["ratio"] = points["perplexity"] / points["dense"]
    return (
        points.groupby(["model", "tp_size", "strategy", "drop"])
        .agg(
            fraction_dropped=("fraction_dropped", "first"),
            accuracy=("accuracy_mean", "mean"),
            accuracy_low=("accuracy_mean", "min"),
            accuracy_high=("accuracy_mean", "max"),
            accuracy_stderr=("accuracy_mean_stderr", "mean"),
            perplexity=("perplexity", "mean"),
            ratio=("ratio", "mean"),
            ratio_low=("ratio", "min"),
            ratio_high=("ratio", "max"),
            seeds=("accuracy_mean", "size"),
        )
        .reset_index()
    )


def everything_dropped(rows: pd.DataFrame) -> str:
    """The README's table: every block dropped, accuracy in %, the share of ZS's loss that is won back, perplexity."""
    lines = ["| model | tp | strategy | accuracy | won back | perplexity | over dense |", "|---" * 7 + "|"]
    for (model, tp_size), part in rows.groupby(["model", "tp_size"]):
        dense = part[(part["drop"] == 0) & (part["strategy"] == "zs")].iloc[0]
        full = part[part["drop"] == 1].set_index("strategy")
        zs = full.loc["zs"]
        lines.append(f"| {model} | {tp_size} | nothing dropped | {_accuracy(dense)} | | {dense['perplexity']:.3f} | |")
        for strategy in STRATEGIES:
            if strategy not in full.index:
                lines.append(f"| | | `{strategy}` | not measured | | | |")
                continue
            row = full.loc[strategy]
            back = (row["accuracy"] - zs["accuracy"]) / (dense["accuracy"] - zs["accuracy"])
            share = "" if strategy == "zs" else f"{100 * back:.0f} %"
            lines.append(
                f"| | | `{strategy}` | {_accuracy(row)} | {share} | {row['perplexity']:.3f} | "
                f"{row['ratio']:.3f} [{row['ratio_low']:.3f}, {row['ratio_high']:.3f}] |"
            )
    return "\n".join(lines)


def _accuracy(row: pd.Series) -> str:
    low, high = 100 * row["accuracy_low"], 100 * row["accuracy_high"]
    return f"{100 * row['accuracy']:.1f} ± {100 * row['accuracy_stderr']:.1f} [{low:.1f}, {high:.1f}]"


def draw(rows: pd.DataFrame, path: Path) -> None:
    """Accuracy and perplexity against the fraction of blocks dropped: a column a model, a pair of rows a tp size."""
    models, sizes = rows["model"].unique(), sorted(rows["tp_size"].unique())
    figure = Figure(figsize=(4.2 * len(models), 3.0 * 2 * len(sizes)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2 * len(sizes), len(models), squeeze=False, sharex=True)
    for column, model in enumerate(models):
        for row, tp_size in enumerate(sizes):
            part = rows[(rows["model"] == model) & (rows["tp_size"] == tp_size)]
            for what, axes in zip(("accuracy", "ratio"), panels[2 * row : 2 * row + 2, column], strict=True):
                for k, strategy in enumerate(STRATEGIES):
                    line = part[part["strategy"] == strategy].sort_values("drop")
                    style = {"color": COLOURS[k], "marker": MARKERS[k], "markersize": 4, "linewidth": 1.4}
                    axes.plot(line["fraction_dropped"], line[what], **style, label=strategy)
                    band = (line[f"{what}_low"], line[f"{what}_high"])
                    axes.fill_between(line["fraction_dropped"], *band, color=COLOURS[k], alpha=0.2, linewidth=0)
                axes.grid(color="#e5e5e5")
                axes.spines[["top", "right"]].set_visible(False)
                if what == "ratio":
                    axes.set_yscale("log")
                    axes.yaxis.set_major_formatter("{x:g}")
                    axes.yaxis.set_minor_formatter("{x:g}")
                    axes.tick_params(axis="y", which="both", labelsize=8)
                else:
                    axes.set_title(f"{model}, tp {tp_size}", fontsize=10)
                if column == 0:
                    axes.set_ylabel("mean accuracy" if what == "accuracy" else "perplexity / dense")
    for axes in panels[-1]:
        axes.set_xlabel("blocks dropped")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(STRATEGIES), frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("points", type=Path)
    given = parser.parse_args().points
    if given.resolve() != (HERE / "points.csv").resolve():
        shutil.copy(given, HERE / "points.csv")
    table = over_seeds(read_points(HERE / "points.csv"))
    draw(table, HERE / "recovery.png")
    print(everything_dropped(table))
