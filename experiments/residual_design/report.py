"""The figure and the README's tables of the ablation, from its table and its record."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from spd.figures import COLOURS

BEGIN, END = "<!-- written by ablation.py: begin -->", "<!-- written by ablation.py: end -->"
COLOUR = dict(zip(("before", "absent", "after"), COLOURS, strict=False))
DASHES = {"X + P_i + b": ("o", "-"), "P_i + b": ("s", "--")}
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "axes.axisbelow": True,
    "lines.markersize": 3.5,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
}


def plot(table: pd.DataFrame, record: dict[str, Any], path: Path) -> Figure:
    """Draws perplexity of rank 0 against dropped blocks: a panel for each model and tp size, a line for each design.
    Returns what is drawn."""
    models, tp_sizes = table["model"].unique(), table["tp_size"].unique()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 6.6), layout="constrained")
        panels = figure.subplots(len(tp_sizes), len(models), sharex=True, sharey=True, squeeze=False)
        for (row, tp_size), (column, model) in itertools.product(enumerate(tp_sizes), enumerate(models)):
            axes = panels[row][column]
            its = table[(table["model"] == model) & (table["tp_size"] == tp_size)]
            lines = its.groupby(["mlp_input", "attention_residual"], sort=False)
            for design, ((mlp_input, residual), line) in enumerate(lines):
                marker, dashes = DASHES[mlp_input]
                style = {"color": COLOUR[residual], "marker": marker, "linestyle": dashes}
                label = f"MLP sees ${mlp_input}$, $P_i$ {residual}"
                label += " the sync point" * (residual != "absent") + " (the method)" * (design == 0)
                axes.plot(line["num_dropped"], line["perplexity"], **style, label=label, zorder=10 - design)
            # Above this a model predicts worse than one that finds all tokens equally likely.
            vocabulary = next(run["vocabulary"] for run in record["runs"] if run["model"] == model)
            axes.axhline(vocabulary, color="#666666", linewidth=0.9, linestyle=":")
            axes.annotate("uniform guess", (0, 1.15 * vocabulary), fontsize=8, color="#666666")
            axes.set(yscale="log", title=f"{model}, tp {tp_size}", xticks=range(0, its["num_dropped"].max() + 1, 2))
            if column == 0:
                axes.set_ylabel("perplexity")
            if row == len(tp_sizes) - 1:
                axes.set_xlabel("dropped blocks, least sensitive first")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8.5)
        figure.savefig(path, dpi=150)
    return figure


def write_tables(table: pd.DataFrame, record: dict[str, Any], readme: Path) -> None:
    """Replaces what stands between the two marks in the README."""
    text = readme.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    readme.write_text("\n".join([before + BEGIN, "", *_lines(table, record), "", END + after]))


def _lines(table: pd.DataFrame, record: dict[str, Any]) -> Iterator[str]:
    last = table["num_dropped"].max()
    for count in (last, last * 3 // 4):
        designs = table[["mlp_input", "attention_residual"]].drop_duplicates().itertuples(index=False, name=None)
        heads = ["model", "tp", "nothing dropped", *(f"`{seen}`, {residual}" for seen, residual in designs)]
        yield from (f"**{count} of {last} blocks dropped**", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|")
        for (model, tp_size), its in table.groupby(["model", "tp_size"], sort=False):
            chosen = its[its["num_dropped"] == count]
            dense = its.loc[its["num_dropped"] == 0, "perplexity"].iloc[0]
            yield f"| {model} | {tp_size} | {_number(dense)} | {' | '.join(_cells(chosen))} |"
        yield ""
    ratios = _next_best_over_method(table)
    yield (
        "Over models, tp sizes and numbers of dropped blocks, the method has the lowest perplexity in "
        f"{sum(ratio > 1 for ratio in ratios)} of {len(ratios)} cases\nwith anything dropped. The best of the other "
        f"five has {min(ratios):.3f} to {max(ratios):.1f} times its perplexity (median {median(ratios):.2f}).\n"
    )
    measured, hardware = record["environment"], record["environment"]["hardware"]
    versions = measured["versions"]
    yield (
        f"Measured on {measured['started'][:10]} on {record['threads']} thread ({hardware['cpu']}, "
        f"{hardware['cores']} cores), torch {versions['torch']},\ntransformers {versions['transformers']}, "
        f"commit {measured['git_commit'][:7]}; the whole took {measured['seconds'] / 60:.0f} minutes, "
        f"{record['cpu_seconds'] / 60:.0f} of them computing."
    )


def _next_best_over_method(table: pd.DataFrame) -> list[float]:
    """The lowest perplexity of the other designs over the method's, wherever anything is dropped."""
    dropped = table[table["num_dropped"] > 0]
    ratios = []
    for _, rows in dropped.groupby(["model", "tp_size", "num_dropped"], sort=False):
        method, *others = rows["perplexity"]  # it is the first of the designs
        ratios.append(min(others) / method)
    return ratios


def _cells(rows: pd.DataFrame) -> Iterator[str]:
    lowest = rows["perplexity"].min()
    for row in rows.itertuples():
        cell = _number(row.perplexity)
        cell = f"**{cell}**" if row.perplexity == lowest else cell
        yield f"{cell} ({_number(row.perplexity_over_ranks)})" if row.attention_residual == "after" else cell


def _number(perplexity: float) -> str:
    return f"{perplexity:.3f}" if perplexity < 100 else f"{perplexity:.0f}"
