"""What is reported of a session of `latency=gpu`: a record's latency entry, with intervals over launches."""

import functools
import math
from typing import Any

import numpy as np
from scipy.stats import binom, bootstrap

from spd.gpu.latency import BLOCKS
from spd.latency import CONFIDENCE

_LEVELS = (CONFIDENCE, 0.975, 0.99, 0.999, 0.9999)


def summarise(session: dict[str, Any], arm: str, baseline: str = "0") -> dict[str, Any]:
    """A record's latency entry for one arm of a session (see `measure_gpu_latency`).

    Each launch gives one number, the median of its repeats, and a speed-up is `100 (1 - arm / baseline)` of the same
    launch in percent. "median" is over launches, "low" to "high" its bootstrap interval (None with fewer than three
    launches; of three it is their range, which order statistics give 75 %), "p10" to "p90" over all repeats of all
    launches. "blocks_ms" are the decoder blocks alone, None where they were not timed. "ceilings" are the speed-ups of
    the ceilings, and "fraction_of_ceiling" the part of *no attention all-reduce*'s saving that the arm has (None where
    that saves nothing in a launch). "tp_plan" has transformers' own times, and how many times the arm's they are.
    "peak_memory_gb" is what torch allocated, NCCL's buffers and the driver's own not counted. "floor_ms", "over_floor",
    "communication" (of the baseline, and of the arm), "all_reduce", "link", "rates" and "nccl_environment" are the
    first launch's.
    """

    def medians(metric: str, name: str) -> np.ndarray:
        return np.array([np.median(times) for times in session[metric][name]])

    def speedup(metric: str, name: str) -> list[float]:
        return (100 * (1 - medians(metric, name) / medians(metric, baseline))).tolist()

    entry: dict[str, Any] = {
        name: session[name]
        for name in (
            *("source", "backend", "device", "launches", "repeats", "prompt_length", "decode_at", "batch_size"),
            *("new_tokens", "dtype", "interconnect"),
        )
    }
    entry["confidence"] = None if session["launches"] < 3 else _level(session["launches"])[1]
    entry["per_launch"], entry["ceilings"], entry["fraction_of_ceiling"] = {}, {}, {}
    entry["floor_ms"], entry["over_floor"], entry["communication"] = {}, {}, {}
    for metric in session["metrics"]:
        times, faster = medians(metric, arm).tolist(), metric.replace("_ms", "_speedup_percent")
        entry[metric] = _bootstrap(times) | _spread(np.concatenate(session[metric][arm]))
        entry[faster] = _bootstrap(speedup(metric, arm))
        entry["per_launch"] |= {metric: times, faster: speedup(metric, arm)}
        entry["ceilings"][metric] = {name: _bootstrap(speedup(metric, name)) for name in session["ceilings"]}
        most = speedup(metric, "no_attention_all_reduce")
        entry["fraction_of_ceiling"][metric] = None
        if min(most) > 0:
            entry["fraction_of_ceiling"][metric] = _bootstrap((np.array(speedup(metric, arm)) / most).tolist())
        entry["floor_ms"][metric] = floor = session["floor_ms"][0][metric][arm]
        entry["over_floor"][metric] = entry[metric]["median"] / floor
        shares = (session["communication"][0] or {}).get(metric) or {}
        entry["communication"][metric] = {"before": shares.get(baseline), "after": shares.get(arm)}
    if session["tp_plan"] is not None:
        theirs = {metric: [float(np.median(one)) for one in times] for metric, times in session["tp_plan"].items()}
        spread = {metric: _spread(np.concatenate(times)) for metric, times in session["tp_plan"].items()}
        entry["tp_plan"] = {metric: _bootstrap(times) | spread[metric] for metric, times in theirs.items()}
        entry["tp_plan"]["times_ours"] = {
            metric: _bootstrap((np.array(times) / medians(metric, arm)).tolist()) for metric, times in theirs.items()
        }
    blocks = {phase.replace("_blocks", ""): medians(phase, arm) for phase in BLOCKS if phase in session}
    entry["blocks_ms"] = {metric: _bootstrap(times.tolist()) for metric, times in blocks.items()} or None
    tokens, peaks = 1e3 * session["batch_size"], session["peak_memory_gb"]
    entry["tokens_per_s"] = None
    if "tpot_ms" in session:
        rates = tokens / np.concatenate(session["tpot_ms"][arm])
        entry["tokens_per_s"] = _bootstrap((tokens / medians("tpot_ms", arm)).tolist()) | _spread(rates)
    entry["peak_memory_gb"] = _bootstrap(peaks) | _spread(peaks)
    return entry | {name: session[name][0] for name in ("rates", "link", "all_reduce", "nccl_environment")}


def _spread(values: Any) -> dict[str, float]:
    return dict(zip(("p10", "p90"), np.percentile(values, [10, 90]).tolist(), strict=True))


def _bootstrap(values: list[float]) -> dict[str, float | None]:
    """The median over launches with its percentile bootstrap interval, at the level that `_level` finds."""
    middle = float(np.median(values))
    if len(values) < 3:
        return {"median": middle, "low": None, "high": None}
    low, high = _interval(values, _level(len(values))[0])
    return {"median": middle, "low": low, "high": high}


def _interval(values: list[float], level: float) -> tuple[float, float]:
    found = bootstrap((values,), np.median, confidence_level=level, method="percentile", rng=0).confidence_interval
    return float(found.low), float(found.high)


@functools.cache
def _level(launches: int) -> tuple[float, float]:
    """The level to ask a bootstrap for, and how often at least its interval then holds the median, whatever the
    distribution: a matter of coin tosses.

    Of few launches it is narrower than it is asked to be: for 95 % of seven it leaves out the shortest and the longest,
    which leaves 87.5 %. So more is asked of it until it has `CONFIDENCE`, which takes six launches.
    """
    for level in _LEVELS:
        low, high = _interval([float(place) for place in range(launches)], level)
        outside = math.ceil(low), launches - 1 - math.floor(high)
        confidence = 1 - sum(float(binom.cdf(count, launches, 0.5)) for count in outside)
        if confidence >= CONFIDENCE:
            break
    return level, confidence
