"""What ranks of the tests of latency=gpu run."""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from spd.checkpoint import Checkpoint, read_architecture, read_config
from spd.families import family_of
from spd.gpu import all_reduce, graphs
from spd.gpu.head import candidates_size
from spd.gpu.model import Arm, GraphModel
from spd.gpu.rank import measure_rank, start
from spd.gpu.timing import meet
from spd.launch import Progress

RANKS_DROP = [0, 5, 11]


def compared(settings: dict[str, Any], on_progress: Progress) -> dict[str, Any]:
    """Raises unless a model, compiled and captured on GPUs, gives the wanted logits with every kind of all-reduce."""
    rank, folder, given = int(os.environ["RANK"]), Path(settings["folder"]), load_file(settings["want"])
    device, config = start(settings, rank), read_config(folder)
    ids, want, equal = given["ids"].to(device), given["want"], []
    arm = Arm(frozenset(RANKS_DROP))
    for kind in settings["kinds"]:
        reduce = all_reduce.make(kind, ids.numel() * config.hidden_size, torch.float32, device)
        model = GraphModel(
            config, family_of(config), dist.get_world_size(), rank, checkpoint=Checkpoint(folder),
            batch_size=len(ids), cache_length=64, prompt_length=ids.shape[1], all_reduce=reduce, dtype=torch.float32,
            device=device, compiled=device.type == "cuda",
        )  # fmt: skip
        first, step = model.capture(arm, decode=False), model.capture(arm, decode=True)
        model.prompt.copy_(ids)
        meet(device)
        first()
        for i in range(want.shape[1]):
            if i:
                step()
            torch.testing.assert_close(model.logits.cpu(), want[:, i, model.vocab], atol=2e-3, rtol=1e-3)
            assert torch.equal(model.token.cpu(), want[:, i].argmax(-1, keepdim=True))
            model.token.copy_(want[:, i].argmax(-1, keepdim=True))
        equal.append(kind)
        on_progress(len(equal), len(settings["kinds"]))
    return {"equal": equal}


def out_of_memory(settings: dict[str, Any], on_progress: Progress) -> dict[str, Any]:
    """`measure_rank` on a GPU that turns out to have less than it said."""
    torch.cuda.set_per_process_memory_fraction(0.001)
    return measure_rank(settings, on_progress)


def disagreements(logits: torch.Tensor, best: torch.Tensor, chosen: torch.Tensor) -> list[float]:
    """Of the sequences where another token than the best one was chosen, by how much its logit is the lower."""
    given = [logits.float().gather(-1, tokens)[:, 0] for tokens in (best, chosen)]
    return (given[0] - given[1])[(best != chosen)[:, 0]].tolist()


def raise_beside_a_graph(settings: dict[str, Any], on_progress: Progress) -> dict[str, Any]:
    """Rank 1 fails while rank 0 is in a captured sum that waits for it."""
    rank = int(os.environ["RANK"])
    device = start(settings, rank)
    reduce = all_reduce.make("nccl", 0, torch.float32, device)
    message = torch.zeros(8, device=device)
    graphs.warm_up(lambda: reduce(message), device)
    replay = graphs.capture(lambda: reduce(message), device)
    meet(device)
    if rank == 1:
        raise RuntimeError("on purpose")
    replay()
    torch.cuda.synchronize(device)
    return {}


def as_uncaptured(settings: dict[str, Any], on_progress: Progress) -> dict[str, Any]:
    """Of a model of random weights with all-reduces of every kind that is quickest: the largest differences of captured
    and uncaptured logits, and of uncaptured bf16 and float32 ones, over tokens that both take from the uncaptured."""
    rank = int(os.environ["RANK"])
    device, config = start(settings, rank), read_architecture(settings["architecture"])
    ranks, batch, length = dist.get_world_size(), settings["batch_size"], settings["prompt_length"]
    sizes = [batch * length * config.hidden_size, batch * config.hidden_size, candidates_size(batch, ranks)]
    models, arm = {}, Arm(frozenset(settings["dropped"]))
    for name, dtype in (("captured", torch.bfloat16), ("plain", torch.bfloat16), ("exact", torch.float32)):
        reduce, chosen = all_reduce.choose(
            "auto" if name == "captured" else "nccl", sizes, dtype, device, copied=config.hidden_size
        )
        models[name] = GraphModel(
            config, family_of(config), ranks, rank, batch_size=batch, prompt_length=length, cache_length=512,
            all_reduce=reduce, dtype=dtype, device=device, compiled=name == "captured",
        )  # fmt: skip
        if name == "captured":
            kinds = [chosen[size]["kind"] for size in sizes]

    def logits(model: GraphModel) -> torch.Tensor:
        parts = [torch.zeros_like(model.logits) for _ in range(ranks)]  # the vocabulary is a multiple of the ranks
        dist.all_gather(parts, model.logits)
        return torch.cat(parts, -1).float()

    captured, plain, exact = models.values()
    for ours, rounded in zip(exact.blocks, plain.blocks, strict=True):  # the same weights, not the same random numbers
        for tensor, like in zip(ours, rounded, strict=True):
            if tensor is not None:
                tensor.copy_(like)
    exact.embedding.copy_(plain.embedding)
    exact.head.copy_(plain.head)
    first, step = captured.capture(arm, decode=False), captured.capture(arm, decode=True)
    ids = torch.randint(config.vocab_size, plain.prompt.shape, generator=torch.Generator().manual_seed(0))
    found: dict[str, list[float]] = {"difference": [], "rounding": [], "unsure": []}
    for model in models.values():
        model.prompt.copy_(ids)
    for i in range(64):
        meet(device)
        step() if i else first()
        for model in (plain, exact):
            model.decode(arm) if i else model.prefill(arm)
        theirs = logits(plain)
        found["difference"].append((logits(captured) - theirs).abs().max().item())
        found["rounding"].append((logits(exact) - theirs).abs().max().item())
        found["unsure"] += disagreements(theirs, plain.token, captured.token)
        for model in (captured, exact):
            model.token.copy_(plain.token)
    return found | {"kinds": kinds}
