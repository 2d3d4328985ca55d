"""CPU latency: one real session of two ranks, and the statistics on numbers made up here."""

import dataclasses
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spd
from spd import latency
from spd.config import LatencyConfig
from spd.errors import UserError
from spd.latency import _median_and_interval, _order_statistics, arm_order, measure_latency, measure_rank, summarise

SETTINGS: dict[str, Any] = dict(
    dtype=None,
    prompt_length=8,
    new_tokens=1,
    batch_size=1,
    launches=1,
    repeats=1,
    warmup=0,
    realtime=True,
    timeout_s=60,
)


def test_a_session_times_every_arm_in_every_launch(tiny_llama: Path) -> None:
    progress: list[tuple[int, int]] = []
    session = measure_latency(
        tiny_llama,
        2,
        {"dense": [], "half": [2], "all": [0, 1, 2]},
        **SETTINGS | dict(new_tokens=2, batch_size=2, launches=2, repeats=3, warmup=1),
        on_progress=lambda done, total: progress.append((done, total)),
    )
    session = json.loads(json.dumps(session))
    for metric in ("ttft_ms", "tpot_ms"):
        assert list(session[metric]) == ["dense", "half", "all"]
        times = np.array(list(session[metric].values()))
        assert times.shape == (3, 2, 3), "arms, launches, repeats"
        assert (times > 0).all()
    assert len(session["launch_s"]) == len(session["busy_percent"]) == 2
    assert set(session["scheduling"]) <= {"fifo", "default"}
    assert progress[-1] == (6, 6)
    assert progress == sorted(progress)

    entry = summarise(session, "all", baseline="dense")
    assert (entry["source"], entry["backend"], entry["device"]) == ("measured", "gloo", "cpu")
    assert entry["launches"] == 2
    assert entry["ttft_ms"]["median"] == np.median([np.median(times) for times in session["ttft_ms"]["all"]])


