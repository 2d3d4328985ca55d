"""What reaches Weights & Biases, read back from the files of offline runs."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from offline_wandb import OfflineRun, read_runs

from spd import tracking
from spd.config import RunConfig, Tracker, TrackerConfig, to_dict
from spd.results import to_frame

DROPS = [0.0, 0.5, 1.0]


@pytest.fixture(autouse=True)
def logged_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    tracker = TrackerConfig(project="spd-test", entity="someone")
    return RunConfig(output_dir=str(tmp_path / "out"), sweep="first", tracker=tracker, drop=0.5)


def make_record(config: RunConfig, drop: float, **changes: Any) -> dict[str, Any]:
    def interval(median: float) -> dict[str, float]:
        return {"median": median, "low": median - 1, "high": median + 1}

    scores = {"metric": "acc", "value": 0.75 - drop / 4, "stderr": 0.02, "items": 300}
    record = {
        "format": 1,
        "key": f"{round(drop * 100):03d}" + "ab" * 14,
        "status": "done",
        "error": None,
        "sweep": config.sweep,
        "config": to_dict(replace(config, drop=drop)),
        "weights": "cafe",
        "environment": {"versions": {"torch": "2.13"}, "seconds": 3.5},
        "sensitivity": {},
        "plan": {"dropped": list(range(round(drop * 12))), "source": {"num_blocks": 12}},
        "perplexity": {"value": 3.0 + drop, "tokens": 8192},
        "accuracy": {"mean": {"value": 0.8 - drop / 4, "stderr": 0.01}, "tasks": {"tiny_words": scores}},
        "latency": {name: interval(30 * drop) for name in tracking.LATENCIES},
    }
    return record | changes


def only_run(config: RunConfig) -> OfflineRun:
    (run,) = read_runs(Path(config.output_dir))
    return run


def test_a_point_becomes_one_run_with_its_config_and_its_numbers(config: RunConfig) -> None:
    record = make_record(config, 0.5)
    tracking.log_point(record, config)
    run = only_run(config)
    assert run.run.display_name == "model tp4 zs drop 0.50"
    assert (run.run.project, run.run.entity, run.run.run_group) == ("spd-test", "someone", "first")
    assert run.run.job_type == "point"
    for section, values in to_dict(config).items():
        assert run.config[section] == values
    assert run.config["fingerprint"] == "cafe"
    assert run.config["environment"]["versions"] == {"torch": "2.13"}
    assert run.summary["perplexity"] == 3.5
    assert run.summary["accuracy/mean"] == 0.675
    assert run.summary["accuracy/tiny_words"] == 0.625
    assert run.summary["accuracy/tiny_words_stderr"] == 0.02
    assert run.summary["latency/ttft_ms"] == 15
    assert run.summary["latency/ttft_speedup_percent_low"] == 14
    assert (run.summary["num_dropped"], run.summary["fraction_dropped"]) == (6, 0.5)
    assert run.summary["status"] == "done"
    assert run.summary["key"] == record["key"]
    assert run.history[0]["accuracy/mean"] == 0.675, "in the history too, where W&B's charts look"
    assert run.exit_code == 0


def test_a_point_that_comes_again_keeps_its_run_id(config: RunConfig) -> None:
    tracking.log_point(make_record(config, 0.5, status="failed", error="killed"), config)
    tracking.log_point(make_record(config, 0.5), config)
    tracking.log_point(make_record(config, 1.0), config)
    first, again, other = read_runs(Path(config.output_dir))
    assert first.run.run_id == again.run.run_id != other.run.run_id


def test_a_point_that_two_sweeps_share_has_a_run_in_the_group_of_each(config: RunConfig) -> None:
    tracking.log_point(make_record(config, 0.5), replace(config, sweep="first"))
    tracking.log_point(make_record(config, 0.5), replace(config, sweep="second"))
    first, second = read_runs(Path(config.output_dir))
    assert first.run.run_id != second.run.run_id
    assert {first.run.run_group, second.run.run_group} == {"first", "second"}


def test_what_was_not_measured_is_left_out(config: RunConfig) -> None:
    failed = make_record(
        config,
        0.5,
        status="failed",
        error="the disk is full",
        plan=None,
        perplexity=None,
        accuracy={"mean": {"value": 0.7, "stderr": None}, "tasks": {}},
        latency=None,
    )
    tracking.log_point(failed, config)
    run = only_run(config)
    assert set(run.history[0]) - {"_step", "_runtime", "_timestamp"} == {"drop", "accuracy/mean"}
    assert run.summary["error"] == "the disk is full"
    assert run.exit_code == 1


def test_a_sweep_becomes_a_summary_run_with_line_charts_a_table_and_the_figure(
    config: RunConfig, tmp_path: Path
) -> None:
    import matplotlib.image
    import numpy as np

    records = [make_record(config, drop) for drop in DROPS]
    records.append(make_record(config, 0.75, status="failed", error="no", latency=None, accuracy=None, perplexity=None))
    csv, png = tmp_path / "points.csv", tmp_path / "curve.png"
    to_frame(records).to_csv(csv, index=False)
    matplotlib.image.imsave(png, np.zeros((4, 6, 3)))
    tracking.log_sweep(records, csv, png, config)
    run = only_run(config)

    assert (run.run.display_name, run.run.run_group, run.run.job_type) == ("sweep first", "first", "sweep")
    assert run.config["drop"] == [0.0, 0.5, 0.75, 1.0]
    assert (run.summary["points"], run.summary["done"]) == (4, 3)

    table = run.table("all_points")
    assert table["columns"] == list(to_frame(records).columns)
    assert [row[table["columns"].index("drop")] for row in table["data"]] == [0.0, 0.5, 1.0, 0.75]

    charts = run.config["_wandb"]["visualize"]
    panel = charts["accuracy_against_latency"]["panel_config"]
    assert panel["panelDefId"] == "wandb/line/v0"
    assert panel["fieldSettings"] == {"x": "ttft_speedup_percent", "y": "accuracy_mean", "stroke": "line"}
    curve = run.table("accuracy_against_latency_table")
    x, y, line = (curve["columns"].index(name) for name in ("ttft_speedup_percent", "accuracy_mean", "line"))
    assert [(row[x], row[y]) for row in curve["data"]] == [(0.0, 0.8), (15.0, 0.675), (30.0, 0.55)]
    assert {row[line] for row in curve["data"]} == {"model tp4 zs"}
    assert {"accuracy_against_drop", "perplexity_against_drop"} < set(charts)

    image = run.summary["curve"]
    assert (image["_type"], image["width"], image["height"]) == ("image-file", 6, 4)
    assert (run.files / image["path"]).read_bytes() == png.read_bytes()
    assert (run.files / "points.csv").read_bytes() == csv.read_bytes()


def test_a_sweep_without_latency_has_the_other_charts(config: RunConfig, tmp_path: Path) -> None:
    records = [make_record(config, drop, latency=None) for drop in DROPS]
    tracking.log_sweep(records, tmp_path / "none.csv", tmp_path / "none.png", config)
    charts = only_run(config).config["_wandb"]["visualize"]
    assert set(charts) == {"accuracy_against_drop", "perplexity_against_drop"}


def test_a_sweep_of_one_point_has_a_table_and_no_chart(config: RunConfig, tmp_path: Path) -> None:
    tracking.log_sweep([make_record(config, 0.0)], tmp_path / "none.csv", tmp_path / "none.png", config)
    run = only_run(config)
    assert len(run.table("all_points")["data"]) == 1
    assert "visualize" not in run.config.get("_wandb", {})


def test_a_record_without_a_key_leaves_no_run(config: RunConfig) -> None:
    tracking.log_point(make_record(config, 0.5, key=None, status="failed"), config)
    assert not Path(config.output_dir).exists()


def test_tracker_none_does_nothing_and_never_imports_wandb(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from spd import tracking
from spd.config import RunConfig, Tracker, TrackerConfig
config = RunConfig(tracker=TrackerConfig(name=Tracker.none))
tracking.log_point({}, config)
tracking.log_sweep([], Path("a"), Path("b"), config)
assert "wandb" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)


def test_wandb_mode_disabled_writes_no_run(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracking.log_point(make_record(config, 0.5), config)
    assert read_runs(Path(config.output_dir)) == []


@pytest.mark.parametrize(("logged_in", "mode"), [(True, "online"), (False, "offline")])
def test_a_run_is_online_only_when_the_user_is_logged_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged_in: bool, mode: str
) -> None:
    # In a process of its own: W&B remembers credentials for the rest of a process.
    program = """
import wandb
from spd import tracking
from spd.config import RunConfig
class Asked(Exception): pass
def init(**arguments): raise Asked(arguments["mode"])
wandb.init = init
try:
    tracking._run(RunConfig(), "id", "name", "point", {})
except Asked as asked:
    print("mode", asked)
"""
    if logged_in:
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == f"mode {mode}\n"
    assert done.stderr == ""


def test_nothing_is_printed(config: RunConfig, capfd: pytest.CaptureFixture[str]) -> None:
    assert config.tracker.name is Tracker.wandb
    tracking.log_point(make_record(config, 0.5), config)
    assert capfd.readouterr() == ("", "")
