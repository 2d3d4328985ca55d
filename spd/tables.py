"""Records as tables in the terminal."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from spd.results import Record, line_columns, to_frame

if TYPE_CHECKING:
    import pandas as pd


def print_table(records: list[Record], title: str | None = None) -> None:
    """Records in the terminal: what dropping costs, what it buys, how sure that is.

    Where the terminal is too narrow for a table's errors and intervals, that is printed without them.
    """
    frame = to_frame(records)
    varying = [name for name in line_columns(frame) if frame[name].nunique() > 1]
    # A pipe has no width; a table cut at 80 columns would be unreadable.
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    tables = {_points: title}
    if frame["accuracy_mean"].notna().any():
        tables[_tasks] = "Accuracy by task"
    narrow = False
    for fill, heading in tables.items():
        table = Table(title=heading, title_justify="left")
        fill(table, frame, varying, spread=True)
        if console.measure(table, options=console.options.update(width=1000)).maximum > console.width:
            table, narrow = Table(title=heading, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0)), True
            fill(table, frame, varying, spread=False)
        console.print(table)
    if narrow:
        console.print("Errors and intervals need a wider terminal; they are in the CSV and the records.")


def print_blocks(record: Record) -> None:
    """A point's blocks in the terminal: how sensitive each is, whether it is dropped, and what came of treating it.

    Losses are of held-out calibration text: of what was kept, and zero-shot. Prints nothing for a point without
    sensitivities.
    """
    plan, measured = record["plan"], record["sensitivity"]
    if not plan or not measured:
        return
    # A plan that was read has the text keys of JSON, a new one has numbers.
    classes, outcomes = ({str(block): its for block, its in plan[name].items()} for name in ("classes", "outcomes"))
    table = Table(title="Blocks", title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in ("block", "added perplexity", "class", "", *(("kept", "loss", "zero-shot") if outcomes else ())):
        table.add_column(name, justify="left" if name in ("class", "", "kept") else "right")
    for block, added in enumerate(measured["sensitivities"]):
        row = [str(block), f"{added:.4f}", classes[str(block)], "dropped" if block in plan["dropped"] else ""]
        if outcome := outcomes.get(str(block)):
            losses = [outcome["loss"][step] for step in (outcome["kept"].split("+")[-1], "zs")]
            row += [outcome["kept"], *(_number(loss, "{:.4g}") for loss in losses)]
        table.add_row(*row)
    Console(highlight=False).print(table)


def _points(table: Table, frame: "pd.DataFrame", varying: list[str], spread: bool) -> None:
    """A row for each point and a column for whatever was measured; with `spread`, errors and intervals too."""

    def blocks(row: Any) -> str:
        share = _number(row["fraction_dropped"], " ({:.1%})", "") if spread else ""
        return _number(row["num_dropped"], "{:.0f}") + share

    def accuracy(row: Any) -> str:
        error = _number(row["accuracy_mean_stderr"], " ± {:.3f}", "") if spread else ""
        return _number(row["accuracy_mean"], "{:.3f}") + error

    columns: dict[str, Callable[[Any], str]] = {
        "blocks": blocks,
        "accuracy": accuracy,
        "perplexity": lambda row: _number(row["perplexity"], "{:.3f}"),
        "TTFT ms": lambda row: _interval(row, "ttft_ms", "{:.1f}", "", spread),
        "TPOT ms": lambda row: _interval(row, "tpot_ms", "{:.2f}", "", spread),
        "TTFT speed-up": lambda row: _interval(row, "ttft_speedup_percent", "{:+.1f}", " %", spread),
    }
    cells = {name: [cell(row) for _, row in frame.iterrows()] for name, cell in columns.items()}
    measured = {name: column for name, column in cells.items() if set(column) != {"-"}}
    for name in [*varying, "drop", *measured, "status"]:
        table.add_column(name, justify="left" if name in (*varying, "status") else "right")
    for place, (_, row) in enumerate(frame.iterrows()):
        found = [column[place] for column in measured.values()]
        table.add_row(*[str(row[name]) for name in varying], f"{row['drop']:g}", *found, row["status"])


def _tasks(table: Table, frame: "pd.DataFrame", varying: list[str], spread: bool) -> None:
    """Each task's score, beside the mean; with `spread`, lm-eval's standard error too."""
    columns = list(frame.columns)
    tasks = columns[columns.index("accuracy_mean_stderr") + 1 : columns.index("ttft_ms") : 2]
    if spread:
        table.title = f"{table.title}, ± lm-eval's standard error"
    for name in [*varying, "drop", *tasks, "mean"]:
        heading = name if spread else name.replace("_", "_\n")
        table.add_column(heading, justify="left" if name in varying else "right", overflow="fold")
    for _, row in frame.iterrows():
        scores = [
            _number(row[name], "{:.3f}") + (_number(row[f"{name}_stderr"], " ± {:.3f}", "") if spread else "")
            for name in [*tasks, "accuracy_mean"]
        ]
        table.add_row(*[str(row[name]) for name in varying], f"{row['drop']:g}", *scores)


def _number(value: Any, form: str, missing: str = "-") -> str:
    return missing if value is None or value != value else form.format(value)


def _interval(row: Any, name: str, form: str, unit: str, spread: bool) -> str:
    if row[name] is None or row[name] != row[name]:
        return "-"
    low, high = _number(row[f"{name}_low"], form), _number(row[f"{name}_high"], form)
    return f"{form.format(row[name])}{unit}" + (f" [{low}, {high}]" if spread and low != "-" else "")
