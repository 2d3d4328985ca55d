"""`latency=gpu`: time to first token and time per token of torchrun ranks, one a GPU, at the speed of a serving engine.

As in `spd.latency`, a *session* has several launches, and each launch times all arms in turns. Beside the arms that a
model can run with, there are two ceilings: no all-reduce after attention in any block, and none at all.
"""

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from spd.errors import UserError
from spd.gpu.interconnect import ENVIRONMENT
from spd.latency import METRICS, alone, shifted
from spd.launch import Progress, run_ranks, threads_per_rank

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from spd.config import LatencyConfig

CEILINGS: dict[str, dict[str, Any]] = {
    "no_attention_all_reduce": {"dropped": [], "left_out": {"attention_all_reduce": False}},
    "no_all_reduce": {"dropped": [], "left_out": {"attention_all_reduce": False, "mlp_all_reduce": False}},
}
"""Arms that are not models one can use: what the sync points that can be dropped cost, and what communication costs."""

BLOCKS = ("ttft_blocks_ms", "tpot_blocks_ms")
"""`METRICS` of the decoder blocks alone, without embedding, head and choice."""

_OF_LAUNCH = (
    *("seconds", "peak_memory_gb", "rates", "link", "all_reduce", "floor_ms"),
    *("kernels", "nccl_environment", "communication", "timeline"),
)


class Shape(NamedTuple):
    """What one session of a launch is of."""

    batch_size: int
    prompt_length: int
    decode_at: int | None
    """Position of the first token timed in decoding; None times prefill alone."""
    repeats: int
    blocks_alone: bool = False
    """Whether the decoder blocks are timed by themselves too (`BLOCKS`)."""
    long: bool = False
    """Whether a forward takes seconds: then there are no rounds of warm-up, but one forward that is not timed, and only
    nothing and everything dropped are profiled."""

    @classmethod
    def of(cls, settings: "LatencyConfig") -> "Shape":
        """What a point asks for."""
        decode_at = settings.decode_at or settings.prompt_length
        return cls(settings.batch_size, settings.prompt_length, decode_at, settings.repeats, settings.blocks_alone)

    @property
    def phases(self) -> tuple[str, ...]:
        """What is timed of every arm."""
        every = METRICS + BLOCKS if self.blocks_alone else METRICS
        return tuple(phase for phase in every if phase.startswith("ttft") or self.decode_at is not None)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those of `METRICS` that are timed."""
        return tuple(phase for phase in self.phases if phase in METRICS)

    def reach(self, new_tokens: int) -> int | None:
        """Positions that the timed decoding steps look at, as a serving engine's would: those there are, to 128."""
        return None if self.decode_at is None else _up(self.decode_at + new_tokens)

    def cache_length(self, new_tokens: int) -> int:
        """Positions that are kept, a multiple of 128."""
        return max(_up(self.prompt_length), self.reach(new_tokens) or 0)

    def sizes(self, new_tokens: int) -> dict[str, int]:
        """B, T and C of a `spd.gpu.model.GraphModel`."""
        cache_length = self.cache_length(new_tokens)
        return {"batch_size": self.batch_size, "prompt_length": self.prompt_length, "cache_length": cache_length}

    def positions(self, new_tokens: int) -> int:
        """Positions that the model has to have."""
        return max(self.prompt_length, 0 if self.decode_at is None else self.decode_at + new_tokens)


