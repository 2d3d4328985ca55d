"""One rank of one launch of `latency=gpu`: builds its part of the model, captures every arm, times them in turns."""

import os
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from spd.checkpoint import Checkpoint, read_architecture, read_config
from spd.errors import UserError
from spd.families import family_of
from spd.gpu import all_reduce, interconnect
from spd.gpu.limits import Rates, events_ms
from spd.gpu.memory import check_memory, what_fits
from spd.gpu.model import Arm, GraphModel
from spd.gpu.profile import block_timeline, communication, kernels_of
from spd.latency import METRICS, arm_order
from spd.launch import Progress


def measure_rank(settings: dict[str, Any], on_progress: Progress) -> dict[str, Any]:
    """As `run_ranks` calls it: the times of every arm, and what they are to be judged by.

    Raises:
        UserError: its part does not fit into its GPU, with what would; an all-reduce that does not work here.
    """
    rank, tp_size = int(os.environ["RANK"]), settings["tp_size"]
    device = torch.device("cuda", settings["devices"][rank])
    torch.cuda.set_device(device)
    alone = len(set(settings["devices"])) == tp_size
    limit = timedelta(seconds=settings["timeout_s"])
    dist.init_process_group("nccl" if alone else "gloo", timeout=limit, device_id=device if alone else None)
    dtype = getattr(torch, settings["dtype"])
    folder = None if settings["checkpoint"] is None else Path(settings["checkpoint"])
    config = read_config(folder) if folder else read_architecture(settings["architecture"])
    family = family_of(config)
    batch, prompt, decode_at = settings["batch_size"], settings["prompt_length"], settings["decode_at"]
    cache = -(-(max(prompt, decode_at) + settings["new_tokens"]) // 128) * 128
    shape = {
        "config": config,
        "family": family,
        "batch_size": batch,
        "prompt_length": prompt,
        "cache_length": cache,
        "dtype": dtype,
    }
    check_memory(rank, tp_size, device, torch.cuda.mem_get_info(device)[0], **shape)
    clock = [time.perf_counter()]
    try:
        rates = Rates.measured(dtype, device)
        link = interconnect.probe(device)
        sizes = {"ttft_ms": batch * prompt * config.hidden_size, "tpot_ms": batch * config.hidden_size}
        reduce: all_reduce.AllReduce | None = None
        chosen: dict[int, dict[str, Any]] = {}
        if tp_size > 1:
            reduce, chosen = all_reduce.choose(
                settings["all_reduce"],
                list(sizes.values()),
                dtype,
                device,
                direct_links=settings["interconnect"] == "native",
            )
        torch.cuda.reset_peak_memory_stats(device)
        model = GraphModel(
            config,
            family,
            tp_size,
            rank,
            checkpoint=Checkpoint(folder) if folder else None,
            batch_size=batch,
            prompt_length=prompt,
            cache_length=cache,
            all_reduce=reduce,
            dtype=dtype,
            device=device,
        )
        clock.append(time.perf_counter())
        generator = torch.Generator(device).manual_seed(settings["seed"])
        model.prompt.random_(0, config.vocab_size, generator=generator)
        arms = {name: Arm(frozenset(arm.pop("dropped")), **arm) for name, arm in settings["arms"].items()}
        pool = torch.cuda.graph_pool_handle()
        graphs = {
            (metric, name): model.capture(arm, decode=metric == "tpot_ms", pool=pool)
            for metric in METRICS
            for name, arm in arms.items()
        }
        clock.append(time.perf_counter())
        timed = partial(_timed, model, graphs, settings)
        for _ in range(settings["warmup"]):
            for name in arms:
                timed(name)
        times = torch.zeros(len(METRICS), len(arms), settings["repeats"], dtype=torch.float64)
        names = list(arms)
        for repeat in range(settings["repeats"]):
            for place in arm_order(len(names), repeat):
                times[:, place, repeat] = torch.tensor(timed(names[place]), dtype=torch.float64)
            on_progress(repeat + 1, settings["repeats"])
        found = slowest(times, device)
        peak = torch.tensor(float(torch.cuda.max_memory_allocated(device)), dtype=torch.float64)
        result: dict[str, Any] = {
            metric: {name: [round(ms, 4) for ms in found[m, a].tolist()] for a, name in enumerate(names)}
            for m, metric in enumerate(METRICS)
        }
        profiles = _profiles(model, graphs, arms)
        return result | {
            "seconds": {"build": round(clock[1] - clock[0], 1), "compile_and_capture": round(clock[2] - clock[1], 1)},
            "peak_memory_gb": round(float(slowest(peak, device)) / 1e9, 3),
            "rates": {"bandwidth_gb_per_s": round(rates.bandwidth / 1e9), "tflop_per_s": round(rates.flops / 1e12, 1)},
            "link": link,
            "all_reduce": {metric: chosen[size] for metric, size in sizes.items() if size in chosen},
            "floor_ms": {
                metric: {
                    name: round(_floor_ms(model, arm, rates, decode_at if metric == "tpot_ms" else None, us), 4)
                    for name, arm in arms.items()
                }
                for metric, us in ((m, _us(chosen.get(size))) for m, size in sizes.items())
            },
            **profiles,
        }
    except torch.OutOfMemoryError as error:
        total = torch.cuda.mem_get_info(device)[1]
        raise UserError(
            f"rank {rank} of {tp_size} ran out of memory on {device}, {total / 1e9:.1f} GB in all: "
            f"{str(error).split('. ')[0]}. {what_fits(int(0.9 * total), tp_size=tp_size, **shape)}."
        ) from error


def _timed(model: GraphModel, graphs: dict, settings: dict[str, Any], name: str) -> tuple[float, float]:
    """Milliseconds to the first token, and of a token after it, by this rank's clock, all ranks let go together."""
    meet(model.device)
    first = events_ms(graphs["ttft_ms", name].replay, 1)
    model.position.fill_(settings["decode_at"])
    meet(model.device)
    return first, events_ms(graphs["tpot_ms", name].replay, settings["new_tokens"])


def meet(device: torch.device) -> None:
    """On the GPUs, not the CPUs: what follows on each GPU's stream begins within microseconds of the others."""
    if dist.get_backend() == "nccl":
        dist.all_reduce(torch.zeros(1, device=device))
    else:
        torch.cuda.synchronize()
        dist.barrier()


def slowest(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The largest of any rank's, number by number."""
    values = values.to(device if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values.cpu()


def _us(chosen: dict[str, Any] | None) -> float:
    return 0.0 if chosen is None else chosen["us"][chosen["kind"]]


def _floor_ms(model: GraphModel, arm: Arm, rates: Rates, decode_at: int | None, reduce_us: float) -> float:
    """Weights, and keys and values up to `decode_at`, over measured bandwidth, or matrix products over the measured
    rate; and every all-reduce at its measured latency. `decode_at` is None for prefill."""
    batch, prompt = model.prompt.shape
    size = model.dtype.itemsize
    blocks, head = sum(block.bytes for block in model.blocks), model.head.numel() * size
    read, tokens = blocks + head, batch * prompt
    if decode_at is not None:
        read += sum(cache[:, :, :decode_at].numel() * size for pair in model.cache for cache in pair)
        tokens = batch
    operations = 2 * (blocks / size * tokens + head / size * batch)
    undropped = model.num_blocks - len(arm.dropped)
    sums = undropped * arm.attention_all_reduce + model.num_blocks * arm.mlp_all_reduce
    return rates.floor_ms(read, operations) + sums * reduce_us / 1e3


def _profiles(model: GraphModel, graphs: dict, arms: dict[str, Arm]) -> dict[str, Any]:
    """Of each forward of each arm, the share of communication; of a block in the middle, its timeline."""
    shares: dict[str, dict[str, Any]] = {metric: {} for metric in METRICS}
    timeline: dict[str, dict[str, Any]] = {metric: {} for metric in METRICS}
    for (metric, name), graph in graphs.items():
        model.position.fill_(model.prompt.shape[1])
        meet(model.device)
        graph.replay()
        kernels = kernels_of(graph.replay)
        shares[metric][name] = communication(kernels)
        arm = arms[name]
        if arm.attention_all_reduce and arm.mlp_all_reduce and len(arm.dropped) in (0, model.num_blocks):
            timeline[metric][name] = block_timeline(kernels, model.num_blocks // 2, arm.dropped)
    return {"communication": shares, "timeline": timeline}
