"""CUDA graphs: the kernels of a function, recorded once and started as one. On a CPU a function simply runs."""

from collections.abc import Callable
from typing import Any

import torch


def warm_up(run: Callable[[], object], device: torch.device, times: int = 1) -> None:
    """Runs what will be captured, so that compilers and libraries have done what cannot be recorded."""
    if device.type != "cuda":
        run()
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(times):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()


class Captured:
    """The kernels of `run`, replayed by a call on the same memory.

    Holds `run`, and so the tensors that it reads. Graphs that never run at once can share a pool (`shared_pool`).
    """

    def __init__(self, run: Callable[[], object], pool: Any = None) -> None:
        self.run, self.graph = run, torch.cuda.CUDAGraph()
        # Of this thread alone: NCCL and the profiler have threads of their own, which may allocate meanwhile.
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            run()

    def __call__(self) -> None:
        self.graph.replay()


def capture(run: Callable[[], object], device: torch.device, pool: Any = None) -> Callable[[], object]:
    """What runs the same kernels again, as one start on a GPU; `run` has been warmed up."""
    return Captured(run, pool) if device.type == "cuda" else run


def shared_pool(device: torch.device) -> Any:
    """Memory for graphs that never run at once."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None
