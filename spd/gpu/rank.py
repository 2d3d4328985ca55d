"""One rank of one launch of `latency=gpu`: builds its part of the model, captures every arm, times them in turns."""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from spd.checkpoint import Checkpoint, read_architecture, read_config
from spd.errors import UserError
from spd.families import family_of
from spd.gpu import all_reduce, graphs, interconnect
from spd.gpu.head import candidates_size
from spd.gpu.latency import Shape
from spd.gpu.limits import Rates
from spd.gpu.memory import check_memory, what_fits
from spd.gpu.model import Arm, GraphModel
from spd.gpu.profile import block_timeline, communication, kernels_of
from spd.gpu.timing import events_ms, meet, slowest, synchronise
from spd.latency import arm_order, no_garbage_collection
from spd.launch import Progress

SHORT_MS = 100
"""Milliseconds: a forward that takes less is preceded by one that is not timed. On two H200s one of 4 ms was slower by
up to 5 % after an arm that had left the links idle."""


class Bench(NamedTuple):
    """What all shapes of a launch share."""

    model: GraphModel
    arms: dict[str, Arm]
    rates: Rates
    all_reduce: dict[int, dict[str, Any]]
    """Numbers in a message -> what `spd.gpu.all_reduce.choose` found."""
    settings: dict[str, Any]


def measure_rank(settings: dict[str, Any], on_progress: Progress) -> dict[str, Any]:
    """As `run_ranks` calls it: of every shape the times of every arm, and what they are to be judged by.

    Raises:
        UserError: its part does not fit into its GPU, with what would; an all-reduce that does not work here.
    """
    rank, tp_size = int(os.environ["RANK"]), settings["tp_size"]
    device = start(settings, rank)
    dtype = getattr(torch, settings["dtype"])
    folder = None if settings["checkpoint"] is None else Path(settings["checkpoint"])
    config = read_config(folder) if folder else read_architecture(settings["architecture"])
    family = family_of(config)
    shapes = [Shape(**shape) for shape in settings["shapes"]]
    sizes = [shape.sizes(settings["new_tokens"]) for shape in shapes]

    def of(place: int) -> dict[str, Any]:
        return {"config": config, "family": family, "dtype": dtype, "tp_size": tp_size, **sizes[place]}

    free = 0
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        for place in range(len(shapes)):
            check_memory(rank, device=device, free=free, what="free", **of(place))
    place, seconds = 0, {"start": time.time() - settings["began"]}
    try:
        began = time.perf_counter()
        rates, link = Rates.measured(dtype, device), interconnect.probe(device)
        reduce: all_reduce.AllReduce | None = None
        chosen: dict[int, dict[str, Any]] = {}
        if tp_size > 1:
            reduce, chosen = all_reduce.choose(
                settings["all_reduce"],
                [size for shape in shapes for size in _messages(shape, config.hidden_size, tp_size).values()],
                dtype,
                device,
                direct_links=settings["interconnect"] == "native",
                copied=config.hidden_size,  # one token's products may be Triton kernels, which know of no room
            )
        seconds["links"], began = time.perf_counter() - began, time.perf_counter()
        model = GraphModel(
            config,
            family,
            tp_size,
            rank,
            checkpoint=Checkpoint(folder) if folder else None,
            **sizes[0],
            all_reduce=reduce,
            dtype=dtype,
            device=device,
            compiled=device.type == "cuda",
        )
        synchronise(device)
        seconds["build"] = time.perf_counter() - began
        arms = {name: Arm(frozenset(arm["dropped"]), **arm["left_out"]) for name, arm in settings["arms"].items()}
        bench, found, done = Bench(model, arms, rates, chosen, settings), [], 0
        rounds = sum(shape.repeats for shape in shapes)
        for place, shape in enumerate(shapes):

            def told(repeat: int, before: int = done) -> None:
                on_progress(before + repeat, rounds)

            _resize(bench, sizes[place])
            found.append({"link": link} | _measure(bench, shape, told))
            done += shape.repeats
        # Of graphs captured anew, after all that is timed: what has been traced once can be slower afterwards.
        for place, shape in enumerate(shapes):
            found[place] |= {"communication": None, "timeline": None}
            began = time.perf_counter()
            if settings["profile"]:
                _resize(bench, sizes[place])
                found[place] |= _profiles(bench, shape)
            whole = seconds | found[place]["seconds"] | {"profile": time.perf_counter() - began}
            found[place]["seconds"] = {name: round(taken, 1) for name, taken in whole.items()}
        return {"shapes": found}
    except torch.OutOfMemoryError as error:
        said = ". ".join(str(error).split(". ")[:2])  # that, and how much was asked for
        raise UserError(
            f"rank {rank} of {tp_size} ran out of memory on {device}, of which {free / 1e9:.1f} GB were free: "
            f"{said}. By what is known beforehand, {what_fits(free, **of(place))}."
        ) from error


