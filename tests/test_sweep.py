"""A sweep as a whole: checked before it starts, summed up after it ends, whatever its jobs did."""

import errno
import itertools
import json
import math
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import WORDS
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from spd import figures, inputs, tracking
from spd.config import to_dict
from spd.errors import UserError
from spd.paths import ROOT
from spd.point import failed_record
from spd.results import Record, Results
from spd.sweep import POINTS_FILE, Sweep, SweepCallback, leave_pointer, lone_sessions, position
from spd.sweep import compose as compose_sweep
from spd.tables import print_blocks, print_table


@pytest.fixture
def settings(tiny_llama: Path, tmp_path: Path) -> list[str]:
    """Overrides with which every point of the tiny model is fine."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join(WORDS))
    return [
        "model=custom",
        f"model.path={tiny_llama}",
        f"data.path={text}",
        f"data.heldout_path={text}",
        "data.sequence_length=16",
        "eval=none",
        "tracker=none",
        "sweep=mine",
        f"output_dir={tmp_path / 'runs'}",
    ]


@contextmanager
def multirun(overrides: list[str]) -> Iterator[Any]:
    """What Hydra hands to a callback at the start of a multirun."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        # A sweep's commas are no values of the first composition, so they are put in as Hydra does.
        config = compose("config", [o for o in overrides if "," not in o], return_hydra_config=True)
        config.hydra.overrides.task = [o for o in overrides if not o.startswith("hydra")]
        config.hydra.mode = "MULTIRUN"
        yield config


def test_every_point_is_composed_and_numbered_as_hydra_will(settings: list[str], tmp_path: Path) -> None:
    with multirun([*settings, "drop=0,0.5", "parallel=tp2,tp4"]) as config:
        sweep = compose_sweep(config)
    assert [(c.drop, c.parallel.tp_size) for c in sweep.configs] == [(0.0, 2), (0.0, 4), (0.5, 2), (0.5, 4)]
    assert sweep.folder == tmp_path / "runs" / "sweeps" / "mine"


def test_a_sweep_without_a_name_has_one_name_for_its_folder_and_its_points(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock = itertools.count()
    later = SimpleNamespace(strftime=lambda pattern: f"second-{next(clock)}")
    monkeypatch.setattr("hydra.core.utils.datetime", SimpleNamespace(now=lambda: later))
    settings.remove("sweep=mine")
    with multirun([*settings, "drop=0,0.5"]) as config:
        sweep = compose_sweep(config)
        given = GlobalHydra.instance().config_loader().load_sweep_config(config, sweep.overrides[1])
    name = sweep.folder.name
    assert name.startswith("second-")
    assert sweep.folder == tmp_path / "runs" / "sweeps" / name
    assert [c.sweep for c in sweep.configs] == [name, name]
    assert (given.sweep, given.hydra.sweep.dir) == (name, str(sweep.folder)), "what Hydra gives its jobs"


def test_an_experiment_s_sweep_is_overridden_by_the_command_line(settings: list[str]) -> None:
    with multirun(["experiment=quickstart", *settings, "latency=none", "drop=0.25,0.5"]) as config:
        assert [c.drop for c in compose_sweep(config).configs] == [0.25, 0.5]
    with multirun(["experiment=quickstart", *settings, "latency=none"]) as config:
        assert [c.drop for c in compose_sweep(config).configs] == [0, 0.25, 0.5, 0.625, 0.75, 0.875, 1.0]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("drop=0,0.25,1.7", "drop=1.7"),
        ("drop=0,half", "drop=half"),
        ("parallel.tp_size=2,3", "tp_size=3"),
        ("latency=none,gpu", "latency=gpu needs"),
        ("parallel=tp2,tp3", "parallel=tp3"),
        ("stratgy=zs,zs", "Did you mean strategy?"),
        ("model.path=nowhere,elsewhere", "nowhere"),
    ],
)
def test_one_wrong_point_refuses_the_whole_sweep(settings: list[str], wrong: str, said: str, tmp_path: Path) -> None:
    with multirun([*settings, wrong]) as config, pytest.raises(SystemExit) as stopped:
        SweepCallback().on_multirun_start(config)
    assert said in str(stopped.value)
    assert "Traceback" not in str(stopped.value)
    assert not (tmp_path / "runs").exists()


