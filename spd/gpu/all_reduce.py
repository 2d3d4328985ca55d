"""Sums over ranks: NCCL's, and PyTorch's symmetric-memory kernels, which are quicker over direct links.

Every kind can be captured in a CUDA graph. `None` instead of one leaves the sum out: for one rank, and for the
ceilings.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spd.errors import UserError
from spd.gpu import graphs
from spd.gpu.timing import events_ms, of_group, slowest

AllReduce = Callable[[Tensor], Tensor]
"""What one rank has, [B, T, D] most often -> the sum over ranks, which holds until the next call; the argument may be
overwritten."""

KINDS = ("nccl", "one_shot", "two_shot")

LARGEST_SHARED = 2**26
"""Bytes of the largest message for which `auto` tries symmetric memory, which takes as much of a GPU's memory."""

_CALLS = 20


def make(kind: str, largest: int, dtype: torch.dtype, device: torch.device) -> AllReduce:
    """An all-reduce over the default process group.

    Args:
        kind: "nccl" (the group's own back end: gloo on a CPU), "one_shot" (each rank reads all others' numbers and adds
            them) or "two_shot" (each rank adds a part and all read it).
        largest: numbers in the largest message.
        dtype, device: of the messages.

    Returns:
        The sum; with symmetric memory all of its calls share one buffer, so they have to follow each other on a stream,
        and two_shot's sum is in that buffer (`room`).

    Raises:
        UserError: an unknown kind, or symmetric memory where there is no GPU.
    """
    if kind not in KINDS:
        raise UserError(f"latency.all_reduce={kind!r} is not known; known are {', '.join(KINDS)}.")
    if kind == "nccl":
        return _by_process_group
    if device.type != "cuda":
        raise UserError(f"latency.all_reduce={kind} needs GPUs with direct links; write latency.all_reduce=nccl.")
    import torch.distributed._symmetric_memory as symmetric

    group = dist.group.WORLD
    assert group is not None
    name = group.group_name
    buffer = symmetric.empty(largest, dtype=dtype, device=device)
    symmetric.rendezvous(buffer, name)

    def one_shot(local: Tensor) -> Tensor:
        shared = buffer[: local.numel()]
        total: Tensor = torch.ops.symm_mem.one_shot_all_reduce_copy(shared, local.view(-1), "sum", name)
        return total.view_as(local)

    return one_shot if kind == "one_shot" else TwoShot(buffer, name)


class TwoShot:
    """Sums in a buffer that all ranks read and write; what a product has left there need not be copied."""

    def __init__(self, buffer: Tensor, group: str) -> None:
        self.buffer, self.group = buffer, group

    def room(self, shape: torch.Size) -> Tensor:
        """That part of the buffer in which a message of this shape is summed."""
        return self.buffer[: shape.numel()].view(shape)

    def __call__(self, local: Tensor) -> Tensor:
        shared = self.room(local.shape)
        if local.data_ptr() != shared.data_ptr():
            shared.copy_(local)
        torch.ops.symm_mem.two_shot_all_reduce_(shared, "sum", self.group)
        return shared


class BySize:
    """Sums messages of some sizes, each in its own way; those of up to `copied` numbers have no `room`."""

    def __init__(self, made: dict[int, AllReduce], copied: int = 0) -> None:
        self.made, self.copied = made, copied

    def __call__(self, local: Tensor) -> Tensor:
        return self.made[local.numel()](local)


def room(reduce: AllReduce | None, shape: torch.Size) -> Tensor | None:
    """The buffer that a product of this shape should be written to, so that `reduce` sums it without a copy; None if it
    has none.

    The next product overwrites it, which is safe: when a sum is done, no other rank reads there any more.
    """
    if isinstance(reduce, BySize):
        reduce = None if shape.numel() <= reduce.copied else reduce.made[shape.numel()]
    return reduce.room(shape) if isinstance(reduce, TwoShot) else None


def _by_process_group(local: Tensor) -> Tensor:
    dist.all_reduce(local)
    return local


