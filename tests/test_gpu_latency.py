"""`latency=gpu`: what it needs, what it refuses, and where the time of a forward is said to go."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_settings import REFERENCE, SETTINGS, SHAPE, SMALL, architecture, has_memory
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from spd import inputs
from spd.checkpoint import read_architecture
from spd.config import AllReduceKind, DType, Interconnect, LatencyKind, RunConfig, Strategy, Weights
from spd.errors import UserError
from spd.families import family_of
from spd.gpu import memory
from spd.gpu.interconnect import ENVIRONMENT
from spd.gpu.latency import Shape, measure_gpu_latency
from spd.gpu.model import GraphModel
from spd.gpu.profile import Kernel, between_marks, block_timeline, communication
from spd.results import Results
from spd.steps import RandomSteps

PARAMETERS = {
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "opt_6.7b": 6_658_473_984,
    "opt_13b": 12_853_473_280,
    "opt_30b": 29_974_540_288,
    "opt_66b": 65_719_701_504,
    "qwen2.5_7b": 7_615_616_512,
}


def random_config(**changes) -> RunConfig:
    config = RunConfig(weights=Weights.random)
    config.latency.name = LatencyKind.gpu
    config.model.architecture = {"model_type": "llama", **SMALL["llama"]}
    config.parallel.tp_size, config.model.dtype = 2, DType.bfloat16
    for name, value in changes.items():
        holder, _, last = name.rpartition("__")
        setattr(getattr(config, holder) if holder else config, last, value)
    return config


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_published_size_has_as_many_parameters_as_the_original(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(read_architecture(architecture(name)))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("model_type", SMALL)
def test_what_a_rank_is_said_to_need_is_what_its_model_holds(model_type: str, tp_size: int) -> None:
    config = read_architecture({"model_type": model_type, **SMALL[model_type]})
    family = family_of(config)
    model = GraphModel(
        config,
        family,
        tp_size,
        tp_size - 1,
        batch_size=3,
        prompt_length=7,
        cache_length=16,
        device="cpu",
        compiled=False,
    )
    said = memory.needed(config, family, tp_size, 3, 7, 16, torch.bfloat16)
    assert said.cache == sum(cache.nbytes for pair in model.cache for cache in pair)
    outside = [model.embedding, *model.final_norm, model.positions]
    outside += [] if config.tie_word_embeddings else [model.head]
    # OPT's table of positions has two rows that no position uses.
    unused = 2 * 64 * 2 if model_type == "opt" else 0
    held = sum(tensor.nbytes for tensor in outside if tensor is not None)
    assert said.weights == held + sum(block.bytes for block in model.blocks) + unused


def test_a_model_too_large_for_its_gpu_is_refused_with_what_would_fit() -> None:
    config = read_architecture(architecture("llama2_70b"))
    shape = {"config": config, "family": family_of(config), "prompt_length": 128, "cache_length": 512}
    shape |= {"dtype": torch.bfloat16, "batch_size": 16}
    with pytest.raises(UserError) as refused:
        memory.check_memory(1, 2, torch.device("cuda", 1), int(76e9), "free", **shape)
    said = str(refused.value)
    assert said.startswith("rank 1 of 2 needs 72.96 GB")
    assert "of weights" in said
    assert "cuda:1 has 76.00 GB free, of which a twentieth is kept" in said
    assert "latency.batch_size=8 or parallel.tp_size=4 would fit" in said
    with pytest.raises(UserError, match=r"nothing of this model fits; one sequence at this tp_size takes 7[12]"):
        memory.check_memory(0, 2, torch.device("cuda", 0), int(1e9), "free", **shape)
    memory.check_memory(0, 2, torch.device("cuda", 0), int(80e9), "free", **shape)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_gpus_is_told_before_any_work() -> None:
    with pytest.raises(
        UserError, match=r"latency=gpu needs a GPU for each of parallel.tp_size=2 ranks, and torch sees 0"
    ):
        inputs.check(random_config())
    config = RunConfig()
    config.latency.name, config.model.path = LatencyKind.gpu, "nowhere/at all"
    with pytest.raises(UserError, match="torch sees 0"):
        inputs.check(config)
    with pytest.raises(UserError, match="torch sees 0"):
        measure_gpu_latency(REFERENCE, 2, {"0": []}, [SHAPE], **SETTINGS)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"latency__name": LatencyKind.none}, "write latency=gpu"),
        ({"model__architecture": {}}, "needs model.architecture"),
        ({"weights": Weights.checkpoint}, "model.path is empty"),
        ({"interconnect__name": Interconnect.lbw, "latency__all_reduce": AllReduceKind.one_shot}, "all_reduce=nccl"),
        ({"strategy__name": Strategy.zs_correction}, "has no corrections; write latency=cpu"),
        ({"latency__decode_at": 0}, "latency.decode_at=0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes: dict, said: str) -> None:
    random_config().check()
    with pytest.raises(UserError, match=said):
        random_config(**changes).check()


def test_a_slower_interconnect_is_only_between_gpus() -> None:
    config = RunConfig()
    config.model.path, config.interconnect.name = "a/b", Interconnect.lbw
    with pytest.raises(UserError, match="interconnect=lbw is between GPUs; write latency=gpu"):
        config.check()


def test_an_architecture_that_cannot_be_is_named() -> None:
    with pytest.raises(UserError, match="The model family 'gpt9' is not known"):
        read_architecture({"model_type": "gpt9"})
    with pytest.raises(UserError, match=r"model\.architecture is no llama config"):
        read_architecture({"model_type": "llama", "hidden_size": "wide"})


def test_positions_beyond_the_models_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    has_memory(8 * 10**10, monkeypatch)
    with pytest.raises(
        UserError, match=r"latency.decode_at \+ latency.new_tokens is 2008, and model takes 64 positions"
    ):
        inputs.check(
            random_config(
                model__architecture={"model_type": "opt", **SMALL["opt"]},
                latency__decode_at=2000,
                latency__prompt_length=8,
            )
        )


@pytest.mark.parametrize(
    ("setting", "value"),
    [("word_embed_proj_dim", 32), ("_remove_final_layer_norm", True), ("layer_norm_elementwise_affine", False)],
)
def test_variants_of_opt_that_the_engine_has_not_are_refused(
    setting: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_memory(8 * 10**10, monkeypatch)
    opt = {"model_type": "opt", **SMALL["opt"]}
    with pytest.raises(UserError, match=rf"{setting}={value}, which latency=gpu's engine does not know; write"):
        inputs.check(random_config(model__architecture=opt | {setting: value}, latency__prompt_length=8))
    with pytest.raises(UserError, match=setting):
        measure_gpu_latency(opt | {setting: value}, 2, {"0": []}, [SHAPE], **SETTINGS)


def test_random_weights_drop_the_last_blocks_and_read_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    has_memory(8 * 10**10, monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    config = random_config(drop=0.5)
    inputs.check(config)
    point = RandomSteps(config, Results(tmp_path), None)
    assert point.plan(0.0).dropped == []
    assert point.plan(0.5).dropped == [1, 2]
    assert point.plan(1.0).dropped == [0, 1, 2]
    other = random_config(drop=0.5)
    other.data.path, other.seed = "elsewhere.txt", 5
    assert RandomSteps(other, Results(tmp_path), None).key == point.key
    other.interconnect.name = Interconnect.lbw
    assert RandomSteps(other, Results(tmp_path), None).key != point.key


def test_what_does_not_fit_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    has_memory(10**9, monkeypatch)
    with pytest.raises(UserError, match=r"rank 0 of 2 needs .* and cuda:0 has 1.00 GB in all"):
        inputs.check(random_config())
    config = RunConfig()
    config.model.path, config.parallel.tp_size, config.latency.name = str(REFERENCE), 2, LatencyKind.gpu
    with pytest.raises(UserError, match=r"rank 0 of 2 needs .* and cuda:0 has 1.00 GB in all"):
        inputs.check(config)
    inputs.check(random_config(), here=False)  # a cluster's GPUs are not this machine's
    has_memory(8 * 10**10, monkeypatch)
    opt = random_config(model__architecture={"model_type": "opt", **SMALL["opt"]}, latency__prompt_length=8)
    opt.latency.tp_plan = True
    with pytest.raises(UserError, match="transformers has no tp_plan for opt"):
        inputs.check(opt)


def test_ranks_have_what_an_interconnect_tells_nccl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"native": ("0", "0", None), "lbw": ("1", "0", "0"), "socket": ("1", "1", "0")}
    assert set(ENVIRONMENT) == set(told)
    names = ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE")
    for name in names:  # what the user's own environment says is not what is measured
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("NCCL_NVLS_ENABLE", raising=False)
    for link in told:
        (session,) = measure_gpu_latency(
            {"model_type": "llama", **SMALL["llama"]}, 1, {"0": []}, [Shape(1, 8, None, 2)], devices=["cpu"],
            **SETTINGS | {"interconnect": link},
        )  # fmt: skip
        (of_rank,) = session["nccl_environment"]
        assert tuple(of_rank[name] for name in names) == told[link][:2]
        assert of_rank.get("NCCL_NVLS_ENABLE") == told[link][2]
        assert ENVIRONMENT[link]["TORCH_SYMM_MEM_DISABLE_MULTICAST"] == "1"


# Kernels of one forward of two blocks: the first TP, the second dropped; 10 us each, 2 us between.
KERNELS = [
    Kernel(name, 12.0 * place, 12.0 * place + 10)
    for place, name in enumerate(
        [
            "qkv",
            "ncclDevKernel_AllReduce_Sum",
            "mlp",
            "one_shot_all_reduce_kernel",
            "qkv",
            "mlp",
            "two_shot_all_reduce_",
            "head",
        ]
    )
]


def test_the_share_of_communication_is_that_of_its_kernels_time() -> None:
    found = communication(KERNELS)
    assert found == {"share": round(30 / 94, 4), "overlap": 0.0, "busy": round(80 / 94, 4)}
    beside = [*KERNELS, Kernel("more", 12.0, 17.0)]
    assert communication(beside) == {"share": round(30 / 94, 4), "overlap": round(5 / 30, 4), "busy": round(80 / 94, 4)}
    assert communication([]) is None
    assert communication(KERNELS[:1])["share"] == 0


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 50), st.integers(1, 20)), min_size=1))
def test_shares_are_what_counting_microseconds_gives(parts: list[tuple[bool, int, int]]) -> None:
    kernels = [Kernel("nccl" if talks else "mm", start, start + length) for talks, start, length in parts]
    first, last = min(k.start_us for k in kernels), max(k.end_us for k in kernels)
    talking = {t for k in kernels if k.communicates for t in range(int(k.start_us), int(k.end_us))}
    working = {t for k in kernels if not k.communicates for t in range(int(k.start_us), int(k.end_us))}
    found = communication(kernels)
    assert found["share"] == pytest.approx(len(talking) / (last - first), abs=1e-4)
    assert found["busy"] == pytest.approx(len(talking | working) / (last - first), abs=1e-4)
    assert found["overlap"] == pytest.approx(len(talking & working) / max(1, len(talking)), abs=1e-4)


MARK = "void at::native::roll_cuda_kernel<float>"


@given(st.lists(st.lists(st.sampled_from(["mm", "nccl", "triton_unroll"]), max_size=4), min_size=1), st.integers(0, 9))
def test_runs_under_one_profile_are_told_apart_by_marks_or_not_at_all(names: list[list[str]], lost: int) -> None:
    sequence = ["warm", "fill", *(name for run in names for name in ("fill", MARK, *run, MARK))]
    kernels = [Kernel(name, 3.0 * i + 50, 3.0 * i + 52) for i, name in enumerate(sequence)][lost:]
    found = between_marks(kernels[::-1], len(names))
    if lost > 3:  # a mark is among them
        assert found == [[] for _ in names]
    else:
        assert [[kernel.name for kernel in run] for run in found] == names
        assert all(kernel.start_us == 3 * i for run in found for i, kernel in enumerate(run))


def test_a_blocks_timeline_goes_from_the_sum_before_it_to_its_own() -> None:
    found = block_timeline(KERNELS, 1, frozenset({1}))
    assert [kernel["name"] for kernel in found] == ["qkv", "mlp", "two_shot_all_reduce_"]
    assert [kernel["start_us"] for kernel in found] == [2, 14, 26]
    assert [kernel["communicates"] for kernel in found] == [False, False, True]
    assert block_timeline([kernel for kernel in KERNELS if not kernel.communicates], 1, frozenset()) == []