def start(settings: dict[str, Any], rank: int) -> torch.device:
    """This rank's device, in a process group whose waiting is bounded: NCCL's, or gloo's on CPUs and a shared GPU."""
    device = torch.device(settings["devices"][rank])
    limit, nccl = timedelta(seconds=min(300, settings["timeout_s"])), False
    if device.type == "cuda":
        torch.cuda.set_device(device)
        nccl = len(set(settings["devices"])) == settings["tp_size"]
    dist.init_process_group("nccl" if nccl else "gloo", timeout=limit, device_id=device if nccl else None)
    return device


def _messages(shape: Shape, hidden_size: int, tp_size: int) -> dict[str, int]:
    """Numbers in the messages of prefill, of decoding, and of the "choice" of a token at the end of both."""
    tokens = {"ttft_ms": shape.prompt_length, "tpot_ms": 1}
    of_blocks = {metric: shape.batch_size * tokens[metric] * hidden_size for metric in shape.metrics}
    return of_blocks | {"choice": candidates_size(shape.batch_size, tp_size)}


def _resize(bench: Bench, sizes: dict[str, int]) -> None:
    """The model takes another batch size, prompt length and cache length, and a prompt of the launch's seed."""
    model = bench.model
    torch.cuda.empty_cache()  # the graphs of the shape before are gone
    model.resize(**sizes)
    random = torch.Generator(model.device).manual_seed(bench.settings["seed"])
    model.prompt.random_(0, len(model.embedding), generator=random)


def _measure(bench: Bench, shape: Shape, told: Callable[[int], None]) -> dict[str, Any]:
    """One shape's part of the result."""
    model, arms, settings = bench.model, bench.arms, bench.settings
    device, new_tokens = model.device, settings["new_tokens"]
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    began, phases, names = time.perf_counter(), shape.phases, list(arms)
    replays = _captured(bench, shape, phases)
    seconds = {"capture": time.perf_counter() - began}

    def once(phase: str, name: str) -> float:
        """Milliseconds by this rank's clock, all ranks let go together."""
        model.position.fill_(shape.decode_at or 0)
        meet(device)
        return events_ms(replays[phase, name], new_tokens if phase.startswith("tpot") else 1)

    def timed(name: str) -> list[float]:
        taken = []
        for phase in phases:
            if phase in short:
                model.position.fill_(shape.decode_at or 0)
                replays[phase, name]()
            taken.append(once(phase, name))
        return taken

    began = time.perf_counter()
    took = slowest(torch.tensor([once(phase, names[0]) for phase in phases]), device)
    short = {phase for phase, ms in zip(phases, took.tolist(), strict=True) if ms < SHORT_MS}
    times = torch.zeros(len(phases), len(names), shape.repeats, dtype=torch.float64)
    with no_garbage_collection():
        for _ in range(0 if shape.long else settings["warmup"]):
            for name in names:
                timed(name)
        for repeat in range(shape.repeats):
            for place in arm_order(len(names), repeat, settings["seed"]):
                times[:, place, repeat] = torch.tensor(timed(names[place]), dtype=torch.float64)
            told(repeat + 1)
    found, seconds["time"] = slowest(times, device), time.perf_counter() - began
    peak = torch.tensor(float(torch.cuda.max_memory_allocated(device) if on_cuda else 0), dtype=torch.float64)
    messages = _messages(shape, model.embedding.shape[1], settings["tp_size"])
    return {
        **{
            phase: {name: [round(ms, 4) for ms in found[p, a].tolist()] for a, name in enumerate(names)}
            for p, phase in enumerate(phases)
        },
        "seconds": seconds,
        "kernels": {
            phase: kinds for phase, kinds in model.kernels.items() if phase == "prefill" or "tpot_ms" in shape.metrics
        },
        "nccl_environment": {name: value for name, value in os.environ.items() if name.startswith("NCCL_")},
        "peak_memory_gb": round(float(slowest(peak, device)) / 1e9, 3),
        "rates": {
            "bandwidth_gb_per_s": round(bench.rates.bandwidth / 1e9, 1),
            "tflop_per_s": round(bench.rates.flops / 1e12, 3),
        },
        "all_reduce": {metric: bench.all_reduce[n] for metric, n in messages.items() if n in bench.all_reduce},
        "floor_ms": {
            metric: {name: round(_floor_ms(bench, shape, metric, arm), 4) for name, arm in arms.items()}
            for metric in shape.metrics
        },
    }


