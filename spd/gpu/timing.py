"""How GPUs are timed: let go together, each by its own clock, and the slowest counts."""

import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


def meet(device: torch.device) -> None:
    """On the GPUs, not the CPUs: what follows on each GPU's stream begins within microseconds of the others.

    The GPUs wait a moment first, so that it is in their queues by then: a launch from the CPU, which an engine hides,
    is in no time that is reported. (With gloo, for tests, it is the CPUs that meet.)
    """
    if dist.is_initialized() and dist.get_backend() != "nccl":
        synchronise(device)
        dist.barrier()
    elif device.type == "cuda":
        torch.cuda._sleep(10**6)  # cycles: half a millisecond
        if dist.is_initialized():
            dist.all_reduce(torch.zeros(1, device=device))


def events_ms(run: Callable[[], object], times: int) -> float:
    """Milliseconds of one of `times` runs: on the GPU, between two events, or by the clock where there is none."""
    if not torch.cuda.is_available():
        began = time.perf_counter()
        for _ in range(times):
            run()
        return (time.perf_counter() - began) * 1e3 / times
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / times


def slowest(values: Tensor, device: torch.device) -> Tensor:
    """The largest of any rank's, number by number."""
    if not dist.is_initialized():
        return values
    values = values.to(of_group(device))
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values.cpu()


def of_group(device: torch.device) -> torch.device:
    """Where the process group sums numbers of a rank on `device`: there, or with gloo on the CPU."""
    return device if dist.get_backend() == "nccl" else torch.device("cpu")


def synchronise(device: torch.device) -> None:
    """Waits for the GPU, if it is one."""
    if device.type == "cuda":
        torch.cuda.synchronize()
