"""transformers' own tensor parallelism (`tp_plan="auto"`), an arm of latency=gpu: what its users leave behind."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig

from spd.checkpoint import read_architecture, read_config
from spd.errors import UserError
from spd.gpu.latency import Shape
from spd.gpu.limits import events_ms
from spd.gpu.rank import meet, slowest, start
from spd.latency import METRICS
from spd.launch import Progress


def check_has_plan(config: PretrainedConfig) -> None:
    """Raises UserError for a family that transformers cannot run tensor-parallel."""
    if not getattr(config, "base_model_tp_plan", None):
        raise UserError(
            f"latency.tp_plan=true: transformers has no tp_plan for {config.model_type}; write latency.tp_plan=false."
        )


def measure_rank(settings: dict[str, Any], on_progress: Progress) -> dict[str, Any]:
    """As `run_ranks` calls it: of every shape {metric: milliseconds of each repeat}, the slowest rank's."""
    device = start(settings, int(os.environ["RANK"]))
    dtype = getattr(torch, settings["dtype"])
    with _checkpoint(settings, dtype, device) as folder:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=dtype)
        model.to(device)  # where there is one rank only, nothing has put it there
    found, done, shapes = [], 0, [Shape(**shape) for shape in settings["shapes"]]
    with torch.inference_mode():
        for shape in shapes:
            for _ in range(max(1, settings["warmup"])):
                _timed(model, shape, settings, device)
            taken = []
            for _ in range(shape.repeats):
                taken.append(_timed(model, shape, settings, device))
                done += 1
                on_progress(done, sum(shape.repeats for shape in shapes))
            times = slowest(torch.tensor(taken, dtype=torch.float64), device).T.tolist()
            found.append(dict(zip(METRICS, times, strict=True)))
    return {"shapes": found}


def _timed(model: Any, shape: Shape, settings: dict[str, Any], device: torch.device) -> tuple[float, float]:
    """Milliseconds to the first token, and of a token after it."""

    def forward(tokens: Tensor, cache: DynamicCache) -> Tensor:
        return model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)

    def prompt(length: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(settings["seed"])
        return torch.randint(model.config.vocab_size, (shape.batch_size, length), generator=generator, device=device)

    asked, before, cache = prompt(shape.prompt_length), prompt(shape.decode_at), DynamicCache()
    meet(device)
    first = events_ms(lambda: forward(asked, DynamicCache()), 1)
    token = forward(before, cache)

    def step() -> None:
        nonlocal token
        token = forward(token, cache)

    meet(device)
    return first, events_ms(step, settings["new_tokens"])


@contextmanager
def _checkpoint(settings: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Iterator[Path]:
    """The model's folder; with random weights one that rank 0 writes, as transformers shards only what it loads."""
    if settings["checkpoint"] is not None:
        yield Path(settings["checkpoint"])
        return
    said: list[str | None] = [None]
    if dist.get_rank() == 0:
        config = read_architecture(settings["architecture"])
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        size = sum(parameter.nbytes for parameter in model.parameters())
        free = shutil.disk_usage(tempfile.gettempdir()).free
        if size > free:
            raise UserError(
                f"latency.tp_plan=true writes the random model to {tempfile.gettempdir()}: {size / 1e9:.0f} GB, "
                f"and {free / 1e9:.0f} GB are free; point TMPDIR elsewhere, or write latency.tp_plan=false."
            )
        said[0] = tempfile.mkdtemp(prefix="spd-tp-plan-")
        model.save_pretrained(said[0])
        del model
        torch.cuda.empty_cache()
    dist.broadcast_object_list(said, src=0)
    assert said[0] is not None
    try:
        yield Path(said[0])
        dist.barrier()
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(said[0], ignore_errors=True)


def config_of(model: Path | dict[str, Any]) -> PretrainedConfig:
    """The Hugging Face config of what `measure_gpu_latency` is given."""
    return read_architecture(model) if isinstance(model, dict) else read_config(model)
