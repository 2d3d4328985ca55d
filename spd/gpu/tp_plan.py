"""transformers' own tensor parallelism (`tp_plan="auto"`), an arm of latency=gpu: what its users leave behind."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from spd.checkpoint import read_architecture
from spd.errors import UserError
from spd.gpu.latency import Shape
from spd.gpu.rank import start
from spd.gpu.timing import events_ms, meet, slowest
from spd.launch import Progress


def measure_rank(settings: dict[str, Any], on_progress: Progress) -> dict[str, Any]:
    """As `run_ranks` calls it: of every shape {metric: milliseconds of each repeat}, the slowest rank's."""
    rank = int(os.environ["RANK"])
    device = start(settings, rank)
    try:
        return {"shapes": _measure(settings, device, on_progress)}
    except torch.OutOfMemoryError as error:
        said = ". ".join(str(error).split(". ")[:2])
        raise UserError(
            f"rank {rank} of {settings['tp_size']} ran out of memory on {device} with transformers' own tensor "
            f"parallelism: {said}. Give a smaller latency.batch_size, or write latency.tp_plan=false."
        ) from error


def _measure(settings: dict[str, Any], device: torch.device, on_progress: Progress) -> list[dict[str, Any]]:
    dtype = getattr(torch, settings["dtype"])
    folder = Path(settings["checkpoint"] or settings["folder"])
    if settings["checkpoint"] is None:
        if dist.get_rank() == 0:
            _write_random(settings["architecture"], folder, dtype, device)
        dist.barrier()
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
            found.append(dict(zip(shape.metrics, times, strict=True)))
    return found


def _timed(model: Any, shape: Shape, settings: dict[str, Any], device: torch.device) -> list[float]:
    """Milliseconds to the first token, and of a token after it where that is asked for."""

    def forward(tokens: Tensor, cache: DynamicCache) -> Tensor:
        return model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)

    def prompt(length: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(settings["seed"])
        return torch.randint(model.config.vocab_size, (shape.batch_size, length), generator=generator, device=device)

    asked, cache = prompt(shape.prompt_length), DynamicCache()
    meet(device)
    first = events_ms(lambda: forward(asked, DynamicCache()), 1)
    if shape.decode_at is None:
        return [first]
    before = prompt(shape.decode_at)
    token = forward(before, cache)

    def step() -> None:
        nonlocal token
        token = forward(token, cache)

    meet(device)
    return [first, events_ms(step, settings["new_tokens"])]


def _write_random(architecture: dict[str, Any], folder: Path, dtype: torch.dtype, device: torch.device) -> None:
    """A checkpoint with random weights, as transformers shards only what it loads."""
    config = read_architecture(architecture)
    with torch.device("meta"):
        size = sum(parameter.nbytes for parameter in AutoModelForCausalLM.from_config(config, dtype=dtype).parameters())
    rooms = {"TMPDIR": shutil.disk_usage(folder).free}
    if device.type == "cuda":
        rooms[str(device)] = torch.cuda.mem_get_info(device)[0]
    for room, free in rooms.items():
        if size > free:
            raise UserError(
                f"latency.tp_plan=true makes the whole random model on one GPU and writes it to {folder.parent}: "
                f"{size / 1e9:.0f} GB, and {room} has {free / 1e9:.0f} GB free; write latency.tp_plan=false."
            )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
