"""`latency=gpu`: time to first token and time per token of torchrun ranks, one a GPU, at the speed of a serving engine.

As in `spd.latency`, a *session* has several launches, and each launch times all arms in turns. Beside the arms that a
model can run with, there are two ceilings: no all-reduce after attention in any block, and none at all.
"""

import time
from pathlib import Path
from typing import Any

from filelock import FileLock

from spd.errors import UserError
from spd.gpu.interconnect import ENVIRONMENT
from spd.latency import CONFIDENCE, METRICS, lock_file, shifted
from spd.launch import Progress, run_ranks

CEILINGS: dict[str, dict[str, Any]] = {
    "no_attention_all_reduce": {"dropped": [], "attention_all_reduce": False},
    "no_all_reduce": {"dropped": [], "attention_all_reduce": False, "mlp_all_reduce": False},
}
"""Arms that are not models one can use: what dropping sync points could save at most, and what communication costs."""

_OF_LAUNCH = ("seconds", "peak_memory_gb", "rates", "link", "all_reduce", "floor_ms", "communication", "timeline")


def check_gpus(tp_size: int) -> None:
    """Raises UserError unless this machine has a GPU for every rank."""
    import torch

    found = torch.cuda.device_count()
    if found < tp_size:
        least = f"parallel.tp_size={found}, " if found else ""
        raise UserError(
            f"latency=gpu needs a GPU for each of parallel.tp_size={tp_size} ranks, and torch sees {found} on this "
            f"machine; write {least}latency=cpu or latency=none."
        )


