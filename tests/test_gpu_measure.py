"""`experiments.gpu_latency.measure`: what it adds to a record, and what it refuses to."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from gpu_settings import architecture, has_memory, invented_session

from experiments.gpu_latency import measure, power
from spd.errors import UserError
from spd.gpu.latency import Shape
from spd.launch import RankFailed
from spd.paths import ROOT


class Launches:
    """In place of GPUs: launches of two shapes of a model of 32 blocks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shapes = {"2x32": Shape(2, 32, 64, 4), "1x150": Shape(1, 150, None, 2)}
        self.asked: list[tuple[str, int, int]] = []
        self.failing: set[str] = set()
        self.timeouts: list[float] = []
        self.here = {"gpu": "none", "date": "2026-11-27"}
        monkeypatch.setattr(measure, "SHAPES", self.shapes)
        monkeypatch.setattr(measure, "measure_gpu_latency", self.launch)
        monkeypatch.setattr(measure, "here", lambda: dict(self.here))
        has_memory(8 * 10**10, monkeypatch)

    def launch(self, architecture: dict, tp_size: int, arms: dict, shapes: list, **options: Any) -> list[dict]:
        self.asked.append((options["interconnect"], options["first_launch"], len(shapes)))
        if options["interconnect"] in self.failing:
            raise RankFailed("rank 1 of 2 died")
        of = {name: options[name] for name in ("interconnect", "new_tokens", "warmup")}
        self.timeouts.append(options["timeout_s"])
        return [invented_session(1, shape, most="32") | of for shape in shapes]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    return Launches(monkeypatch)


