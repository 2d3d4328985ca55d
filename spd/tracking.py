"""Weights & Biases as a mirror of the records: one run a point, grouped by sweep, and one summary run a sweep.

Records are written first and never read back from here. Both functions return at once with `tracker=none`. They raise
when W&B does; whoever calls them has its results safe by then and turns that into a warning.

Runs go to <output_dir>/wandb: online when the user is logged in, else offline for `wandb sync` to send later;
WANDB_MODE decides otherwise.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spd.config import RunConfig, Tracker, to_dict
from spd.results import Record, digest, line_columns, to_frame

if TYPE_CHECKING:
    import pandas as pd
    import wandb

LATENCIES = ("ttft_ms", "tpot_ms", "ttft_speedup_percent", "tpot_speedup_percent")


def log_point(record: Record, config: RunConfig) -> None:
    """Mirror a point's record as one run: its configuration, and its numbers in history and summary.

    The run's id is made of the record's key and the sweep, so a point that was interrupted and comes again goes on in
    its own run, and one that several sweeps share has a run in the group of each. A record without a key (it failed
    before it was known which point it is) leaves no run.
    """
    if config.tracker.name is Tracker.none or record["key"] is None:
        return
    inputs = {**record["config"], "fingerprint": record["weights"], "environment": record["environment"]}
    run_id = f"point-{digest([record['key'], config.sweep])[:24]}"
    with _run(config, run_id, point_name(record), "point", inputs) as run:
        run.log(numbers(record))
        run.summary.update({name: record[name] for name in ("status", "error", "key") if record[name] is not None})
        run.finish(exit_code=0 if record["status"] == "done" else 1)


def log_sweep(records: list[Record], csv_path: Path, png_path: Path, config: RunConfig) -> None:
    """Mirror a whole sweep as one summary run: the curves as native line charts, a table of all points, the figure.

    Args:
        records: of every point, failed ones included; they appear in the table only.
        csv_path: the sweep's points.csv, kept with the run as a file.
        png_path: the sweep's figure; left out when there is none.
        config: of any of its points.
    """
    if config.tracker.name is Tracker.none:
        return
    import wandb

    points = to_frame(records)
    inputs = {**to_dict(config), "drop": sorted({record["config"]["drop"] for record in records})}
    inputs["fingerprint"] = sorted({record["weights"] for record in records if record["weights"]})
    with _run(config, f"sweep-{digest(config.sweep)[:24]}", f"sweep {config.sweep}", "sweep", inputs) as run:
        logged: dict[str, Any] = {"all_points": wandb.Table(dataframe=points.astype({"drop": float}))}
        for y, x, title in (
            ("accuracy_mean", "ttft_speedup_percent", "accuracy against latency"),
            ("accuracy_mean", "fraction_dropped", "accuracy against drop"),
            ("perplexity", "fraction_dropped", "perplexity against drop"),
        ):
            chart = _line_chart(points, x, y, title)
            if chart is not None:
                logged[title.replace(" ", "_")] = chart
        if png_path.exists():
            logged["curve"] = wandb.Image(str(png_path))
        run.log(logged)
        if csv_path.exists():
            run.save(str(csv_path.resolve()), base_path=str(csv_path.resolve().parent), policy="now")
        run.summary.update({"points": len(records), "done": int((points["status"] == "done").sum())})
        run.finish()


def point_name(record: Record) -> str:
    """What a person calls a point: "ref_llama tp4 zs drop 0.50"."""
    config = record["config"]
    return (
        f"{config['model']['name']} tp{config['parallel']['tp_size']} {config['strategy']['name']} "
        f"drop {config['drop']:.2f}"
    )


def numbers(record: Record) -> dict[str, float]:
    """Everything a record found, flat: perplexity, accuracy/<task>[_stderr], latency/ttft_ms[_low|_high], ...

    What was not measured is left out.
    """
    plan, accuracy, latency = record["plan"] or {}, record["accuracy"] or {}, record["latency"] or {}
    found: dict[str, float | None] = {"drop": record["config"]["drop"]}
    if plan:
        found["num_dropped"] = len(plan["dropped"])
        found["fraction_dropped"] = len(plan["dropped"]) / plan["source"]["num_blocks"]
    found["perplexity"] = (record["perplexity"] or {}).get("value")
    scores = accuracy.get("tasks", {}) | ({"mean": accuracy["mean"]} if accuracy else {})
    for task, score in scores.items():
        found[f"accuracy/{task}"], found[f"accuracy/{task}_stderr"] = score["value"], score["stderr"]
    for name in LATENCIES if latency else ():
        found[f"latency/{name}"] = latency[name]["median"]
        found[f"latency/{name}_low"], found[f"latency/{name}_high"] = latency[name]["low"], latency[name]["high"]
    return {name: value for name, value in found.items() if value is not None}


def _line_chart(points: "pd.DataFrame", x: str, y: str, title: str) -> Any:
    """W&B's own line chart of y against x, one line for each line of the figure; None without two points."""
    import wandb

    lines = points["model"] + " tp" + points["tp_size"].astype(str) + " " + points["strategy"]
    for name in line_columns(points)[3:]:
        lines += f" {name}=" + points[name].astype(str)
    drawn = points.assign(line=lines)[[x, y, "drop", "line"]].dropna(subset=[x, y]).sort_values(["line", x])
    if len(drawn) < 2:
        return None
    return wandb.plot.line(wandb.Table(dataframe=drawn), x, y, stroke="line", title=title)


def _run(config: RunConfig, run_id: str, name: str, job_type: str, inputs: dict[str, Any]) -> "wandb.Run":
    """A started run that prints nothing, records no console and asks no questions."""
    import wandb

    folder = Path(config.output_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    settings = wandb.Settings(
        console="off", silent=True, x_disable_stats=True, disable_git=True, save_code=False, init_timeout=30
    )
    mode: Any = os.environ.get("WANDB_MODE")
    if mode is None:
        mode = wandb.setup(settings).settings.mode  # "online", unless a settings file (`wandb offline`) says otherwise
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            mode = "offline"
    return wandb.init(
        project=config.tracker.project,
        entity=config.tracker.entity,
        dir=folder,
        id=run_id,
        name=name,
        group=config.sweep,
        job_type=job_type,
        config=inputs,
        mode=mode,
        resume="allow",
        settings=settings,
    )