def measure_gpu_latency(
    model: Path | dict[str, Any],
    tp_size: int,
    arms: dict[str, list[int]],
    *,
    dtype: str,
    prompt_length: int,
    decode_at: int,
    new_tokens: int,
    batch_size: int,
    launches: int,
    repeats: int,
    warmup: int,
    all_reduce: str,
    interconnect: str,
    tp_plan: bool = False,
    timeout_s: float,
    port: int = 0,
    devices: list[int] | None = None,
    log_dir: Path | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Times every arm and the two ceilings on `tp_size` GPUs, in `launches` separate launches.

    The settings are those of `spd.config.LatencyConfig`.

    Args:
        model: a Hugging Face folder; or an architecture (`ModelConfig.architecture`), whose weights are then random.
        tp_size: number of ranks, each on a GPU of its own.
        arms: name of each arm -> the blocks it drops, "0" among them, the baseline.
        dtype: of weights and activations.
        decode_at: position of the first token timed in decoding.
        all_reduce: nccl, one_shot, two_shot or auto (`spd.gpu.all_reduce.choose`).
        interconnect: native, lbw or socket (`spd.gpu.interconnect.ENVIRONMENT`).
        tp_plan: whether to time transformers' own tensor parallelism too, in a launch after each of these.
        devices: of each rank, by default 0 to tp_size - 1. Ranks that share a GPU (all_reduce one_shot or two_shot,
            with TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1) give right numbers, and times that mean nothing.

    Returns:
        The session: its settings, "arms" and "ceilings"; for ttft_ms and tpot_ms `{arm: [[milliseconds of each repeat]
        of each launch]}`; "tp_plan", the same of transformers, or None; and of each launch what
        `spd.gpu.rank.measure_rank` found beside the times. Give it to `summarise`.

    Raises:
        UserError: there are too few GPUs, a rank's part does not fit, or the all-reduce asked for does not work here.
        spd.launch.RankFailed: a rank died, or a launch took longer than `timeout_s`.
    """
    if devices is None:
        check_gpus(tp_size)
    if tp_plan:
        from spd.gpu.tp_plan import check_has_plan, config_of  # imports torch and transformers: slow

        check_has_plan(config_of(model))
    settings: dict[str, Any] = {
        "tp_size": tp_size,
        "dtype": dtype,
        "prompt_length": prompt_length,
        "decode_at": decode_at,
        "new_tokens": new_tokens,
        "batch_size": batch_size,
        "repeats": repeats,
        "warmup": warmup,
        "interconnect": interconnect,
    }
    every = {name: {"dropped": blocks} for name, blocks in arms.items()} | CEILINGS
    session: dict[str, Any] = {
        "source": "measured",
        "backend": "nccl",
        "device": "cuda",
        **settings,
        "launches": launches,
        "arms": arms,
        "ceilings": list(CEILINGS),
        "launch_s": [],
        **{metric: {name: [] for name in every} for metric in METRICS},
        "tp_plan": {metric: [] for metric in METRICS} if tp_plan else None,
        **{name: [] for name in _OF_LAUNCH},
    }
    given = {"architecture": model} if isinstance(model, dict) else {"checkpoint": str(model.resolve())}
    # Multicast is left off: the kernels used here need none, and not every machine permits it.
    environment = ENVIRONMENT[interconnect] | {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}

    def ranks(function: str, launch: int) -> dict[str, Any]:
        asked = {"checkpoint": None, "architecture": None, **given, **settings, "seed": launch, "timeout_s": timeout_s}
        asked |= {"arms": every, "all_reduce": all_reduce, "devices": devices or list(range(tp_size))}
        return run_ranks(
            function,
            asked,
            tp_size=tp_size,
            port=port,
            timeout_s=timeout_s,
            environment=environment,
            log_dir=log_dir,
            on_progress=shifted(on_progress, launch * repeats, launches * repeats),
        )

    for launch in range(launches):
        with FileLock(lock_file(), mode=0o666):  # two launches at once would time each other
            start = time.monotonic()
            found = ranks("spd.gpu.rank:measure_rank", launch)
            session["launch_s"].append(round(time.monotonic() - start, 3))
            if tp_plan:
                theirs = ranks("spd.gpu.tp_plan:measure_rank", launch)
                for metric in METRICS:
                    session["tp_plan"][metric].append(theirs[metric])
        for metric in METRICS:
            for name in every:
                session[metric][name].append(found[metric][name])
        for name in _OF_LAUNCH:
            session[name].append(found[name])
        if on_progress is not None:
            on_progress((launch + 1) * repeats, launches * repeats)
    return session


def summarise(session: dict[str, Any], arm: str, baseline: str = "0") -> dict[str, Any]:
    """A record's latency entry for one arm of a session (see `measure_gpu_latency`).

    Each launch gives one number, the median of its repeats, and a speed-up is `100 (1 - arm / baseline)` of the same
    launch in percent. "median" is over launches, "low" to "high" its bootstrap interval (None with fewer than three
    launches), "p10" to "p90" over all repeats of all launches. "ceilings" are the speed-ups of the ceilings, and
    "fraction_of_ceiling" the part of *no attention all-reduce*'s saving that the arm has (None where that saves
    nothing). "tp_plan" has transformers' own times, and how many times the arm's they are. "floor_ms", "over_floor",
    "communication" (of the baseline, and of the arm), "all_reduce", "link", "rates" and "peak_memory_gb" are the first
    launch's.
    """
    import numpy as np

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
    entry["confidence"] = CONFIDENCE if session["launches"] >= 3 else None
    entry["per_launch"], entry["ceilings"], entry["fraction_of_ceiling"] = {}, {}, {}
    entry["floor_ms"], entry["over_floor"], entry["communication"] = {}, {}, {}
    for metric in METRICS:
        times, faster = medians(metric, arm).tolist(), metric.replace("_ms", "_speedup_percent")
        p10, p90 = np.percentile(np.concatenate(session[metric][arm]), [10, 90]).tolist()
        entry[metric] = _bootstrap(times) | {"p10": p10, "p90": p90}
        entry[faster] = _bootstrap(speedup(metric, arm))
        entry["per_launch"] |= {metric: times, faster: speedup(metric, arm)}
        entry["ceilings"][metric] = {name: _bootstrap(speedup(metric, name)) for name in session["ceilings"]}
        most = entry["ceilings"][metric]["no_attention_all_reduce"]["median"]
        entry["fraction_of_ceiling"][metric] = entry[faster]["median"] / most if most > 0 else None
        entry["floor_ms"][metric] = floor = session["floor_ms"][0][metric][arm]
        entry["over_floor"][metric] = entry[metric]["median"] / floor
        shares = session["communication"][0][metric]
        entry["communication"][metric] = {"before": shares[baseline], "after": shares[arm]}
    if session["tp_plan"] is not None:
        theirs = {metric: [float(np.median(times)) for times in session["tp_plan"][metric]] for metric in METRICS}
        entry["tp_plan"] = {metric: _bootstrap(times) for metric, times in theirs.items()}
        entry["tp_plan"]["times_ours"] = {
            metric: _bootstrap((np.array(times) / medians(metric, arm)).tolist()) for metric, times in theirs.items()
        }
    entry["tokens_per_s"] = 1e3 * session["batch_size"] / entry["tpot_ms"]["median"]
    return entry | {name: session[name][0] for name in ("peak_memory_gb", "rates", "link", "all_reduce")}


def _bootstrap(values: list[float]) -> dict[str, float | None]:
    """The median over launches with its percentile bootstrap interval."""
    import numpy as np
    from scipy.stats import bootstrap

    middle = float(np.median(values))
    if len(values) < 3:
        return {"median": middle, "low": None, "high": None}
    found = bootstrap((values,), np.median, confidence_level=CONFIDENCE, method="percentile", rng=0).confidence_interval
    return {"median": middle, "low": float(found.low), "high": float(found.high)}