def choose(
    kind: str, sizes: list[int], dtype: torch.dtype, device: torch.device, *, direct_links: bool = True, copied: int = 0
) -> tuple[AllReduce, dict[int, dict[str, Any]]]:
    """The all-reduce to use for each message size, and why.

    All ranks have to call it together.

    Args:
        kind: one of `KINDS`, or "auto": of those that work here the one measured to be quickest, for each size.
        sizes: numbers in a message.
        direct_links: False where an interconnect without them is measured: symmetric memory would still use them.
        copied: numbers in the largest message that no product is to leave in its `room`: its copy there is measured.

    Returns:
        The sum, for messages of these sizes; and of each size "kind", "us" (microseconds of each kind that was tried,
        the slowest rank's, captured in a graph) and "fell_back" (kind -> why it was not tried, or failed).

    Raises:
        UserError: the kind asked for does not work here, with the reason.
    """
    asked = KINDS if kind == "auto" else (kind,)
    peers = _devices(device)
    made: dict[int, AllReduce] = {}
    found: dict[int, dict[str, Any]] = {}
    for size in sorted(set(sizes)):
        working: dict[str, Any] = {}
        us: dict[str, float] = {}
        refused: dict[str, str] = {}
        for name in asked:
            reason = _agreed(
                _why_not(name, size * dtype.itemsize, device, peers, direct_links, only=kind != "auto"), device
            )
            if reason is None:
                working[name], reason = _tried(device, make, name, size, dtype, device)
            if reason is None:  # on all ranks: a first call by some would wait for the others for ever
                zeros = torch.zeros(size, dtype=dtype, device=device)
                _, reason = _tried(device, working[name], zeros)
            if reason is None:
                us[name] = round(time_us(working[name], size, dtype, device, copied=size <= copied), 2)
            else:
                refused[name] = reason
        if not us:
            why = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
            raise UserError(f"latency.all_reduce={kind} does not work here ({why}).")
        best = min(us, key=us.__getitem__)
        made[size] = working[best]
        found[size] = {"kind": best, "us": us, "fell_back": refused}

    return BySize(made, copied), found


def _tried(device: torch.device, call: Callable[..., Any], *arguments: Any) -> tuple[Any, str | None]:
    """What a call gives, and why it failed on this rank or another; None where it worked on all."""
    given, reason = None, None
    try:
        given = call(*arguments)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # symmetric memory's own, of drivers, topologies and sizes
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return given, _agreed(reason, device)


def _agreed(reason: str | None, device: torch.device) -> str | None:
    """A reason if any rank has one: what one rank cannot do, none does."""
    anywhere = bool(slowest(torch.tensor(reason is not None, dtype=torch.int32), device))
    return (reason or "it failed on another rank") if anywhere else None


def _devices(device: torch.device) -> list[int]:
    """The index of every rank's device."""
    mine = torch.tensor([-1 if device.index is None else device.index], device=of_group(device))
    found = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine)
    return [int(index) for index in found]


def _why_not(
    kind: str, size: int, device: torch.device, peers: list[int], direct_links: bool, *, only: bool
) -> str | None:
    """Why a kind is not to be tried for messages of `size` bytes; None where it is."""
    if kind == "nccl":
        shared = device.type == "cuda" and dist.get_backend() != "nccl"
        return "ranks share a GPU, which NCCL refuses" if shared else None
    if device.type != "cuda":
        return "there is no GPU"
    if not direct_links:
        return "this interconnect has no direct links"
    if size > LARGEST_SHARED and not only:
        return f"messages above {LARGEST_SHARED >> 20} MiB are left to NCCL"
    mine: int = device.index
    far = [other for other in peers if other != mine and not torch.cuda.can_device_access_peer(mine, other)]
    return f"GPU {mine} cannot read GPU {far[0]}'s memory directly" if far else None


def time_us(reduce: AllReduce, size: int, dtype: torch.dtype, device: torch.device, *, copied: bool = False) -> float:
    """Microseconds of one all-reduce of `size` numbers among many in a CUDA graph, the slowest rank's; where it sums in
    a `room`, with or without the copy into that."""
    zeros = torch.zeros(size, dtype=dtype, device=device)
    there = None if copied else room(reduce, zeros.shape)
    message = zeros if there is None else there.zero_()

    def many() -> None:
        for _ in range(_CALLS):
            reduce(message)

    graphs.warm_up(many, device)
    replay = graphs.capture(many, device)
    replay()
    best = min(events_ms(replay, 1) for _ in range(7)) * 1e3 / _CALLS
    return float(slowest(torch.tensor(best, dtype=torch.float64), device))