def test_every_arm_is_timed_with_its_own_blocks_dropped_and_the_slowest_rank_counts(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch.distributed as dist

    from spd.model import TensorParallelLM

    seen, arms, clock, corrected = [], {"0": [], "2": [0, 2], "3": [0, 1, 2]}, [0.0], []
    reduced: list[Any] = []
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    load, sum_over = spd.load, dist.all_reduce

    def loading(*given: Any, **named: Any) -> TensorParallelLM:
        model = load(*given, **named)
        model.hf.register_forward_pre_hook(lambda *_: seen.append(model.dropped))
        model.hf.register_forward_hook(lambda *_: clock.append(clock.pop() + 0.25))  # seconds that a forward takes
        return model

    def reducing(tensor: Any, op: Any = dist.ReduceOp.SUM) -> Any:
        reduced.append((tensor.ndim, op))
        return sum_over(tensor, op=op)

    monkeypatch.setattr(spd, "load", loading)
    monkeypatch.setattr(dist, "all_reduce", reducing)
    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(TensorParallelLM, "load_corrections", lambda model, file: corrected.append(file))
    asked = {
        "checkpoint": str(tiny_llama),
        "tp_size": 1,
        "arms": arms,
        "seed": 3,
        "corrections": "fixes",
        "new_tokens": 3,
    }
    try:
        found = measure_rank(SETTINGS | asked | {"repeats": 4}, lambda done, total: None)
    finally:
        dist.destroy_process_group()
    forwards = [list(arms.values())[place] for repeat in range(4) for place in arm_order(3, repeat, 3)]
    assert seen == [tuple(dropped) for dropped in forwards for _ in range(1 + 3)]
    assert corrected == [Path("fixes")]
    assert (3, dist.ReduceOp.MAX) in reduced
    assert [found[metric][arm] for metric in ("ttft_ms", "tpot_ms") for arm in arms] == 6 * [4 * [250.0]]


def test_launches_of_one_machine_never_overlap_and_who_waits_says_so(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    running, most = [0], [0]

    def launch(function: str, arguments: dict[str, Any], **_: Any) -> dict[str, Any]:
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.1)
        running[0] -= 1
        return {"scheduling": "default", "ttft_ms": {"dense": [1.0]}, "tpot_ms": {"dense": [1.0]}}

    monkeypatch.setattr(latency, "run_ranks", launch)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    said: list[str] = []
    settings = SETTINGS | {"launches": 2, "say": said.append}
    with ThreadPoolExecutor() as pool:
        sessions = [pool.submit(measure_latency, tiny_llama, 2, {"dense": []}, **settings) for _ in range(2)]
    assert [len(session.result()["launch_s"]) for session in sessions] == [2, 2]
    assert most == [1]
    assert set(said) == {"Waiting for another process that measures latency on this machine."}


def test_every_family_can_be_timed(
    checkpoint: Callable[..., Path], family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # One rank, in this process: what torchrun would set, without its start.
    import torch.distributed as dist

    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        settings = dict(tp_size=1, dtype=None, prompt_length=8, new_tokens=3, batch_size=2, repeats=2, warmup=0)
        arms = {"dense": [], "one": [1]}
        own = {"checkpoint": str(checkpoint(family)), "arms": arms, "seed": 0, "realtime": False}
        times = measure_rank(settings | own, lambda done, total: None)
    finally:
        dist.destroy_process_group()
    assert times["scheduling"] == "default"
    assert {arm: len(found) for arm, found in times["tpot_ms"].items()} == {"dense": 2, "one": 2}


def test_a_block_that_does_not_exist_is_refused_before_any_launch(tiny_llama: Path) -> None:
    with pytest.raises(UserError, match=r"drops block 7, but .* has blocks 0 to 2"):
        measure_latency(tiny_llama, 1, {"dense": [], "odd": [1, 7]}, **SETTINGS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"launches": 0}, "latency.launches must be at least 1, got 0"),
        ({"new_tokens": 0}, "latency.new_tokens must be at least 1"),
        ({"prompt_length": 60, "new_tokens": 5}, "is 65, but .* takes at most 64 tokens"),
        ({"port": 99999}, "port 99999 does not exist"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_any_launch(
    tiny_llama: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        measure_latency(tiny_llama, 2, {"dense": []}, **SETTINGS | changes)


def test_a_setting_has_its_default_in_the_configuration_and_nowhere_else() -> None:
    ours = {item.name for item in dataclasses.fields(LatencyConfig)} & set(signature(measure_latency).parameters)
    assert ours == set(SETTINGS) - {"dtype"}
    assert all(signature(measure_latency).parameters[name].default is Parameter.empty for name in SETTINGS)


@pytest.mark.parametrize("num_arms", [1, 2, 3, 7])
def test_a_steady_drift_falls_on_all_arms_alike(num_arms: int) -> None:
    repeats = 6
    places = np.array(
        [np.argsort(arm_order(num_arms, repeat, seed=1)) for repeat in range(repeats)]
    )  # [repeat, arm] -> position
    assert all(sorted(row) == list(range(num_arms)) for row in places.tolist())
    assert len(set(places.sum(axis=0).tolist())) == 1


def test_every_arm_follows_every_other_one_sooner_or_later_in_an_order_of_each_launch() -> None:
    orders = [arm_order(7, repeat, seed=0) for repeat in range(40)]
    assert {pair for order in orders for pair in itertools.pairwise(order)} == set(itertools.permutations(range(7), 2))
    assert orders == [arm_order(7, repeat, seed=0) for repeat in range(40)]
    assert orders != [arm_order(7, repeat, seed=1) for repeat in range(40)]


def made_up_session(launches: int) -> dict[str, Any]:
    """Launches that differ twofold while the arm takes exactly 80 % of the baseline in each."""
    rng = np.random.default_rng(3)
    speeds = rng.uniform(10, 20, size=launches)
    dense = [(speed * np.array([1.0, 0.9, 1.1])).tolist() for speed in speeds]
    arm = [(0.8 * np.array(times)).tolist() for times in dense]
    fields = dict(source="measured", backend="gloo", device="cpu", repeats=3, prompt_length=128, batch_size=1)
    times = {"dense": dense, "all": arm}
    return {
        **fields,
        "launches": launches,
        "new_tokens": 4,
        "threads_per_rank": 1,
        "scheduling": ["default"] * launches,
        "busy_percent": [1.0] * launches,
        "ttft_ms": times,
        "tpot_ms": times,
    }


def test_speed_up_is_paired_by_launch() -> None:
    entry = summarise(made_up_session(5), "all", baseline="dense")
    for name in ("ttft_speedup_percent", "tpot_speedup_percent"):
        assert entry[name] == pytest.approx({"median": 20.0, "low": 20.0, "high": 20.0})
    time = entry["ttft_ms"]
    assert time["low"] < time["median"] < time["high"], "the launches themselves differ"
    assert min(entry["per_launch"]["ttft_ms"]) <= time["low"]
    assert time["high"] <= max(entry["per_launch"]["ttft_ms"])
    assert len(entry["per_launch"]["ttft_speedup_percent"]) == 5


@pytest.mark.parametrize(
    ("launches", "from_each_end", "confidence"),
    [(3, 1, 0.75), (5, 1, 0.9375), (6, 1, 0.96875), (8, 1, 0.9921875), (9, 2, 0.9609375), (10, 2, 0.978515625)],
)
def test_an_interval_says_how_sure_it_is(launches: int, from_each_end: int, confidence: float) -> None:
    entry = summarise(made_up_session(launches), "all", baseline="dense")
    assert entry["confidence"] == pytest.approx(confidence)
    medians = sorted(entry["per_launch"]["ttft_ms"])
    assert entry["ttft_ms"]["low"] == medians[from_each_end - 1]
    assert entry["ttft_ms"]["high"] == medians[-from_each_end]
    assert entry["ttft_ms"]["median"] == np.median(medians)


def test_the_stated_confidence_is_how_often_the_interval_holds_the_median() -> None:
    rng = np.random.default_rng(0)
    for launches in (3, 5, 9):
        held = 0
        for values in rng.exponential(size=(4000, launches)):
            interval = _median_and_interval(values.tolist())
            held += interval["low"] <= np.log(2) <= interval["high"]
        assert held / 4000 == pytest.approx(_order_statistics(launches)[1], abs=0.02)


def test_the_baseline_has_no_speed_up_over_itself() -> None:
    entry = summarise(made_up_session(3), "dense", baseline="dense")
    assert entry["ttft_speedup_percent"] == {"median": 0.0, "low": 0.0, "high": 0.0}


def test_two_launches_give_a_median_without_an_interval() -> None:
    entry = summarise(made_up_session(2), "all", baseline="dense")
    assert entry["ttft_ms"]["median"] > 0
    assert (entry["ttft_ms"]["low"], entry["ttft_ms"]["high"]) == (None, None)
    assert entry["confidence"] is None


def test_the_same_session_gives_the_same_entry() -> None:
    session = made_up_session(4)
    assert summarise(session, "all", "dense") == summarise(session, "all", "dense")
    json.dumps(summarise(session, "all", "dense"), allow_nan=False)
