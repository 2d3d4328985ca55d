"""Microseconds of an all-reduce by message size: NCCL's and symmetric memory's, by every interconnect.

    python -m experiments.gpu_latency.probe out --tp-size 2 --launches 3     # out/all_reduce.csv, .png, and the table

A row is one kind at one size in one launch, bfloat16, captured in a CUDA graph, the slowest rank's.
`bandwidth_gb_per_s` is bus bandwidth: bytes over time, times 2 (N - 1) / N. Rows of other interconnects and tp sizes in
the file stay.
"""

import argparse
import itertools
import os
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.gpu_latency.measure import here
from spd.errors import UserError
from spd.figures import COLOURS, MARKERS
from spd.gpu import all_reduce
from spd.gpu.interconnect import ENVIRONMENT
from spd.gpu.latency import check_gpus
from spd.gpu.rank import start
from spd.launch import Progress, run_ranks

TICKS = [2**power for power in range(13, 29, 3)]
BYTES = [2**power for power in (13, 14, 16, 18, 19, 20, 21, 22, 24, 26, 28)]


def measure_rank(settings: dict[str, Any], on_progress: Progress) -> dict[str, Any]:
    """As `run_ranks` calls it: {bytes: what `spd.gpu.all_reduce.choose` found}."""
    device = start(settings, int(os.environ["RANK"]))
    size = torch.bfloat16.itemsize
    _, found = all_reduce.choose(
        "auto",
        [asked // size for asked in settings["bytes"]],
        torch.bfloat16,
        device,
        direct_links=settings["interconnect"] == "native",
    )
    return {str(numbers * size): chosen for numbers, chosen in found.items()}


def probe(interconnect: str, devices: list[str], sizes: list[int], timeout_s: float) -> list[dict[str, Any]]:
    """A row for every kind that works here at every size, of one launch of a rank on each device."""
    ranks = len(devices)
    found = run_ranks(
        "experiments.gpu_latency.probe:measure_rank",
        {"devices": devices, "tp_size": ranks, "timeout_s": timeout_s, "interconnect": interconnect, "bytes": sizes},
        tp_size=ranks,
        timeout_s=timeout_s,
        environment=ENVIRONMENT[interconnect],
    )
    return [
        {
            "tp_size": ranks,
            "interconnect": interconnect,
            "bytes": int(size),
            "kind": kind,
            "us": us,
            "bandwidth_gb_per_s": round(int(size) / us * 2 * (ranks - 1) / ranks / 1e3, 3),
        }
        for size, chosen in found.items()
        for kind, us in chosen["us"].items()
    ]


def lines_of(rows: pd.DataFrame) -> pd.DataFrame:
    """Microseconds by size, a column for each kind over each interconnect: median, lowest and highest of launches."""
    by = ["tp_size", "interconnect", "kind", "bytes"]
    return rows.groupby(by, sort=False)["us"].agg(["median", "min", "max"]).reset_index()


def table(rows: pd.DataFrame) -> str:
    """Microseconds by size as Markdown, a column for each kind over each interconnect."""
    lines = lines_of(rows)
    lines["line"] = lines["interconnect"] + " " + lines["kind"]
    lines["shown"] = [f"{us:.0f}" if us >= 100 else f"{us:.1f}" for us in lines["median"]]
    wide = lines.pivot_table(index=["tp_size", "bytes"], columns="line", values="shown", aggfunc="first", sort=False)
    heads = ["tp", "message", *wide.columns]
    shown = [
        f"| {tp} | {size >> 10} KiB | {' | '.join('' if pd.isna(cell) else cell for cell in cells)} |"
        for (tp, size), cells in zip(wide.index, wide.to_numpy(), strict=True)
    ]
    return "\n".join([f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *shown])


def draw(rows: pd.DataFrame, path: Path) -> None:
    """A panel a tp size: microseconds against bytes, medians with the range of the launches."""
    lines = lines_of(rows)
    sizes = list(lines["tp_size"].unique())
    figure = Figure(figsize=(4.6 * len(sizes) + 1, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    links = list(lines["interconnect"].unique())
    for axes, size in zip(figure.subplots(1, len(sizes), squeeze=False, sharey=True)[0], sizes, strict=True):
        for (link, kind), line in lines[lines["tp_size"] == size].groupby(["interconnect", "kind"], sort=False):
            axes.errorbar(
                line["bytes"],
                line["median"],
                yerr=[line["median"] - line["min"], line["max"] - line["median"]],
                color=COLOURS[links.index(link)],
                marker=MARKERS[all_reduce.KINDS.index(kind)],
                linestyle="-" if kind == "nccl" else "--",
                markersize=4,
                linewidth=1.3,
                capsize=2,
                label=f"{link}, {kind.replace('_', '-')}",
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(TICKS, [f"{size >> 10} K" if size < 2**20 else f"{size >> 20} M" for size in TICKS])
        axes.set_title(f"{size} ranks", fontsize=10)
        axes.set_xlabel("bytes of the message")
        axes.grid(color="#e5e5e5")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("microseconds of an all-reduce")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None, devices: list[str] | None = None, sizes: list[int] | None = None) -> None:
    """Measures, adds to the file, draws and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tp-size", type=int, default=2)
    parser.add_argument("--interconnects", nargs="+", default=list(ENVIRONMENT), choices=list(ENVIRONMENT))
    parser.add_argument("--launches", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=400, help="seconds that one launch may take")
    options = parser.parse_args(arguments)
    if devices is None:
        check_gpus(options.tp_size)
    where = devices or [f"cuda:{rank}" for rank in range(options.tp_size)]
    options.folder.mkdir(parents=True, exist_ok=True)
    file, now = options.folder / "all_reduce.csv", here()
    rows = pd.read_csv(file, dtype={"engine": str}) if file.exists() else pd.DataFrame()
    mine = {name: str(value) for name, value in now.items() if name != "date"}
    if any(other != mine for other in rows.reindex(columns=list(mine)).astype(str).to_dict("records")):
        raise SystemExit(f"{file} has rows of another GPU, driver, library or engine; take another folder.")
    for launch, link in itertools.product(range(options.launches), options.interconnects):
        found = pd.DataFrame(probe(link, where, sizes or BYTES, options.timeout)).assign(launch=launch, **now)
        if len(rows):
            again = (rows[["tp_size", "interconnect", "launch"]] == [len(where), link, launch]).all(axis=1)
            rows = rows[~again]
        rows = pd.concat([rows, found], ignore_index=True)
        rows.to_csv(file, index=False)
    draw(rows, options.folder / "all_reduce.png")
    print(table(rows))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"Error: {error}") from error
