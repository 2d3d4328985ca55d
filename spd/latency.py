"""Time to first token and time between tokens, from torchrun ranks over gloo on this machine's CPU.

Legend: B batch, T prompt tokens, V vocabulary.

A *session* measures several *arms* (sets of dropped blocks) of one checkpoint at one tp_size. It consists of launches;
a launch starts fresh ranks, which load their shards once and then time every arm in every repeat. Arms are interleaved
because the machine drifts, and launches are repeated because two launches of the same thing differ by more than two
repeats within one do: the launch is the unit of replication, and intervals are over launches.
"""

import gc
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import psutil

from spd.errors import UserError
from spd.launch import Progress, run_ranks, threads_per_rank
from spd.results import held

METRICS = ("ttft_ms", "tpot_ms")
CONFIDENCE = 0.95
"""What intervals have at least, where there are launches enough for it (six)."""


def measure_latency(
    checkpoint: Path,
    tp_size: int,
    arms: dict[str, list[int]],
    *,
    dtype: str | None,
    prompt_length: int,
    new_tokens: int,
    batch_size: int,
    launches: int,
    repeats: int,
    warmup: int,
    realtime: bool,
    timeout_s: float,
    corrections: Path | None = None,
    port: int = 0,
    log_dir: Path | None = None,
    on_progress: Progress | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Time every arm of `checkpoint` on `tp_size` CPU ranks, in `launches` separate launches.

    A launch waits while another one runs on this machine, whoever started it. The settings without a default have
    theirs in `spd.config.LatencyConfig`.

    Args:
        checkpoint: a Hugging Face folder.
        tp_size: number of ranks, each a process with its share of the cores.
        arms: name of each arm -> the blocks it drops. Include one that drops nothing, as the baseline.
        dtype: float32, float16 or bfloat16; None for the checkpoint's.
        prompt_length: T, random token ids.
        new_tokens: decoding steps after the first token, one at a time with the KV cache.
        batch_size: B.
        launches: separate starts of all ranks; three are the least that give an interval.
        repeats: how often each launch times each arm.
        warmup: rounds over all arms that each launch runs first and does not count.
        realtime: schedule the timed part of each rank first in, first out (SCHED_FIFO) where the system permits it, as
            for root; "scheduling" in the session says whether it did. Ranks wait for each other thousands of times a
            second, and where processes outnumber cores, ordinary time slices add milliseconds to some of these waits.
        timeout_s: seconds one launch may take, imports and loading included.
        corrections: file of corrections (`TensorParallelLM.save_corrections`) that dropped blocks run with.
        port: of the rendezvous; 0 picks a free one.
        log_dir: where the output of a launch that failed is kept.
        on_progress: called with (rounds done, rounds in all), a round being one repeat of every arm.
        say: told when another process has to be waited for.

    Returns:
        The session: its settings; "arms"; of every launch "launch_s" (seconds it took, starting included), "scheduling"
        ("fifo" or "default") and "busy_percent" (of the CPU, by others, just before it); for each of ttft_ms and
        tpot_ms `{arm: [[milliseconds of each repeat] of each launch]}`. Give it to `summarise`.

    Raises:
        UserError: a setting that cannot be, a prompt longer than the model takes, a block that does not exist, a port
            in use.
        spd.launch.RankFailed: a rank died or a launch took longer than `timeout_s`.
    """
    from spd.checkpoint import read_config

    if not arms:
        raise UserError("latency has nothing to measure: name at least one set of dropped blocks")
    at_least = {"prompt_length": 1, "new_tokens": 1, "batch_size": 1, "launches": 1, "repeats": 1, "warmup": 0}
    given = [prompt_length, new_tokens, batch_size, launches, repeats, warmup]
    for (name, least), value in zip(at_least.items(), given, strict=True):
        if value < least:
            raise UserError(f"latency.{name} must be at least {least}, got {value}")
    config = read_config(checkpoint)
    for arm, blocks in arms.items():
        if strangers := set(blocks) - set(range(config.num_hidden_layers)):
            raise UserError(
                f"latency arm {arm!r} drops block {min(strangers)}, but {checkpoint.name} has blocks 0 to "
                f"{config.num_hidden_layers - 1}"
            )
    longest = config.max_position_embeddings
    if prompt_length + new_tokens > longest:
        raise UserError(
            f"latency.prompt_length + latency.new_tokens is {prompt_length + new_tokens}, but {checkpoint.name} "
            f"takes at most {longest} tokens"
        )
    settings = {
        "tp_size": tp_size,
        "dtype": dtype,
        "prompt_length": prompt_length,
        "new_tokens": new_tokens,
        "batch_size": batch_size,
        "repeats": repeats,
        "warmup": warmup,
        "realtime": realtime,
    }
    session: dict[str, Any] = {
        "source": "measured",
        "backend": "gloo",
        "device": "cpu",
        **settings,
        "launches": launches,
        "threads_per_rank": threads_per_rank(tp_size),
        "arms": arms,
        "launch_s": [],
        "scheduling": [],
        "busy_percent": [],
        **{metric: {arm: [] for arm in arms} for metric in METRICS},
    }
    fix = None if corrections is None else str(corrections.resolve())
    for launch in range(launches):
        with alone(say):
            # What else runs is no part of the result, but a reader has to know: waits grow with it.
            session["busy_percent"].append(psutil.cpu_percent(interval=0.5))
            start = time.monotonic()
            times = run_ranks(
                "spd.latency:measure_rank",
                {
                    "checkpoint": str(checkpoint.resolve()),
                    "arms": arms,
                    "seed": launch,
                    "corrections": fix,
                    **settings,
                },
                tp_size=tp_size,
                port=port,
                timeout_s=timeout_s,
                log_dir=log_dir,
                on_progress=shifted(on_progress, launch * repeats, launches * repeats),
            )
            session["launch_s"].append(round(time.monotonic() - start, 3))
        session["scheduling"].append(times["scheduling"])
        for metric in METRICS:
            for arm in arms:
                session[metric][arm].append(times[metric][arm])
        if on_progress is not None:
            on_progress((launch + 1) * repeats, launches * repeats)
    return session


def alone(say: Callable[[str], None]) -> AbstractContextManager[None]:
    """Held while a launch runs, by all users and checkouts of this machine: two at once would time each other."""
    return held(Path(tempfile.gettempdir()) / "spd-latency.lock", say, "measures latency on this machine")


def shifted(on_progress: Progress | None, before: int, total: int) -> Progress | None:
    """`on_progress` of one launch among several."""
    return None if on_progress is None else lambda done, _: on_progress(before + done, total)


def measure_rank(settings: dict[str, Any], on_progress: Progress) -> dict[str, Any]:
    """One rank of one launch, as `run_ranks` calls it: {metric: {arm: [milliseconds of each repeat]}} and "scheduling".

    A time is the longest of any rank's, each from its own leaving of a barrier to its token: the same for all ranks but
    for how evenly the barrier lets go, and never flattered by that.
    """
    import torch
    import torch.distributed as dist
    from transformers import DynamicCache

    import spd

    model = spd.load(
        settings["checkpoint"], tp_size=settings["tp_size"], ranks="processes", dtype=settings["dtype"], device="cpu"
    )
    if settings.get("corrections"):
        model.load_corrections(Path(settings["corrections"]))
    generator = torch.Generator().manual_seed(settings["seed"])
    shape = (settings["batch_size"], settings["prompt_length"])
    prompt = torch.randint(model.config.vocab_size, shape, generator=generator)  # [B, T]

    def forward(tokens: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        logits = model.hf(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits  # [B, 1, V]
        return logits.argmax(-1)  # [B, 1]

    def measure() -> tuple[float, float]:
        cache = DynamicCache(config=model.hf.config)
        dist.barrier()
        start = time.perf_counter()
        token = forward(prompt, cache)
        first = time.perf_counter() - start
        dist.barrier()
        start = time.perf_counter()
        for _ in range(settings["new_tokens"]):
            token = forward(token, cache)
        return first * 1e3, (time.perf_counter() - start) * 1e3 / settings["new_tokens"]

    arms, repeats = settings["arms"], settings["repeats"]
    times = torch.zeros(len(METRICS), len(arms), repeats, dtype=torch.float64)
    places = list(range(len(arms)))
    blocks_of = list(arms.values())
    fifo = torch.tensor(float(settings["realtime"] and _schedule_first_in_first_out()))
    dist.all_reduce(fifo, op=dist.ReduceOp.MIN)
    with torch.inference_mode(), no_garbage_collection():
        for _ in range(settings["warmup"]):
            for place in places:
                model.drop(blocks_of[place])
                measure()
        for repeat in range(repeats):
            for place in arm_order(len(arms), repeat, settings["seed"]):
                model.drop(blocks_of[place])
                times[:, place, repeat] = torch.tensor(measure(), dtype=torch.float64)
            on_progress(repeat + 1, repeats)
    dist.all_reduce(times, op=dist.ReduceOp.MAX)
    found: dict[str, Any] = {"scheduling": "fifo" if fifo else "default"}
    for m, metric in enumerate(METRICS):
        found[metric] = {arm: [round(ms, 4) for ms in times[m, a].tolist()] for a, arm in enumerate(arms)}
    return found


def arm_order(num_arms: int, repeat: int, seed: int) -> list[int]:
    """In which order the arms are timed in one repeat of the launch of this seed.

    Each odd repeat runs the one before it backwards, so that in the two together a steady drift falls on all arms
    alike. Each two have an order of their own by chance, as an arm can be slower for the one before it.
    """
    places = random.Random(f"{seed} {repeat // 2}").sample(range(num_arms), num_arms)
    return places[::-1] if repeat % 2 else places


def _schedule_first_in_first_out() -> bool:
    """Give every thread of this process SCHED_FIFO; whether that was permitted. Threads made later inherit it."""
    try:
        # gloo's own threads as well: a rank's progress hangs on them.
        for thread in Path("/proc/self/task").iterdir():
            os.sched_setscheduler(int(thread.name), os.SCHED_FIFO, os.sched_param(1))
    except (OSError, AttributeError):  # not permitted; not Linux
        return False
    return True


class no_garbage_collection:
    """A collection takes milliseconds and would fall on one arm."""

    def __enter__(self) -> None:
        gc.collect()
        gc.disable()

    def __exit__(self, *_: object) -> None:
        gc.enable()


def summarise(session: dict[str, Any], arm: str, baseline: str) -> dict[str, Any]:
    """A record's latency entry for one arm of a session (see `measure_latency`).

    Each launch gives one number, the median of its repeats; for a speed-up that is `100 (1 - arm / baseline)` of the
    two medians of the *same* launch, in percent, positive when the arm is faster. Reported are the median over launches
    and, from three launches on, an interval of their order statistics: from the k-th smallest to the k-th largest
    launch, which has the median of all launches in it with the probability "confidence" (`_order_statistics`). Up to
    five launches that is their range, with less than 95 %. With fewer than three, low, high and confidence are None.
    """
    import numpy as np

    per_launch: dict[str, list[float]] = {}
    for metric in METRICS:
        ours, theirs = (np.array([np.median(times) for times in session[metric][name]]) for name in (arm, baseline))
        per_launch[metric] = ours.tolist()
        per_launch[metric.replace("_ms", "_speedup_percent")] = (100 * (1 - ours / theirs)).tolist()
    copied = ("source", "backend", "device", "launches", "repeats", "prompt_length", "batch_size", "new_tokens")
    return {
        **{name: session[name] for name in copied},
        "threads_per_rank": session["threads_per_rank"],
        "scheduling": " and ".join(sorted(set(session["scheduling"]))),
        "busy_percent": session["busy_percent"],
        "confidence": _order_statistics(session["launches"])[1],
        **{name: _median_and_interval(values) for name, values in per_launch.items()},
        "per_launch": per_launch,
    }


def _order_statistics(launches: int) -> tuple[int, float | None]:
    """The k whose interval, from the k-th smallest to the k-th largest launch, is the narrowest with `CONFIDENCE`, and
    its confidence; the range (k = 1) where none reaches that. No shape of distribution is assumed: each launch is below
    the median with probability 1/2. (0, None) with fewer than three launches.
    """
    from scipy.stats import binom

    if launches < 3:
        return 0, None
    confidences = {k: float(1 - 2 * binom.cdf(k - 1, launches, 0.5)) for k in range(1, (launches + 1) // 2 + 1)}
    k = max((k for k, confidence in confidences.items() if confidence >= CONFIDENCE), default=1)
    return k, confidences[k]


def _median_and_interval(values: Sequence[float]) -> dict[str, float | None]:
    k, confidence = _order_statistics(len(values))
    low, high = (None, None) if confidence is None else (sorted(values)[k - 1], sorted(values)[-k])
    return {"median": statistics.median(values), "low": low, "high": high}
