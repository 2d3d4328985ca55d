"""Sums over ranks: NCCL's, and PyTorch's symmetric-memory kernels, which are quicker for small messages.

Every kind can be captured in a CUDA graph. `None` instead of one
leaves the sum out: for one rank, and for the ceilings.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from spd.errors import UserError

AllReduce = Callable[[Tensor], Tensor]
"""[B, T, D] of one rank -> the sum over ranks; the argument may be overwritten."""

KINDS = ("nccl", "one_shot", "two_shot")


def make(kind: str, largest: int, dtype: torch.dtype, device: torch.device) -> AllReduce:
    """An all-reduce over the default process group.

    Args:
        kind: "nccl" (the group's own back end: gloo on a CPU), "one_shot" (each rank reads all others' numbers and adds
            them) or "two_shot" (each rank adds a part and all read it).
        largest: numbers in the largest message.
        dtype, device: of the messages.

    Returns:
        The sum; with symmetric memory all of its calls share one buffer, so they have to follow each other on a stream.

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

    def two_shot(local: Tensor) -> Tensor:
        shared = buffer[: local.numel()].view_as(local)
        shared.copy_(local)
        torch.ops.symm_mem.two_shot_all_reduce_(shared, "sum", name)
        return local.copy_(shared)

    return one_shot if kind == "one_shot" else two_shot


def _by_process_group(local: Tensor) -> Tensor:
    dist.all_reduce(local)
    return local