def test_a_measurement_goes_on_where_it_was_and_a_failed_launch_loses_nothing_else(
    launches: Launches, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = [str(tmp_path / "out"), "--models", "llama2_7b", "--shapes"]
    launches.failing = {"lbw"}
    with pytest.raises(SystemExit, match="1 launches failed"):
        measure.main([*command, "2x32", "--launches", "1"])
    assert "llama2_7b tp2 lbw, launch 0: rank 1 of 2 died" in capsys.readouterr().out
    assert launches.asked == [("native", 0, 1), ("lbw", 0, 1)]
    launches.failing = set()
    measure.main([*command, "2x32", "1x150", "--launches", "2"])
    # What a shape has too few of is added, and that alone.
    assert launches.asked[2:] == [("native", 0, 1), ("lbw", 0, 2), ("native", 1, 2), ("lbw", 1, 2)]
    # A launch that took 100 s of lbw is expected to take as long again; what all shapes share was done once.
    file = tmp_path / "out/sessions.json"

    def took(key: str, start: float, each: float) -> None:
        found = json.loads(file.read_text())
        for session in found[key]["sessions"].values():
            session["seconds"][-1] = {"start": start, "capture": each / 2, "time": each / 2}
        file.write_text(json.dumps(found))

    took("llama2_7b tp2 native", 28, 15)
    took("llama2_7b tp2 lbw", 40, 30)
    measure.main([*command, "2x32", "--launches", "3", "--seconds", "60"])
    assert launches.asked[6:] == [("native", 2, 1)]
    assert "llama2_7b tp2 lbw, launch 2: not begun" in capsys.readouterr().out
    assert launches.timeouts[-2] == 500
    assert 50 < launches.timeouts[-1] <= 60
    # One of a model that is new takes nobody knows how long, and over another interconnect as long as that.
    new = [str(tmp_path / "out"), "--models", "llama2_13b", "--shapes", "2x32", "--launches", "1", "--interconnects"]
    measure.main([*new, "native", "--seconds", "60"])
    assert launches.asked[7:] == [("native", 0, 1)]
    took("llama2_13b tp2 native", 20, 80)
    measure.main([*new, "lbw", "--seconds", "60"])
    assert "llama2_13b tp2 lbw, launch 0: not begun" in capsys.readouterr().out
    found = json.loads(file.read_text())
    found.pop("llama2_13b tp2 native")
    file.write_text(json.dumps(found))
    measure.main([*command, "2x32", "--launches", "0"])
    assert len(launches.asked) == 8
    rows = pd.read_csv(tmp_path / "out/latency.csv", dtype={"arm": str})
    assert len(rows) == 2 * 12
    assert set(rows["launches"]) == {2, 3}
    assert set(rows["gpu"]) == {"none"}
    assert "| llama2_7b | 2 | lbw | 2 | decode at 64 |" in capsys.readouterr().out


def test_a_measurement_ends_when_two_launches_fail_one_after_the_other(
    launches: Launches, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    launches.failing = {"native", "lbw"}
    with pytest.raises(SystemExit, match="nothing was measured"):
        measure.main([str(tmp_path / "out"), "--models", "llama2_7b", "--shapes", "2x32"])
    assert launches.asked == [("native", 0, 1), ("lbw", 0, 1)]
    assert "two failed one after the other" in capsys.readouterr().out


def test_what_is_refused_does_not_end_a_measurement(
    launches: Launches, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(model: dict, *given: Any, **options: Any) -> list[dict]:
        if model["model_type"] == "qwen2":
            raise UserError("tp_size 8 does not divide 28 heads")
        return launches.launch(model, *given, **options)

    monkeypatch.setattr(measure, "measure_gpu_latency", launch)
    models = ["--models", "llama2_7b", "qwen2.5_7b", "opt_6.7b", "--shapes", "2x32", "--launches", "2"]
    with pytest.raises(SystemExit, match="2 launches failed"):
        measure.main([str(tmp_path / "out"), *models])
    assert "qwen2.5_7b tp2 lbw, launch 0: tp_size 8 does not divide 28 heads" in capsys.readouterr().out
    assert len(launches.asked) == 2 * 2 * 2


def test_a_machine_without_gpus_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="needs a GPU for each"):
        measure.main([str(tmp_path / "out"), "--launches", "1"])
    assert not (tmp_path / "out").exists()


def test_launches_of_different_gpus_are_not_put_together(
    launches: Launches, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = [str(tmp_path), "--models", "llama2_7b", "--interconnects", "native", "--shapes", "2x32", "--launches"]
    measure.main([*command, "1"])
    launches.here["date"] = "2026-11-28"
    measure.main([*command, "2"])
    launches.here["gpu"] = "another"
    with pytest.raises(SystemExit, match="1 launches failed"):
        measure.main([*command, "3"])
    assert "has launches of it with gpu none, here another; take another folder" in capsys.readouterr().out
    rows = pd.read_csv(tmp_path / "latency.csv")
    assert set(rows["launches"]) == {2}
    assert set(rows["date"]) == {"2026-11-27, 2026-11-28"}


def test_every_launch_has_what_clock_and_power_the_gpus_had_meanwhile(
    launches: Launches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi = tmp_path / "bin/nvidia-smi"  # as it answered on two H200
    smi.parent.mkdir()
    smi.write_text('#!/bin/sh\necho "0, 1485, 698.55, Active\n1, 1980, 81.86, Not Active"\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{smi.parent}:/usr/bin:/bin")
    command = [str(tmp_path / "out"), "--models", "llama2_7b", "--shapes", "2x32", "--launches", "2"]
    measure.main(command)
    found = pd.read_csv(tmp_path / "out/power.csv")
    assert list(found.columns) == list(gpu_power().columns)
    assert found.iloc[:2].to_dict("records") == [
        {"model": "llama2_7b", "tp_size": 2, "interconnect": "native", "launch": 0, "seconds": 0} | of
        for of in (
            {"gpu": 0, "sm_mhz": 1485, "watts": 698.55, "power_capped": True},
            {"gpu": 1, "sm_mhz": 1980, "watts": 81.86, "power_capped": False},
        )
    ]
    assert list(zip(found["interconnect"], found["launch"], strict=True))[::2] == [
        ("native", 0), ("lbw", 0), ("native", 1), ("lbw", 1),
    ]  # fmt: skip


def gpu_power() -> pd.DataFrame:
    return pd.read_csv(ROOT / "experiments/gpu_latency/h200x2/power.csv")


def test_samples_are_taken_while_something_runs_and_a_machine_without_nvidia_smi_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with power.sampled() as samples:
        pass
    assert samples == []
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\necho "0, 345, 80.26, Not Active"\n')
    smi.chmod(0o755)
    threads = threading.active_count()
    with power.sampled(every_s=0.01) as samples:
        while len(samples) < 3:
            time.sleep(0.01)
    assert {len(sample) for sample in samples} == {1}
    assert threading.active_count() == threads


def test_launches_that_measure_otherwise_are_not_put_together(
    launches: Launches, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [str(tmp_path), "--models", "llama2_7b", "--interconnects", "native", "--shapes", "2x32", "--launches"]
    measure.main([*command, "1"])
    for option, given in (("blocks_alone", ["--blocks-alone", "2x32"]), ("tp_plan", ["--tp-plan"])):
        with pytest.raises(SystemExit, match="1 launches failed"):
            measure.main([*command, "2", *given])
        assert f"has launches of it with 2x32: {option} False, here True; take another" in capsys.readouterr().out
    file = tmp_path / "sessions.json"
    found = json.loads(file.read_text())
    del found["llama2_7b tp2 native"]["sessions"]["2x32"]["long"]  # as an earlier version wrote it
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier/sessions.json").write_text(json.dumps(found))
    with pytest.raises(SystemExit, match="1 launches failed"):
        measure.main([str(tmp_path / "earlier"), *command[1:], "2"])
    assert "has launches of it with 2x32: long None, here False; take another" in capsys.readouterr().out
    monkeypatch.setattr(measure, "NEW_TOKENS", 9)
    with pytest.raises(SystemExit, match="1 launches failed"):
        measure.main([*command, "2"])
    assert "has launches of it with 2x32: new_tokens 4, here 9; take another folder" in capsys.readouterr().out
    assert len(launches.asked) == 1


def test_longer_shapes_of_large_models_are_repeated_half_as_often_and_left_out_where_they_do_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for free, there in ((150, [20, 6, 10, 2]), (84, [20, 6, 10])):
        has_memory(free * 10**9, monkeypatch)
        found = measure.fitting(architecture("llama2_70b"), 2, list(measure.SHAPES))
        assert [shape.repeats for shape in found.values()] == there
        assert [name for name, shape in found.items() if shape.long] == ["16x2048"][: len(there) - 3]
    assert "16x2048 does not fit: 8" in capsys.readouterr().out
    found = measure.fitting(architecture("llama2_7b"), 2, list(measure.SHAPES))
    assert found == measure.SHAPES


def test_tables_have_intervals_where_there_are_three_launches() -> None:
    for launches, ms, saved, part in (
        (1, "10.00 (2.00)", "10.0", "50"),
        (3, "11.00 (2.20)", "10.0 (10.0 to 10.0)", "50 (50 to 50)"),
    ):
        rows = pd.DataFrame(measure.rows_of(invented_session(launches), 6, model="small"))
        assert f"| small | 2 | native | 4 | prefill 128 | {ms} | {saved} |" in measure.table(rows)
        assert f"| small | 2 | native | {part} | {part} |" in measure.reached(rows)


def test_rows_name_every_all_reduce_that_was_chosen_and_what_their_intervals_are_worth() -> None:
    session, us = invented_session(3), {"one_shot": 7.0, "two_shot": 8.0}
    session["peak_memory_gb"] = [7.0, 7.5, 8.0]
    session["all_reduce"] = [
        {"tpot_ms": {"kind": kind, "us": us, "fell_back": {"nccl": "why"}}}
        for kind in ("one_shot", "two_shot", "two_shot")
    ]
    rows = pd.DataFrame(measure.rows_of(session, 6, model="small"))
    decode, prefill = (rows[rows["metric"] == metric].iloc[0] for metric in ("tpot_ms", "ttft_ms"))
    assert (decode["all_reduce"], decode["all_reduce_us"]) == ("one_shot, two_shot", 8)
    assert json.loads(decode["fell_back"]) == {"nccl": "why"}
    assert pd.isna(prefill["all_reduce"])
    assert [decode[f"peak_memory_gb_{name}"] for name in ("low", "median", "high")] == [7, 7.5, 8]
    assert decode["confidence"] == 0.75
