"""Sums over ranks, and ranks of the engine that sum: CPUs here, GPUs where there are any."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from gpu_models import NEW, every_family, prompts
from gpu_ranks import RANKS_DROP
from gpu_settings import SETTINGS, SHAPE, architecture, on_gpu, on_gpus
from safetensors.torch import save_file
from torch import Tensor

import spd
from spd.errors import UserError
from spd.gpu import all_reduce, latency
from spd.gpu.interconnect import ENVIRONMENT
from spd.launch import RankFailed, run_ranks


def test_an_all_reduce_that_fails_at_its_first_call_is_fallen_back_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = all_reduce.make

    def failing(local: Tensor) -> Tensor:
        raise RuntimeError("input size must be at least 4-byte aligned\nand more")

    monkeypatch.setattr(all_reduce, "make", lambda kind, *of: made(kind, *of) if kind == "nccl" else failing)
    monkeypatch.setattr(all_reduce, "_why_not", lambda *_, **__: None)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        _, found = all_reduce.choose("auto", [16], torch.float32, torch.device("cpu"))
    finally:
        dist.destroy_process_group()
    assert found[16]["kind"] == "nccl"
    why = "RuntimeError: input size must be at least 4-byte aligned"
    assert found[16]["fell_back"] == {"one_shot": why, "two_shot": why}


def test_an_all_reduce_that_cannot_be_is_said() -> None:
    with pytest.raises(UserError, match=r"latency.all_reduce='ring' is not known; known are nccl"):
        all_reduce.make("ring", 8, torch.float32, torch.device("cpu"))
    with pytest.raises(UserError, match=r"latency.all_reduce=one_shot needs GPUs"):
        all_reduce.make("one_shot", 8, torch.float32, torch.device("cpu"))


TWO, FOUR = ([f"cuda:{rank}" for rank in range(ranks)] for ranks in (2, 4))
ON_ONE_GPU, NO_LINKS = {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}, {"NCCL_P2P_DISABLE": "1"}


@pytest.mark.parametrize(
    ("kinds", "devices", "environment"),
    [
        pytest.param(["nccl"], ["cpu"] * 2, {}, id="two-cpus"),
        pytest.param(["nccl"], ["cpu"] * 4, {}, id="four-cpus"),
        # Both ranks on one GPU: its numbers are right, its times would mean nothing.
        pytest.param(
            ["one_shot", "two_shot"],
            ["cuda:0", "cuda:0"],
            ON_ONE_GPU,
            marks=[pytest.mark.gpu, on_gpu],
            id="symmetric-memory",
        ),
        pytest.param(list(all_reduce.KINDS), TWO, {}, marks=[pytest.mark.gpu, on_gpus(2)], id="two-gpus"),
        pytest.param(["nccl"], TWO, NO_LINKS, marks=[pytest.mark.gpu, on_gpus(2)], id="nccl-lbw"),
        pytest.param(list(all_reduce.KINDS), FOUR, {}, marks=[pytest.mark.gpu, on_gpus(4)], id="four-gpus"),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])  # of one sequence, products are Triton kernels too
@every_family
def test_ranks_with_their_all_reduce_give_what_virtual_ranks_give(
    folder: Path,
    batch: int,
    kinds: list[str],
    devices: list[str],
    environment: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids = prompts(folder, batch)
    virtual = spd.load(folder, tp_size=len(devices), dtype="float32")
    virtual.drop(RANKS_DROP)
    tokens, want = ids, []
    with torch.no_grad():
        for _ in range(NEW):
            want.append(virtual(tokens)[:, -1])
            tokens = torch.cat([tokens, want[-1].argmax(-1, keepdim=True)], 1)
    save_file({"ids": ids, "want": torch.stack(want, 1)}, tmp_path / "want.safetensors")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    asked = {"folder": str(folder), "want": str(tmp_path / "want.safetensors"), "kinds": kinds, "devices": devices}
    found = run_ranks(
        "gpu_ranks:compared",
        asked | {"tp_size": len(devices), "timeout_s": 200},
        tp_size=len(devices),
        timeout_s=300,
        environment=environment | {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"},
    )
    assert found["equal"] == kinds


@pytest.mark.gpu
@pytest.mark.parametrize(
    "devices", [pytest.param(TWO, marks=on_gpus(2), id="two"), pytest.param(FOUR, marks=on_gpus(4), id="four")]
)
@pytest.mark.parametrize(("dropped", "batch"), [([], 1), ([0, 2], 16)])
def test_gpus_captured_give_the_uncaptured_logits_and_64_tokens_at_a_published_width(
    devices: list[str], dropped: list[int], batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    asked = {"architecture": architecture("llama2_7b") | {"num_hidden_layers": 4}, "dropped": dropped}
    found = run_ranks(
        "gpu_ranks:as_uncaptured",
        asked
        | {"batch_size": batch, "prompt_length": 128, "tp_size": len(devices), "devices": devices, "timeout_s": 200},
        tp_size=len(devices),
        timeout_s=300,
        environment=ENVIRONMENT["native"] | {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"},
    )
    assert set(found["kinds"]) & {"one_shot", "two_shot"}
    # Both round, so they differ by as much as two roundings do.
    assert max(found["difference"]) <= 2 * max(found["rounding"])
    assert all(0 <= gap <= 2 * max(found["rounding"]) for gap in found["unsure"])
    assert len(found["unsure"]) <= 64 * batch / 8


@pytest.mark.gpu
@on_gpus(2)
def test_a_rank_that_fails_ends_one_that_waits_for_it_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with pytest.raises(RankFailed, match=r"rank 1 of 2 failed: RuntimeError: on purpose(.|\n)*raise_beside_a_graph"):
        run_ranks(
            "gpu_ranks:raise_beside_a_graph",
            {"tp_size": 2, "devices": TWO, "timeout_s": 200},
            tp_size=2,
            timeout_s=100,
        )


@pytest.mark.gpu
@on_gpu
def test_running_out_of_memory_names_the_rank_and_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    launched = []

    def instead(function: str, *arguments: object, **options: object) -> dict:
        launched.append(function)
        return run_ranks("gpu_ranks:out_of_memory", *arguments, **options)

    monkeypatch.setattr(latency, "run_ranks", instead)
    said = (
        r"rank 0 of 1 ran out of memory on cuda:0, .* free: .* Tried to allocate \S+ \S+\. .* this fits: something else"
    )
    with pytest.raises(UserError, match=said):
        latency.measure_gpu_latency(architecture("llama2_7b"), 1, {"0": []}, [SHAPE], **SETTINGS)
    assert launched == ["spd.gpu.rank:measure_rank"]