def _captured(bench: Bench, shape: Shape, phases: tuple[str, ...]) -> dict[tuple[str, str], Callable[[], object]]:
    """A graph for every phase of every arm; they share their memory, as one runs at a time."""
    pool = graphs.shared_pool(bench.model.device)
    return {
        (phase, name): bench.model.capture(
            arm,
            decode=phase.startswith("tpot"),
            reach=shape.reach(bench.settings["new_tokens"]),
            blocks_alone=phase not in shape.metrics,
            pool=pool,
        )
        for phase in phases
        for name, arm in bench.arms.items()
    }


def _floor_ms(bench: Bench, shape: Shape, metric: str, arm: Arm) -> float:
    """Weights, and in decoding keys and values up to its position, over measured bandwidth, or matrix products over the
    measured rate; and every all-reduce, those of the blocks and that of the choice, at its measured latency."""
    model, us = bench.model, {}
    for name, size in _messages(shape, model.embedding.shape[1], bench.settings["tp_size"]).items():
        chosen = bench.all_reduce.get(size)
        us[name] = chosen["us"][chosen["kind"]] if chosen else 0.0
    reduces_us = arm.all_reduces(model.num_blocks) * us[metric] + arm.mlp_all_reduce * us["choice"]
    work = model.work(shape.decode_at if metric == "tpot_ms" else None)
    return bench.rates.floor_ms(*work) + reduces_us / 1e3


def _profiles(bench: Bench, shape: Shape) -> dict[str, dict[str, dict[str, Any]]]:
    """Of each forward of each arm (of `Shape.long` ones, of two), the share of communication; of a block in the middle,
    its timeline. None and [] where the trace has lost an all-reduce."""
    model = bench.model
    ends = {name for name, arm in bench.arms.items() if arm in (Arm(), Arm(frozenset(range(model.num_blocks))))}
    arms = {name: arm for name, arm in bench.arms.items() if name in ends or not shape.long}
    shares: dict[str, dict[str, Any]] = {metric: {} for metric in shape.metrics}
    timeline: dict[str, dict[str, Any]] = {metric: {} for metric in shape.metrics}
    replays = _captured(bench._replace(arms=arms), shape, shape.metrics)

    def before() -> None:
        model.position.fill_(shape.decode_at or 0)
        meet(model.device)

    for metric in shape.metrics:
        found = kernels_of({name: replays[metric, name] for name in arms}, before)
        for name, arm in arms.items():
            sums = arm.all_reduces(model.num_blocks) + arm.mlp_all_reduce if bench.settings["tp_size"] > 1 else 0
            traced = sum(kernel.communicates for kernel in found[name]) == sums
            kernels = found[name] if traced else []
            shares[metric][name] = communication(kernels)
            if name in ends:
                timeline[metric][name] = block_timeline(kernels, model.num_blocks // 2, arm.dropped)
    return {"communication": shares, "timeline": timeline}
