"""A point of `latency=gpu`, whole: two ranks on two GPUs over NCCL, with direct links and without."""

import io
from pathlib import Path

import pytest
from gpu_settings import architecture, on_gpus
from rich.console import Console

from spd.config import DType, Interconnect, LatencyKind, RunConfig, Tracker, Weights
from spd.gpu import all_reduce
from spd.point import run_point
from spd.progress import Display


@pytest.mark.gpu
@on_gpus(2)
def test_points_of_two_gpus_share_a_session_with_their_links_and_without(tmp_path: Path) -> None:
    config = RunConfig(weights=Weights.random, output_dir=str(tmp_path))
    config.model.architecture, config.model.dtype = architecture("llama2_7b") | {"num_hidden_layers": 4}, DType.bfloat16
    config.parallel.tp_size, config.tracker.name = 2, Tracker.none
    config.latency.name, config.latency.drops = LatencyKind.gpu, [0.0, 0.5, 1.0]
    config.latency.batch_size, config.latency.new_tokens, config.latency.decode_at = 3, 4, 256
    config.latency.launches, config.latency.repeats = 1, 3
    found, output = {}, io.StringIO()
    for link in (Interconnect.native, Interconnect.lbw):
        config.interconnect.name = link
        for config.drop in (0.5, 1.0):
            with Display("point", Console(file=output, soft_wrap=True)) as display:
                record = run_point(config, display)
            assert record["status"] == "done", record["error"]
            found[link.name, config.drop] = record["latency"]
    assert output.getvalue().count("GPUs: 2\n") == 2  # a line of a step that began
    for (link, drop), entry in found.items():
        for metric in ("ttft_ms", "tpot_ms"):
            assert 1 < entry["over_floor"][metric] < 20
            assert entry["ceilings"][metric].keys() == {"no_attention_all_reduce", "no_all_reduce"}
            shares = entry["communication"][metric]
            assert 0 < shares["after"]["share"] < shares["before"]["share"] < 1, (link, drop)
            kinds = entry["all_reduce"][metric]
            assert kinds["kind"] == min(kinds["us"], key=kinds["us"].get)
            assert set(kinds["us"]) == (set(all_reduce.KINDS) if link == "native" else {"nccl"})
    native, lbw = (found[link, 1.0]["link"] for link in ("native", "lbw"))
    assert native["bandwidth_gb_per_s"] > 3 * lbw["bandwidth_gb_per_s"]
    assert native["small_message_us"] < lbw["small_message_us"]
    without = "this interconnect has no direct links"
    assert found["lbw", 1.0]["all_reduce"]["ttft_ms"]["fell_back"] == {"one_shot": without, "two_shot": without}