def test_cluster_jobs_with_fewer_cores_than_ranks_to_time_are_refused(settings: list[str]) -> None:
    sizes = [*settings, "hydra/launcher=slurm", "parallel=tp2,tp8"]
    fits = ["latency=cpu", "latency.prompt_length=8"]
    with multirun([*sizes, *fits]) as config, pytest.raises(UserError) as refused:
        compose_sweep(config)
    assert "hydra.launcher.cpus_per_task=4 is less than the 8 ranks" in str(refused.value)
    assert "write hydra.launcher.cpus_per_task=8" in str(refused.value)
    with multirun([*sizes, *fits, "hydra.launcher.cpus_per_task=8"]) as config:
        assert len(compose_sweep(config).configs) == 2
    with multirun([*sizes, "latency=none"]) as config:
        assert len(compose_sweep(config).configs) == 2


def test_points_that_time_sessions_of_their_own_are_said_with_what_would_time_them_together(
    settings: list[str], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sweep, "current", None)
    fits = ["latency=cpu", "latency.prompt_length=8"]
    with multirun([*settings, *fits, "latency.drops=[0.5]", "drop=0,0.3,0.5,0.6"]) as config:
        SweepCallback().on_multirun_start(config)
    assert Sweep.current is not None
    Sweep.current.finish()
    said = capsys.readouterr().err
    assert "drop 0.3,0.6 is not in latency.drops" in said
    assert "latency.drops=[0,0.3,0.5,0.6]" in said
    with multirun([*settings, *fits, "latency.drops=[0,0.3,0.5,0.6]", "drop=0,0.3,0.5,0.6"]) as config:
        assert lone_sessions(compose_sweep(config).configs) is None
    with multirun([*settings, "latency=none", "drop=0,0.3"]) as config:
        assert lone_sessions(compose_sweep(config).configs) is None


def test_other_sweepers_are_refused(settings: list[str]) -> None:
    with multirun(settings) as config:
        config.hydra.sweeper._target_ = "pathlib.Path"
        with pytest.raises(UserError, match="basic sweeper"):
            compose_sweep(config)


@pytest.fixture
def sweep(settings: list[str]) -> Sweep:
    with multirun([*settings, "drop=0,0.5,1"]) as config:
        made = compose_sweep(config)
    made.begin()
    return made


def make_record(sweep: Sweep, number: int, **changes: Any) -> Record:
    config = sweep.configs[number]
    found = {
        "key": f"key{number}",
        "status": "done",
        "plan": {"dropped": list(range(number)), "source": {"num_blocks": 12}},
        "perplexity": {"value": 3.0 + number, "tokens": 10},
        "accuracy": {"mean": {"value": 0.8 - 0.1 * number, "stderr": 0.01}, "tasks": {}},
    }
    return {**failed_record(to_dict(config), config.sweep, ""), "error": None, **found, **changes}


def finish_job(sweep: Sweep, number: int, **changes: Any) -> None:
    record = make_record(sweep, number, **changes)
    output_dir = Path(sweep.configs[number].output_dir)
    if record["key"]:
        Results(output_dir).finish(record)
    leave_pointer(sweep.folder / str(number), record, output_dir)


def test_a_job_knows_which_of_how_many_it_is(sweep: Sweep) -> None:
    assert position(sweep.folder / "1") == "2/3"
    assert position(sweep.folder.parent / "alone" / "0") == ""
    assert json.loads((sweep.folder / POINTS_FILE).read_text())[2]["config"]["drop"] == 1.0