def _up(length: int) -> int:
    return -(-length // 128) * 128


def check_engine(
    config: "PretrainedConfig",
    tp_size: int,
    shapes: list[Shape],
    devices: list[str],
    *,
    dtype: str,
    new_tokens: int,
    tp_plan: bool,
) -> None:
    """All that can be said of a measurement before a rank is started.

    Raises:
        UserError: the architecture has what this engine has not, or with `tp_plan` transformers' tensor parallelism;
            it has too few positions; or a rank's part is too large even for an empty GPU.
    """
    _check_variant(config)
    for shape in shapes:
        if (asked := shape.positions(new_tokens)) > (config.max_position_embeddings or asked):
            raise UserError(
                f"Latency is asked for up to position {asked}, and this model takes {config.max_position_embeddings}."
            )
    if tp_plan and not getattr(config, "base_model_tp_plan", None):
        raise UserError(
            f"latency.tp_plan=true: transformers has no tp_plan for {config.model_type}; write latency.tp_plan=false."
        )
    _check_memory(config, tp_size, shapes, devices, dtype, new_tokens)


def _check_variant(config: "PretrainedConfig") -> None:
    known = {
        "word_embed_proj_dim": config.hidden_size,
        "_remove_final_layer_norm": False,
        "layer_norm_elementwise_affine": True,
    }
    for setting, value in known.items():
        if (its := getattr(config, setting, value)) != value:
            raise UserError(
                f"This checkpoint has {setting}={its}, which latency=gpu's engine does not know; write latency=cpu."
            )


def gpus(tp_size: int) -> list[str]:
    """Of each rank the GPU."""
    return [f"cuda:{rank}" for rank in range(tp_size)]


def check_gpus(tp_size: int) -> None:
    """Raises UserError unless this machine has a GPU for every rank."""
    import torch

    found = torch.cuda.device_count()
    if found < tp_size:
        least = f"parallel.tp_size={found}, " if found else ""
        raise UserError(
            f"latency=gpu needs a GPU for each of parallel.tp_size={tp_size} ranks, and torch sees {found} on this "
            f"machine; write {least}latency=none, or of a checkpoint latency=cpu."
        )


def _check_memory(
    config: "PretrainedConfig", tp_size: int, shapes: list[Shape], devices: list[str], dtype: str, new_tokens: int
) -> None:
    import torch

    from spd.families import family_of
    from spd.gpu.memory import check_memory

    of_all: dict[str, Any] = {"config": config, "family": family_of(config), "dtype": getattr(torch, dtype)}
    for rank, device in enumerate(devices):
        if device == "cpu":
            continue
        whole = torch.cuda.get_device_properties(device).total_memory
        for shape in shapes:
            check_memory(rank, tp_size, device, whole, "in all", **of_all, **shape.sizes(new_tokens))


def measure_gpu_latency(
    model: Path | dict[str, Any],
    tp_size: int,
    arms: dict[str, list[int]],
    shapes: list[Shape],
    *,
    dtype: str,
    new_tokens: int,
    launches: int,
    first_launch: int = 0,
    warmup: int,
    all_reduce: str,
    interconnect: str,
    tp_plan: bool = False,
    timeout_s: float,
    port: int = 0,
    devices: list[str] | None = None,
    log_dir: Path | None = None,
    on_progress: Progress | None = None,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Times every arm and the two ceilings on `tp_size` GPUs, in `launches` separate launches.

    The settings are those of `spd.config.LatencyConfig`.

    Args:
        model: a Hugging Face folder; or an architecture (`ModelConfig.architecture`), whose weights are then random.
        tp_size: number of ranks, each on a GPU of its own.
        arms: name of each arm -> the blocks it drops, "0" among them, the baseline.
        shapes: batch sizes and lengths, one after the other in each launch, which reads the weights once.
        dtype: of weights and activations.
        launches, first_launch: how many, and the number of the first, which is its seed: sessions of the same settings
            can be put together (`merged`).
        all_reduce: nccl, one_shot, two_shot or auto (`spd.gpu.all_reduce.choose`).
        interconnect: native, lbw or socket (`spd.gpu.interconnect.ENVIRONMENT`).
        tp_plan: whether to time transformers' own tensor parallelism too, in a launch before each of these.
        devices: of each rank, by default cuda:0 to cuda:<tp_size - 1>. Ranks that share a GPU (all_reduce one_shot or
            two_shot, with TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1) give right numbers, and times that mean nothing;
            so do CPUs, where nothing is compiled or captured: for tests.
        log_dir, on_progress, say: as for `spd.latency.measure_latency`.

    Returns:
        A session for each shape: its settings, "arms" and "ceilings"; for ttft_ms and tpot_ms (and `BLOCKS`) `{arm:
        [[milliseconds of each repeat] of each launch]}`; "tp_plan", the same of transformers, or None; and of each
        launch what `spd.gpu.rank.measure_rank` found beside the times ("communication" and "timeline" of launch 0
        alone). Give it to `spd.gpu.summary.summarise`.

    Raises:
        UserError: there are too few GPUs or positions, a rank's part does not fit, or the all-reduce asked for does not
            work here.
        spd.launch.RankFailed: a rank died, or a launch took longer than `timeout_s`.
    """
    if devices is None:
        check_gpus(tp_size)
    from spd.checkpoint import read_architecture, read_config  # imports torch and transformers: slow
    from spd.families import family_of
    from spd.sharding import check_tp_size

    where = devices or gpus(tp_size)
    config = read_architecture(model) if isinstance(model, dict) else read_config(model)
    check_tp_size(family_of(config), config, tp_size)
    check_engine(config, tp_size, shapes, where, dtype=dtype, new_tokens=new_tokens, tp_plan=tp_plan)
    settings: dict[str, Any] = {
        "tp_size": tp_size,
        "dtype": dtype,
        "new_tokens": new_tokens,
        "warmup": warmup,
        "interconnect": interconnect,
    }
    every = {name: {"dropped": blocks, "left_out": {}} for name, blocks in arms.items()} | CEILINGS
    sessions: list[dict[str, Any]] = [
        {
            "source": "measured",
            "backend": "gloo" if "cpu" in where or len(set(where)) < tp_size else "nccl",
            "device": "cpu" if "cpu" in where else "cuda",
            **settings,
            **shape._asdict(),
            "launches": launches,
            "arms": arms,
            "ceilings": list(CEILINGS),
            "launch_s": [],
            "metrics": list(shape.metrics),
            **{phase: {name: [] for name in every} for phase in shape.phases},
            "tp_plan": {metric: [] for metric in shape.metrics} if tp_plan else None,
            **{name: [] for name in _OF_LAUNCH},
        }
        for shape in shapes
    ]
    given = {"architecture": model} if isinstance(model, dict) else {"checkpoint": str(model.resolve())}
    # Workers that compile: by default as many as there are cores, for each rank.
    compilers = {"TORCHINDUCTOR_COMPILE_THREADS": str(min(8, threads_per_rank(tp_size)))}
    environment = ENVIRONMENT[interconnect] | compilers
    if set(where) == {"cpu"}:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    rounds = sum(shape.repeats for shape in shapes)

    def ranks(function: str, launch: int, **more: Any) -> list[dict[str, Any]]:
        asked = {"checkpoint": None, "architecture": None, **given, **settings, "seed": launch, "timeout_s": timeout_s}
        asked |= more
        asked |= {"shapes": [shape._asdict() for shape in shapes], "arms": every, "all_reduce": all_reduce}
        asked |= {"devices": where, "profile": launch == 0, "began": time.time()}
        found: list[dict[str, Any]] = run_ranks(
            function,
            asked,
            tp_size=tp_size,
            port=port,
            timeout_s=timeout_s,
            environment=environment,
            log_dir=log_dir,
            on_progress=shifted(on_progress, (launch - first_launch) * rounds, launches * rounds),
        )["shapes"]
        return found

    for launch in range(first_launch, first_launch + launches):
        with alone(say), TemporaryDirectory(prefix="spd-tp-plan-") as folder:
            theirs: list[dict[str, Any]] = [{} for _ in shapes]
            if tp_plan:  # first, as it has more reasons to fail
                theirs = ranks("spd.gpu.tp_plan:measure_rank", launch, folder=folder)
            start = time.monotonic()
            found = ranks("spd.gpu.rank:measure_rank", launch)
            launch_s = round(time.monotonic() - start, 3)
        for shape, session, ours, other in zip(shapes, sessions, found, theirs, strict=True):
            session["launch_s"].append(launch_s)
            for phase in shape.phases:
                for name in every:
                    session[phase][name].append(ours[phase][name])
            for metric, times in other.items():
                session["tp_plan"][metric].append(times)
            for name in _OF_LAUNCH:
                session[name].append(ours[name])
        if on_progress is not None:
            on_progress((launch + 1 - first_launch) * rounds, launches * rounds)
    return sessions


def merged(session: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """One session of the launches of two of the same settings."""
    whole = dict(session)
    whole["launches"] = session["launches"] + more["launches"]
    for name in ("launch_s", *_OF_LAUNCH):
        whole[name] = session[name] + more[name]
    for phase in (phase for phase in METRICS + BLOCKS if phase in session):
        whole[phase] = {arm: launches + more[phase][arm] for arm, launches in session[phase].items()}
    if session["tp_plan"] is not None:
        whole["tp_plan"] = {metric: times + more["tp_plan"][metric] for metric, times in session["tp_plan"].items()}
    return whole
