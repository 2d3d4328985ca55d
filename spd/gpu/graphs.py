"""CUDA graphs: the kernels of a function, recorded once and started as one. On a CPU a function simply runs."""

from collections.abc import Callable
from typing import Any

import torch


def warm_up(run: Callable[[], object], device: torch.device, times: int = 3) -> None:
    """Runs what will be captured, so that compilers and libraries have done what cannot be recorded."""
    if device.type != "cuda":
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(times):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()


def capture(run: Callable[[], object], device: torch.device, pool: Any = None) -> Callable[[], object]:
    """What replays the kernels of `run`, on the same memory; graphs that never run at once can share a pool."""
    if device.type != "cuda":
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        run()
    return graph.replay


def shared_pool(device: torch.device) -> Any:
    """Memory for graphs that never run at once."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None
