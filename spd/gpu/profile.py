"""Where the time of a forward goes, from its kernels: the share of communication, and one block's timeline."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch

_MARK = "roll_cuda"
"""In the name of the kernel of torch.roll, which no forward has."""


class Kernel(NamedTuple):
    """One kernel, or copy, on the GPU."""

    name: str
    start_us: float
    end_us: float

    @property
    def communicates(self) -> bool:
        """Whether it sums over ranks: NCCL's kernels and those of symmetric memory."""
        return self.name.startswith("nccl") or "shot_all_reduce" in self.name


def kernels_of(runs: Mapping[str, Callable[[], object]], before: Callable[[], None]) -> dict[str, list[Kernel]]:
    """The kernels of each run in the order they began, microseconds from its first one on; [] where none are traced.

    `before` is called before each, to let all ranks go together.
    """
    if not torch.cuda.is_available():
        return {name: [] for name in runs}
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    beads = torch.zeros(2, device="cuda")
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        before()
        next(iter(runs.values()))()  # a trace can lose what it begins with
        for run in runs.values():
            before()
            beads.roll(1, 0)
            run()
            beads.roll(1, 0)
        torch.cuda.synchronize()
    found = [
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and event.time_range.end > event.time_range.start
    ]
    return dict(zip(runs, between_marks(found, len(runs)), strict=True))


def between_marks(kernels: list[Kernel], runs: int) -> list[list[Kernel]]:
    """The kernels of so many runs, each of which has a mark before and after it; [] for all where marks are lost."""
    kernels = sorted(kernels, key=lambda kernel: kernel.start_us)
    marks = [place for place, kernel in enumerate(kernels) if _MARK in kernel.name]
    if len(marks) != 2 * runs:
        return [[] for _ in range(runs)]
    found = []
    for before, after in zip(marks[::2], marks[1::2], strict=True):
        part = kernels[before + 1 : after]
        first = part[0].start_us if part else 0.0
        found.append([Kernel(name, start - first, end - first) for name, start, end in part])
    return found


def communication(kernels: list[Kernel]) -> dict[str, float] | None:
    """Of one forward: "share" (of its time, in communication), "overlap" (of that, with other kernels at work) and
    "busy" (of its time, in any kernel). None without kernels."""
    if not kernels:
        return None
    span = max(kernel.end_us for kernel in kernels) - min(kernel.start_us for kernel in kernels)
    talking = _union(kernel for kernel in kernels if kernel.communicates)
    working = _union(kernel for kernel in kernels if not kernel.communicates)
    both = _length(_union([Kernel("", *part) for part in talking + working]))
    total = _length(talking)
    overlap = (total + _length(working) - both) / total if total else 0.0
    return {"share": round(total / span, 4), "overlap": round(overlap, 4), "busy": round(both / span, 4)}


def _union(kernels: Iterable[Kernel]) -> list[tuple[float, float]]:
    """The times at which at least one of them runs."""
    merged: list[tuple[float, float]] = []
    for _, start, end in sorted(kernels, key=lambda kernel: kernel.start_us):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _length(parts: list[tuple[float, float]]) -> float:
    return sum(end - start for start, end in parts)


def block_timeline(kernels: list[Kernel], block: int, dropped: frozenset[int]) -> list[dict[str, Any]]:
    """The kernels of one block, from the last all-reduce of the block before it to its own last one, its start at 0.

    A block ends with an all-reduce, and has one more unless it is dropped. [] where there are no all-reduces.
    """
    sums = [place for place, kernel in enumerate(kernels) if kernel.communicates]
    ends = [i + 1 + sum(1 for j in range(i + 1) if j not in dropped) for i in (block - 1, block)]
    if block < 1 or len(sums) < ends[1]:
        return []
    first, last = (sums[end - 1] for end in ends)
    start = kernels[first].end_us
    return [
        {"name": kernel.name, "start_us": round(kernel.start_us - start, 2), "end_us": round(kernel.end_us - start, 2),
         "communicates": kernel.communicates}
        for kernel in kernels[first + 1 : last + 1]
    ]  # fmt: skip
