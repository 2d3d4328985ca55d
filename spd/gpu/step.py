"""The latency step of a point with `latency=gpu`: one session for all drop fractions, and the point's entry of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from spd.config import RunConfig
from spd.gpu.latency import Shape, measure_gpu_latency
from spd.gpu.summary import summarise
from spd.progress import Display
from spd.results import Results


def gpu_latency(
    config: RunConfig,
    results: Results,
    display: Display,
    model: Path | dict[str, Any],
    dropped: Callable[[float], list[int]],
    log_dir: Path,
    **parts: Any,
) -> dict[str, Any]:
    """The record's latency entry.

    Args:
        model: as for `measure_gpu_latency`.
        dropped: fraction -> the blocks dropped.
        log_dir: where the output of a launch that failed is kept.
        parts: what determines the session beside the settings: weights and machine.
    """
    settings, parallel = config.latency, config.parallel
    blocks = [dropped(drop) for drop in (0.0, config.drop, *settings.drops)]
    # By number of blocks: fractions that come to the same blocks are one arm.
    arms = {str(len(some)): some for some in sorted(blocks, key=len)}
    asked: dict[str, Any] = {
        "dtype": config.model.dtype.name,
        "new_tokens": settings.new_tokens,
        "launches": settings.launches,
        "warmup": settings.warmup,
        "all_reduce": settings.all_reduce.name,
        "interconnect": config.interconnect.name.name,
        "tp_plan": settings.tp_plan,
    }
    shape = Shape.of(settings)

    def measure() -> dict[str, Any]:
        display.step(f"measuring latency, launches: {settings.launches}, GPUs: {parallel.tp_size}")
        (session,) = measure_gpu_latency(
            model,
            parallel.tp_size,
            arms,
            [shape],
            port=parallel.port,
            timeout_s=settings.timeout_s,
            log_dir=log_dir,
            on_progress=display,
            say=display.say,
            **asked,
        )
        return session

    determining = {**asked, **shape._asdict(), **parts, "tp_size": parallel.tp_size, "arms": arms}
    session = results.cached("gpu_latency", determining, measure)
    return summarise(session, arm=str(len(dropped(config.drop)))) | {"engine": parts["machine"]["engine"]}
