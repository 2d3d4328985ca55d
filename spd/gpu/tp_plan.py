"""transformers' own tensor parallelism (`tp_plan="auto"`), an arm of latency=gpu: what its users leave behind."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig

from spd.checkpoint import read_architecture, read_config
from spd.errors import UserError
from spd.gpu.limits import events_ms
from spd.gpu.rank import meet, slowest
from spd.launch import Progress


def check_has_plan(config: PretrainedConfig) -> None:
    """Raises UserError for a family that transformers cannot run tensor-parallel."""
    if not getattr(config, "base_model_tp_plan", None):
        raise UserError(
            f"latency.tp_plan=true: transformers has no tp_plan for {config.model_type}; write latency.tp_plan=false."
        )


def measure_rank(settings: dict[str, Any], on_progress: Progress) -> dict[str, list[float]]:
    """As `run_ranks` calls it: {metric: milliseconds of each repeat}, the slowest rank's."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", timeout=timedelta(seconds=settings["timeout_s"]), device_id=device)
    dtype = getattr(torch, settings["dtype"])
    with _checkpoint(settings, dtype, device) as folder:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=dtype)
        model.to(device)  # where there is one rank only, nothing has put it there
    batch = settings["batch_size"]

    def forward(tokens: Tensor, cache: DynamicCache) -> Tensor:
        return model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)

    def prompt(length: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(settings["seed"])
        return torch.randint(model.config.vocab_size, (batch, length), generator=generator, device=device)

    def timed() -> tuple[float, float]:
        asked, before, cache = prompt(settings["prompt_length"]), prompt(settings["decode_at"]), DynamicCache()
        meet(device)
        first = events_ms(lambda: forward(asked, DynamicCache()), 1)
        token = forward(before, cache)

        def step() -> None:
            nonlocal token
            token = forward(token, cache)

        meet(device)
        return first, events_ms(step, settings["new_tokens"])

    with torch.inference_mode():
        for _ in range(max(1, settings["warmup"])):
            timed()
        taken = []
        for repeat in range(settings["repeats"]):
            taken.append(timed())
            on_progress(repeat + 1, settings["repeats"])
    times = slowest(torch.tensor(taken, dtype=torch.float64), device).T.tolist()
    return {"ttft_ms": times[0], "tpot_ms": times[1]}


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
