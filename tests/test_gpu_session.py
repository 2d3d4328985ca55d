"""Sessions of `latency=gpu`: what is reported of one, whole ones on CPU ranks, and on a GPU."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from gpu_settings import REFERENCE, SETTINGS, SHAPE, SMALL, architecture, has_memory, invented_session, on_gpu

from experiments.gpu_latency.measure import rows_of, table
from spd.errors import UserError
from spd.gpu import rank
from spd.gpu.latency import BLOCKS, CEILINGS, Shape, measure_gpu_latency, merged
from spd.gpu.limits import Rates
from spd.gpu.model import GraphModel
from spd.gpu.summary import _bootstrap, _level, summarise


def test_a_session_is_reported_with_intervals_ceilings_and_floors() -> None:
    found = summarise(invented_session(), "6")
    assert found["ttft_ms"]["median"] == pytest.approx(9 * 1.2)
    assert 9 <= found["ttft_ms"]["low"] < 10.8 < found["ttft_ms"]["high"] <= 9 * 1.4
    assert found["ttft_ms"]["p10"] < found["ttft_ms"]["low"]
    # A launch's own pace falls out of the speed-up.
    assert found["ttft_speedup_percent"] == pytest.approx({"median": 10, "low": 10, "high": 10})
    assert found["ceilings"]["tpot_ms"]["no_all_reduce"]["median"] == pytest.approx(40)
    for part in found["fraction_of_ceiling"].values():
        assert part == pytest.approx({"median": 0.5, "low": 0.5, "high": 0.5})
    session = invented_session()
    session["ttft_ms"]["no_attention_all_reduce"][2] = session["ttft_ms"]["0"][2]  # saves nothing in one launch
    assert summarise(session, "6")["fraction_of_ceiling"]["ttft_ms"] is None
    assert found["confidence"] == 1 - 0.5**4
    assert found["over_floor"]["ttft_ms"] == pytest.approx(10.8 / 4.5)
    assert found["communication"]["tpot_ms"]["before"]["share"] == 0.1
    assert found["communication"]["tpot_ms"]["after"]["share"] == 0.09
    assert found["tokens_per_s"]["median"] == pytest.approx(4000 / 10.8)
    assert found["peak_memory_gb"] == {"median": 7, "low": 7, "high": 7, "p10": 7, "p90": 7}
    assert found["blocks_ms"] is None
    assert json.loads(json.dumps(found)) == found


def test_an_interval_holds_the_median_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    for launches in (3, 6, 7, 12):
        held = 0
        for values in rng.exponential(size=(300, launches)):
            interval = _bootstrap(values.tolist())
            held += interval["low"] <= np.log(2) <= interval["high"]
        _, confidence = _level(launches)
        assert (confidence >= 0.95) == (launches >= 6)
        assert held / 300 > confidence - 0.04
        assert launches < 12 or held / 300 < 0.995, "their range would hold it nearly always"


def test_transformers_times_are_beside_the_arms() -> None:
    session = invented_session()
    session["tp_plan"] = {metric: [[40.0, 45.0, 60.0]] * 5 for metric in ("ttft_ms", "tpot_ms")}
    found = summarise(session, "6")["tp_plan"]
    assert found["ttft_ms"]["median"] == 45
    assert found["times_ours"]["ttft_ms"]["median"] == pytest.approx(45 / 10.8)
    assert "tp_plan" not in summarise(invented_session(), "6")


def test_transformers_has_no_tensor_parallelism_for_opt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    shape = SHAPE._replace(decode_at=32)
    with pytest.raises(UserError, match="transformers has no tp_plan for opt"):
        measure_gpu_latency({"model_type": "opt", **SMALL["opt"]}, 2, {"0": []}, [shape], **SETTINGS, tp_plan=True)


def test_fewer_than_three_launches_have_no_interval() -> None:
    found = summarise(invented_session(2), "6")
    assert found["confidence"] is None
    assert found["tpot_ms"]["low"] is None
    assert found["tpot_ms"]["median"] == pytest.approx(9 * 1.05)


@pytest.fixture(scope="module")
def sessions() -> tuple[list[dict], list[tuple[int, int]]]:
    """Two CPU ranks over gloo, two launches of two shapes; nothing is compiled or captured."""
    seen: list[tuple[int, int]] = []
    shapes = [SHAPE, Shape(batch_size=1, prompt_length=150, decode_at=None, repeats=2, long=True)]
    found = measure_gpu_latency(
        {"model_type": "llama", **SMALL["llama"]}, 2, {"0": [], "3": [0, 1, 2]}, shapes, devices=["cpu", "cpu"],
        on_progress=lambda *done: seen.append(done), **SETTINGS | {"launches": 2}
    )  # fmt: skip
    return found, seen


def test_a_launch_times_every_phase_of_every_arm_at_every_shape(sessions: tuple[list[dict], list]) -> None:
    found, seen = sessions
    assert seen[-1] == (12, 12)
    for session, repeats in zip(found, (4, 2), strict=True):
        for phase in ("ttft_ms", "tpot_ms", *BLOCKS) if session is found[0] else ("ttft_ms",):
            assert set(session[phase]) == {"0", "3", *CEILINGS}
            for launches in session[phase].values():
                assert [len(times) for times in launches] == [repeats, repeats]
                assert all(ms > 0 for times in launches for ms in times)
    assert [session["batch_size"] for session in found] == [2, 1]
    assert found[0]["launch_s"] == found[1]["launch_s"]
    assert (found[0]["device"], found[0]["backend"]) == ("cpu", "gloo")


def test_a_sessions_floor_counts_bytes_products_and_every_all_reduce(sessions: tuple[list[dict], list]) -> None:
    session = sessions[0][0]
    reduce_ms, choice_ms = (session["all_reduce"][0][of]["us"]["nccl"] / 1e3 for of in ("tpot_ms", "choice"))
    floors = session["floor_ms"][0]["tpot_ms"]
    per_forward = {"0": 6, "3": 3, "no_attention_all_reduce": 3, "no_all_reduce": 0}
    for arm, number in per_forward.items():
        expected = number * reduce_ms + choice_ms if number else 0
        assert floors[arm] - floors["no_all_reduce"] == pytest.approx(expected, abs=2e-4)
    assert floors["no_all_reduce"] > 0
    fell_back = session["all_reduce"][0]["tpot_ms"]["fell_back"]
    assert fell_back == {"one_shot": "there is no GPU", "two_shot": "there is no GPU"}


def test_a_session_has_an_entry_for_every_arm(sessions: tuple[list[dict], list]) -> None:
    for session in sessions[0]:
        found = summarise(session, "3")
        prefill_alone = session is sessions[0][1]
        assert (
            (found["blocks_ms"] is None) == (found["tokens_per_s"] is None) == ("tpot_ms" not in found) == prefill_alone
        )
        if not prefill_alone:
            assert found["tokens_per_s"]["p10"] <= found["tokens_per_s"]["median"] <= found["tokens_per_s"]["p90"]
        assert found["communication"]["ttft_ms"] == {"before": None, "after": None}  # kernels are a GPU's
        assert json.loads(json.dumps(found)) == found


def test_of_long_forwards_nothing_and_everything_dropped_is_profiled_alone(sessions: tuple[list[dict], list]) -> None:
    short, long = (set(session["communication"][0]["ttft_ms"]) for session in sessions[0])
    assert short == {"0", "3", *CEILINGS}
    assert long == {"0", "3"}


def measure_one_rank(
    shape: Shape, folder: Path, monkeypatch: pytest.MonkeyPatch, arms: tuple[str, ...] = ("0",)
) -> dict:
    """On a CPU and in this process: what the rank found of the shape. An arm's name is how many blocks it drops."""
    monkeypatch.setenv("RANK", "0")
    start = partial(dist.init_process_group, init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    monkeypatch.setattr(dist, "init_process_group", start)
    try:
        found = rank.measure_rank(
            SETTINGS | {
                "tp_size": 1, "checkpoint": None, "architecture": {"model_type": "llama", **SMALL["llama"]},
                "shapes": [shape._asdict()], "devices": ["cpu"], "began": 0, "seed": 0, "profile": False,
                "arms": {name: {"dropped": list(range(int(name))), "left_out": {}} for name in arms},
            },
            lambda done, total: None,
        )  # fmt: skip
        return found["shapes"][0]
    finally:
        dist.destroy_process_group()


def test_a_floor_is_the_longer_of_bytes_over_bandwidth_and_products_over_the_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # SMALL's llama: 3 blocks of two norms, q, k and v of 8 + 2 x 2 heads of 8, the output product, gate, up and down.
    products = 64 * 8 * (8 + 2 * 2) + 64 * 64 + 3 * 64 * 128
    blocks, head = 3 * (2 * 64 + products), 50 * 64
    batch, prompt, at, size = 2, 32, 64, 2
    keys_and_values = 3 * 2 * batch * 2 * at * 8
    for bandwidth, flops in ((1e9, 1e30), (1e30, 1e12)):
        rates = Rates(bandwidth, flops)
        monkeypatch.setattr(Rates, "measured", lambda *_, rates=rates: rates)
        folder = tmp_path / f"{flops:g}"
        folder.mkdir()
        floor = measure_one_rank(Shape(batch, prompt, at, repeats=2), folder, monkeypatch)["floor_ms"]
        read = size * (blocks + head)
        if bandwidth == 1e9:
            assert floor["ttft_ms"]["0"] == pytest.approx(1e3 * read / 1e9, abs=1e-4)
            assert floor["tpot_ms"]["0"] == pytest.approx(1e3 * (read + size * keys_and_values) / 1e9, abs=1e-4)
        else:  # norms are counted with the products, and are a thousandth of them
            assert floor["ttft_ms"]["0"] == pytest.approx(2e3 * batch * (prompt * blocks + head) / 1e12, abs=1e-4)
            assert floor["tpot_ms"]["0"] == pytest.approx(2e3 * batch * (blocks + head) / 1e12, abs=1e-4)


def test_arms_are_timed_there_and_back_from_their_position_and_a_token_is_one_of_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[tuple[str, int, int]] = []
    dropped = {frozenset(range(n)): str(n) for n in (0, 1, 3)}
    current: list[tuple[str, str]] = []
    captured = rank._captured

    def told(*given: Any) -> dict:
        return {key: lambda key=key, run=run: (current.append(key), run()) for key, run in captured(*given).items()}

    def events_ms(run: Callable[[], object], times: int) -> float:
        position = models[0].position.item()
        run()
        timed.append((*current[-1], times, position))
        return 10.0 * int(current[-1][1]) + times

    models: list[GraphModel] = []
    made = GraphModel.__init__
    monkeypatch.setattr(GraphModel, "__init__", lambda model, *a, **b: (models.append(model), made(model, *a, **b))[0])
    monkeypatch.setattr(rank, "_captured", told)
    monkeypatch.setattr(rank, "events_ms", events_ms)
    monkeypatch.setattr(rank.Rates, "measured", lambda *_: Rates(1e9, 1e12))
    found = measure_one_rank(Shape(2, 32, 64, repeats=4), tmp_path, monkeypatch, arms=tuple(dropped.values()))
    of_repeats = timed[2 + 2 * 3 :]  # after how long a forward takes, and a round of warm-up
    order = [name for phase, name, *_ in of_repeats if phase == "ttft_ms"]
    rounds = [order[3 * i : 3 * i + 3] for i in range(4)]
    assert [rounds[1], rounds[3]] == [rounds[0][::-1], rounds[2][::-1]]
    assert all(sorted(some) == ["0", "1", "3"] for some in rounds)
    assert {position for *_, position in of_repeats} == {64}
    assert {(phase, times) for phase, _, times, _ in of_repeats} == {("ttft_ms", 1), ("tpot_ms", 4)}
    for phase, times in (("ttft_ms", 1), ("tpot_ms", 4)):
        assert {name: found[phase][name] for name in ("0", "1", "3")} == {
            name: [10.0 * int(name) + times] * 4 for name in ("0", "1", "3")
        }


def test_ranks_wait_for_each_other_no_longer_than_a_launch_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []
    monkeypatch.setattr(dist, "init_process_group", lambda kind, timeout, device_id: waits.append(timeout))
    for seconds in (20, 4000):
        rank.start({"devices": ["cpu"], "tp_size": 1, "timeout_s": seconds}, 0)
    assert [wait.total_seconds() for wait in waits] == [20, 300]


@pytest.mark.parametrize(
    ("long", "short_ms", "forwards"),
    [
        pytest.param(False, 1e6, 1 + 2 * (1 + 2), id="short"),
        pytest.param(False, 0, 1 + 1 + 2, id="not short"),
        pytest.param(True, 0, 1 + 2, id="long"),
    ],
)
def test_a_forward_that_is_not_timed_precedes_each_short_one(
    long: bool, short_ms: float, forwards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first tells how long a forward takes; then a round of warm-up and two repeats.
    monkeypatch.setattr(rank, "SHORT_MS", short_ms)
    ran = []
    prefill = GraphModel.prefill
    monkeypatch.setattr(GraphModel, "prefill", lambda model, arm: ran.append(arm) or prefill(model, arm))
    measure_one_rank(Shape(1, 8, decode_at=None, repeats=2, long=long), tmp_path, monkeypatch)
    assert len(ran) == forwards


def test_running_out_of_memory_says_how_much_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 344.00 MiB. GPU 0 has a total capacity of 79.18 GiB of which 1.2 GiB"
        )

    monkeypatch.setattr(GraphModel, "prefill", full)
    said = (
        r"^rank 0 of 1 ran out of memory on cpu, .* free: CUDA out of memory\. Tried to allocate 344.00 MiB\. By what"
    )
    with pytest.raises(UserError, match=said):
        measure_one_rank(SHAPE, tmp_path, monkeypatch)


def test_rows_of_a_session_are_its_arms_ceilings_and_phases(sessions: tuple[list[dict], list]) -> None:
    rows = pd.DataFrame([row for session in sessions[0] for row in rows_of(session, 3, model="small")])
    assert len(rows) == 3 * 4
    assert set(rows["drop"].dropna()) == {0, 1}
    assert (rows[["median_ms", "floor_ms", "over_floor"]] > 0).all(axis=None)
    shown = table(rows)
    assert "| small | 2 | native | 2 | prefill 32 |" in shown
    assert "| TP, ms (times its floor) | 100 % | no attention all-reduce | no all-reduce |" in shown


def test_transformers_own_ranks_are_timed_in_launches_of_their_own() -> None:
    model = {"model_type": "llama", **SMALL["llama"]}
    (session,) = measure_gpu_latency(
        model, 2, {"0": []}, [SHAPE], devices=["cpu", "cpu"], tp_plan=True, **SETTINGS | {"dtype": "float32"}
    )
    assert [len(times) for times in session["tp_plan"]["ttft_ms"]] == [4]
    assert summarise(session, "0")["tp_plan"]["times_ours"]["tpot_ms"]["median"] > 0
    last = pd.DataFrame(rows_of(session, 3, model="small")).iloc[-1]
    assert last["arm"] == "tp_plan"
    assert 0 < last["p10_ms"] <= last["median_ms"] <= last["p90_ms"]
    assert pd.isna(last["floor_ms"])
    assert last["times_ours_median"] > 0


def test_sessions_of_other_launches_are_put_together(sessions: tuple[list[dict], list]) -> None:
    for session in sessions[0]:
        whole = merged(session, session)
        assert whole["launches"] == 4
        assert summarise(whole, "3")["confidence"] == 0.875
        for name, value in session.items():
            of_launches = isinstance(value, list) and name not in ("metrics", "ceilings")
            assert whole[name] == (value + value if of_launches else whole[name])
            if name.endswith("_ms") and isinstance(value, dict):
                assert whole[name] == {arm: times + times for arm, times in value.items()}


def test_ranks_that_cannot_share_a_model_evenly_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(UserError, match=r"tp_size=8 does not cut this model evenly: it has 28 heads.* 1, 2, 4\."):
        measure_gpu_latency(architecture("qwen2.5_7b"), 8, {"0": []}, [SHAPE], **SETTINGS)


def test_a_model_that_no_such_gpu_can_hold_is_refused_before_a_rank_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    has_memory(8 * 10**10, monkeypatch)
    shapes = [Shape(1, 128, 256, 2), Shape(16, 2048, None, 2)]  # the first would fit
    with pytest.raises(UserError, match=r"rank 0 of 2 needs .* and cuda:0 has 80.00 GB in all.*parallel.tp_size=4"):
        measure_gpu_latency(architecture("llama2_70b"), 2, {"0": []}, shapes, **SETTINGS)


def test_positions_that_a_model_has_not_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="up to position 68, and this model takes 64"):
        measure_gpu_latency({"model_type": "opt", **SMALL["opt"]}, 2, {"0": []}, [SHAPE], **SETTINGS)


