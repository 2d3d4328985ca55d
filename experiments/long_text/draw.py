"""The figures of experiments/long_text from long_text.csv: python -m experiments.long_text.draw"""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from spd.figures import COLOURS, MARKERS

HERE = Path(__file__).parent
PANELS = {
    "loss": ("position in the text", "perplexity"),
    "loss_difference": ("position in the text", "loss above dense, nats"),
    "next": ("tokens continued", "next token is the dense one"),
    "same": ("tokens continued", "still the dense continuation"),
}


def draw(rows: pd.DataFrame, path: Path) -> Figure:
    """A column a model, a row a measure, of one drop fraction and the dense model; bands are one standard error over
    windows. Returns what is drawn."""
    models = list(rows["model"].unique())
    strategies = sorted(rows["strategy"].unique(), key=lambda name: name == "dense")  # which is drawn last, in black
    figure = Figure(figsize=(4.2 * len(models), 2.9 * len(PANELS)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(PANELS), len(models), squeeze=False, sharey="row")
    for row, (what, (x, y)) in enumerate(PANELS.items()):
        measured = rows[rows["what"] == what]
        panels[row, 0].set_ylabel(y)
        for column, model in enumerate(models):
            axes = panels[row, column]
            for k, strategy in enumerate(strategies):
                line = measured[(measured["model"] == model) & (measured["strategy"] == strategy)]
                colour = COLOURS[-1] if strategy == "dense" else COLOURS[k]
                style = {"color": colour, "marker": MARKERS[k % len(MARKERS)], "markersize": 4, "linewidth": 1.4}
                shown = [line["value"], line["value"] - line["stderr"], line["value"] + line["stderr"]]
                if what == "loss":
                    shown = [np.exp(loss) for loss in shown]
                axes.plot(line["position"], shown[0], **style, label=strategy)
                axes.fill_between(line["position"], *shown[1:], color=colour, alpha=0.2, linewidth=0)
            axes.set_title(model if row == 0 else "", fontsize=10)
            axes.set_xlabel(x)
            axes.grid(color="#e5e5e5")
            axes.spines[["top", "right"]].set_visible(False)
            if what == "loss_difference":
                axes.axhline(0, color="#555555", linewidth=0.8)
            if what == "same":  # as far as any continuation goes on
                axes.set_xlim(0, measured.loc[measured["value"] > 0.002, "position"].max() + 32)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(strategies), frameon=False)
    figure.savefig(path, dpi=110)
    return figure


def ends(rows: pd.DataFrame) -> str:
    """The README's table: first and last bin of every measure, everything dropped."""
    lines = [
        "| model | strategy | loss above dense, first, last tokens | next token | still the same |",
        "|---" * 5 + "|",
    ]
    full = rows[rows["drop"] == rows["drop"].max()]
    for (model, strategy), part in full.groupby(["model", "strategy"], sort=False):
        cells = []
        for what in list(PANELS)[1:]:
            bins = part[part["what"] == what]
            cells.append(", ".join(f"{bin.value:.3f} ± {bin.stderr:.3f}" for bin in (bins.iloc[0], bins.iloc[-1])))
        lines.append(f"| {model} | `{strategy}` | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    table = pd.read_csv(HERE / "long_text.csv")
    dense = table["strategy"] == "dense"
    for drop, part in table[~dense].groupby("drop"):
        draw(pd.concat([part, table[dense]]), HERE / f"long_text_{100 * drop:g}.png")
    print(ends(table))