def test_the_summary_has_a_row_for_every_point(sweep: Sweep, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    logged: list[Any] = []
    monkeypatch.setattr(tracking, "log_sweep", lambda *arguments: logged.append(arguments))
    for number in range(3):
        finish_job(sweep, number)
    assert sweep.finish()
    frame = pd.read_csv(sweep.folder / "points.csv")
    assert frame["drop"].tolist() == [0.0, 0.5, 1.0]
    assert frame["perplexity"].tolist() == [3.0, 4.0, 5.0]
    assert frame["status"].tolist() == ["done"] * 3
    assert (sweep.folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert len(logged[0][0]) == 3
    shown = capsys.readouterr().out
    assert "0.700 ± 0.010" in shown
    assert "3 of 3 points are done" in shown


def test_a_failed_and_a_lost_point_are_rows_that_say_why(sweep: Sweep, capsys: Any) -> None:
    finish_job(sweep, 0)
    finish_job(
        sweep, 1, key=None, status="failed", error="weights cut short", perplexity=None, accuracy=None, plan=None
    )
    assert not sweep.finish()  # the third job left nothing, as one that was killed
    frame = pd.read_csv(sweep.folder / "points.csv")
    assert frame["status"].tolist() == ["done", "failed", "failed"]
    assert frame.loc[1, "error"] == "weights cut short"
    assert "left no record" in frame.loc[2, "error"]
    assert frame.loc[1:, ["perplexity", "accuracy_mean", "num_dropped"]].isna().all(axis=None)
    shown = capsys.readouterr()
    assert "1 of 3 points are done" in shown.out
    assert "weights cut short" in shown.err


def test_what_an_earlier_run_of_the_sweep_left_is_not_taken_for_this_one(sweep: Sweep) -> None:
    for number in range(3):
        finish_job(sweep, number)
    sweep.begin()
    assert [record["status"] for record in sweep.records()] == ["failed"] * 3


def test_a_table_and_a_figure_of_an_earlier_sweep_are_not_taken_for_this_one_s(sweep: Sweep, capsys: Any) -> None:
    finish_job(sweep, 0)
    sweep.finish()
    (png,) = sweep.folder.glob("*.png")
    assert str(png) in capsys.readouterr().out
    (sweep.folder / "7").mkdir()
    (sweep.folder / "7" / "point.json").write_text("{}")
    shorter = Sweep(sweep.folder, sweep.overrides[:1], sweep.configs[:1])
    shorter.begin()
    assert {file.name for file in (*sweep.folder.glob("*.csv"), *sweep.folder.glob("*.png"))} == {
        "points.previous.csv", "curve.previous.png"
    }  # fmt: skip
    assert not list(sweep.folder.glob("*/*.json"))
    shorter.finish()  # no point of it is done, so there is nothing to draw
    assert "curve.png" not in capsys.readouterr().out


def test_a_full_disk_is_said_before_the_first_point(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with multirun([*settings, "drop=0,1"]) as config, pytest.raises(SystemExit) as stopped:
        SweepCallback().on_multirun_start(config)
    assert "nothing more can be written" in str(stopped.value)
    assert "Traceback" not in str(stopped.value)


def test_two_sweeps_of_one_name_do_not_run_at_once(sweep: Sweep, settings: list[str]) -> None:
    with multirun([*settings, "drop=0,1"]) as config:
        with pytest.raises(SystemExit, match=r"sweep mine is running .*; give sweep=<another name>"):
            SweepCallback().on_multirun_start(config)
        assert len(json.loads((sweep.folder / POINTS_FILE).read_text())) == 3, "the running sweep's"
        sweep.finish()
        compose_sweep(config).begin()


def test_a_record_of_another_configuration_is_not_taken_for_a_point_s(sweep: Sweep) -> None:
    finish_job(sweep, 0)
    (sweep.folder / "1").mkdir()
    shutil.copy(sweep.folder / "0" / "point.json", sweep.folder / "1" / "point.json")
    records = sweep.records()
    assert [record["status"] for record in records] == ["done", "failed", "failed"]
    assert "another configuration" in records[1]["error"]
    sweep.configs[0].output_dir, sweep.configs[0].sweep = "elsewhere", "other"
    assert sweep.records()[0]["status"] == "done", "where a record is kept is no part of it"


def test_a_point_done_before_under_another_path_is_on_the_line_of_the_others(sweep: Sweep) -> None:
    finish_job(sweep, 0)
    for config in sweep.configs:
        config.model.path = "moved"
    finish_job(sweep, 1)
    assert [record["status"] for record in sweep.records()][:2] == ["done", "done"]
    assert {record["config"]["model"]["path"] for record in sweep.records()} == {"moved"}


def test_points_of_random_weights_that_differ_in_no_latency_are_one(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(inputs, "check_gpus", lambda tp_size: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=15 * 10**10))
    random = ["model=llama2_7b", "weights=random", "latency=gpu", "parallel=tp2", "strategy=zs,zs_b2b", "drop=0.5"]
    with multirun([one for one in settings if not one.startswith("model")] + random) as config:
        sweep = compose_sweep(config)
    sweep.begin()
    for number in range(2):
        finish_job(sweep, number, key="same", perplexity=None, accuracy=None)
    assert [record["status"] for record in sweep.records()] == ["done", "done"]
    assert sweep.finish()
    shown = capsys.readouterr()
    assert "2 of 2 points are done" in shown.out
    assert "Warning" not in shown.err, "without a loss or a score there is no curve"


@pytest.mark.parametrize("drops", ["0,0.5", "0.5,0"])
def test_the_point_that_needs_the_most_is_checked_whatever_the_order(settings: list[str], drops: str) -> None:
    asked = ["strategy=zs_correction", "data.recovery_samples=100000", f"drop={drops}"]
    with multirun([*settings, *asked]) as config, pytest.raises(UserError, match="too few for"):
        compose_sweep(config)


@pytest.mark.parametrize("file", sorted((ROOT / "conf/experiment").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_experiment_can_begin_where_there_are_gpus(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(inputs, "check_gpus", lambda tp_size: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=15 * 10**10))
    params = OmegaConf.load(file)["hydra"]["sweeper"]["params"]
    # Hydra composes 20 points a second: of fractions and seeds the ends are enough.
    ends = {name: str(params[name]).split(",") for name in ("drop", "seed") if name in params}
    fewer = {name: ",".join((values[0], values[-1])) for name, values in ends.items()}
    asked = [f"experiment={file.stem}", "tracker=none", f"output_dir={tmp_path}"]
    with multirun(asked + [f"{name}={values}" for name, values in fewer.items()]) as config:
        composed = compose_sweep(config).configs
    assert len(composed) == math.prod(len(str(values).split(",")) for values in {**params, **fewer}.values())


def test_a_figure_that_fails_does_not_lose_the_table(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(figures, "plot_curve", broken)
    finish_job(sweep, 0)
    sweep.finish()
    assert (sweep.folder / "points.csv").exists()
    assert "the curve failed (RuntimeError: no fonts)" in capsys.readouterr().err


def test_points_that_differ_in_any_setting_can_be_told_apart(settings: list[str], capsys: Any) -> None:
    with multirun([*settings, "strategy.order=suffix,alone", "drop=0,1"]) as config:
        sweep = compose_sweep(config)
    sweep.begin()
    for number in range(3):
        finish_job(sweep, number)
    sweep.finish()
    frame = pd.read_csv(sweep.folder / "points.csv")
    assert frame["strategy.order"].tolist() == ["suffix", "suffix", "alone", "alone"]
    shown = capsys.readouterr()
    assert "strategy.order" in shown.out
    assert "Failed: strategy.order alone, drop 1.0: its job left no record" in shown.err


def test_the_printed_table_names_what_varies(sweep: Sweep, capsys: Any) -> None:
    records = [make_record(sweep, number) for number in range(2)]
    records[1]["config"]["parallel"]["tp_size"] = 8
    latency = {"median": 12.34, "low": 11.0, "high": 13.0}
    records[1]["latency"] = {"ttft_ms": latency, "ttft_speedup_percent": latency}
    print_table(records)
    shown = capsys.readouterr().out
    assert "tp_size" in shown
    assert "model" not in shown
    assert "12.3 [11.0, 13.0]" in shown
    assert "+12.3 % [+11.0, +13.0]" in shown


def test_each_tasks_score_and_error_stand_beside_the_mean(sweep: Sweep, capsys: Any) -> None:
    record = make_record(sweep, 0)
    scores = {"toy_choice": {"value": 0.25, "stderr": 0.5}, "toy_last": {"value": 0.75, "stderr": None}}
    record["accuracy"] = {"mean": {"value": 0.5, "stderr": 0.125}, "tasks": scores}
    print_table([record])
    lines = capsys.readouterr().out.splitlines()
    (titles,) = (line for line in lines if "toy_choice" in line)
    assert titles.split()[1::2] == ["drop", "toy_choice", "toy_last", "mean"]
    row = next(line for line in lines if "0.250" in line)
    assert [cell.strip() for cell in row.split("│")[2:5]] == ["0.250 ± 0.500", "0.750", "0.500 ± 0.125"]


def test_in_a_narrow_terminal_numbers_come_before_errors_and_nothing_is_cut(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    record = make_record(sweep, 1)
    latency = {"median": 12.34, "low": 11.0, "high": 13.0}
    record["latency"] = {"ttft_ms": latency, "tpot_ms": latency, "ttft_speedup_percent": latency}
    record["accuracy"]["tasks"] = {f"rw_task_{n}": {"value": 0.25, "stderr": 0.5} for n in range(9)}
    monkeypatch.setenv("FORCE_COLOR", "1")  # as a terminal is taken
    monkeypatch.setenv("COLUMNS", "80")
    print_table([record])
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in capsys.readouterr().out.splitlines()]
    assert max(map(len, lines)) <= 80
    shown = "\n".join(lines)
    for whole in ("perplexity", "TTFT speed-up", "12.3", "12.34", "+12.3 %", "0.700", "done"):
        assert whole in shown
    assert "…" not in shown
    assert "±" not in shown
    assert shown.count("0.250") == 9
    assert "Errors and intervals need a wider terminal" in shown


def test_a_points_blocks_are_shown_with_what_became_of_them(capsys: Any) -> None:
    outcomes = {
        "1": {"kept": "zs", "loss": {"zs": 0.5, "correction": 0.6}},
        "2": {"kept": "correction+b2b", "loss": {"zs": 0.25, "correction": 0.2, "b2b": 0.125}},
    }
    plan = {"dropped": [1, 2], "classes": {0: "ESB", 1: "ISB", 2: "SB"}, "outcomes": outcomes}
    measured = {"sensitivities": [11.5, -0.001, 0.25]}
    print_blocks({"plan": plan, "sensitivity": measured})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["0", "11.5000", "ESB"] in lines
    assert ["1", "-0.0010", "ISB", "dropped", "zs", "0.5", "0.5"] in lines
    assert ["2", "0.2500", "SB", "dropped", "correction+b2b", "0.125", "0.25"] in lines
    print_blocks({"plan": plan | {"outcomes": {}}, "sensitivity": measured})
    assert "kept" not in capsys.readouterr().out
    print_blocks({"plan": plan, "sensitivity": None})  # random weights have none
    assert capsys.readouterr().out == ""


def test_what_was_not_measured_has_no_column(sweep: Sweep, capsys: Any) -> None:
    print_table([make_record(sweep, 0)])
    shown = capsys.readouterr().out
    assert "perplexity" in shown
    assert "TTFT" not in shown