@pytest.mark.parametrize(
    ("at", "prompt", "reach", "cache"),
    [(256, 128, 384, 384), (256, 2048, 384, 2048), (2048, 2048, 2176, 2176), (None, 2048, None, 2048)],
)
def test_decoding_looks_no_further_than_its_position(
    at: int | None, prompt: int, reach: int | None, cache: int
) -> None:
    shape = Shape(1, prompt, decode_at=at, repeats=1)
    assert (shape.reach(8), shape.cache_length(8)) == (reach, cache)


@pytest.mark.gpu
@on_gpu
def test_one_gpu_gives_a_whole_session() -> None:
    seen: list[tuple[int, int]] = []
    arms = {"0": [], "6": [0, 1, 2, 3, 4, 5]}
    session, longer = measure_gpu_latency(
        REFERENCE, 1, arms, [SHAPE, Shape(1, 200, 20, 3)], **SETTINGS,
        on_progress=lambda *done: seen.append(done)
    )  # fmt: skip
    assert seen[-1] == (7, 7)
    assert summarise(longer, "6")["ttft_ms"]["median"] > 0
    whole = summarise(session, "6")
    assert all(whole["blocks_ms"][metric]["median"] < whole[metric]["median"] for metric in whole["blocks_ms"])
    found = summarise(session, "6")
    for metric in ("ttft_ms", "tpot_ms"):
        assert 0 < found["floor_ms"][metric] < found[metric]["median"] < 100
        assert found["communication"][metric]["before"]["share"] == 0
        assert found["communication"][metric]["before"]["busy"] > 0.1
    assert found["peak_memory_gb"]["median"] > 0.01
    assert found["all_reduce"] == {}


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("model", [REFERENCE, {"model_type": "llama", **SMALL["llama"]}], ids=["checkpoint", "random"])
def test_transformers_own_tensor_parallelism_is_timed_beside_the_arms(model: Path | dict) -> None:
    (session,) = measure_gpu_latency(model, 1, {"0": []}, [SHAPE], **SETTINGS, tp_plan=True)
    found = summarise(session, "0")["tp_plan"]
    for metric in ("ttft_ms", "tpot_ms"):
        assert found[metric]["median"] > 0
        assert found["times_ours"][metric]["median"] > 1


@pytest.mark.gpu
@on_gpu
def test_two_ranks_sum_with_the_quickest_kind_that_works_and_say_what_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    # Both ranks on one GPU, which NCCL refuses: everything is right but the times.
    monkeypatch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
    everything = list(range(12))
    (session,) = measure_gpu_latency(
        REFERENCE, 2, {"0": [], "12": everything}, [SHAPE], **SETTINGS, devices=["cuda:0", "cuda:0"]
    )
    found = summarise(session, "12")
    for metric in ("ttft_ms", "tpot_ms"):
        chosen = found["all_reduce"][metric]
        assert chosen["kind"] == min(chosen["us"], key=chosen["us"].get)
        assert "NCCL refuses" in chosen["fell_back"]["nccl"]
        shares = session["communication"][0][metric]
        assert shares["0"]["share"] > shares["12"]["share"] > 0
        assert shares["no_all_reduce"]["share"] == 0
        timelines = session["timeline"][0][metric]
        assert sum(kernel["communicates"] for kernel in timelines["0"]) == 2
        assert sum(kernel["communicates"] for kernel in timelines["12"]) == 1


@pytest.mark.gpu
@on_gpu
def test_a_model_that_does_not_fit_is_refused_by_its_rank() -> None:
    with pytest.raises(UserError, match=r"rank 0 of 1 needs .* GB in all, .*would fit"):
        measure_gpu_latency(architecture("llama2_70b"), 1, {"0": []}, [SHAPE, Shape(128, 32, 3000, 1)], **SETTINGS)


@pytest.mark.gpu
@on_gpu
def test_an_all_reduce_that_does_not_work_here_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"latency\.all_reduce=nccl does not work here .*share a GPU"):
        measure_gpu_latency(
            REFERENCE, 2, {"0": []}, [SHAPE], **SETTINGS | {"all_reduce": "nccl"}, devices=["cuda:0", "cuda:0"]
        )
