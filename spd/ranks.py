"""Who the tensor-parallel ranks are, and the sum over them: the sync point.

A process holds the parts of its *local* ranks: all `N` with virtual ranks, one of `N` under torchrun. Both give the
same sum to rounding, so accuracy needs one device only and latency is measured with the very same blocks.
"""

import json
import os
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from spd.errors import UserError

T = TypeVar("T")


class VirtualRanks:
    """All `size` ranks in this process."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.local = list(range(size))

    def sum(self, local: Tensor) -> Tensor:
        """Sum [B, T, D] over all ranks of what this process's ranks add up to."""
        return local

    def of_first(self, value: T) -> T:
        """What rank 0 has."""
        return value


class ProcessRanks:
    """One rank a process, as started by torchrun; the default process group is created when there is none.

    Args:
        size: tp_size; must be the number of processes torchrun started.
        device: decides the back end, NCCL for CUDA and gloo for CPU.
        timeout: how long a collective waits for a rank that does not come before it raises.

    Raises:
        UserError: not under torchrun, or with another number of processes.
    """

    def __init__(self, size: int, device: torch.device, timeout: timedelta = timedelta(minutes=5)) -> None:
        if not dist.is_initialized():
            if "WORLD_SIZE" not in os.environ:
                raise UserError(
                    f"ranks='processes' needs one process a rank: torchrun --nproc-per-node {size} your_script.py "
                    "(ranks='virtual' runs all of them in this process)."
                )
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
        if dist.get_world_size() != size:
            raise UserError(
                f"tp_size={size} but torchrun started {dist.get_world_size()} processes; "
                f"start it with --nproc-per-node {size}."
            )
        self.size = size
        self.local = [dist.get_rank()]
        self.device = device

    def sum(self, local: Tensor) -> Tensor:
        """All-reduce, in place, of this rank's partial result [B, T, D]; for inference (autograd does not see it)."""
        dist.all_reduce(local)
        return local

    def of_first(self, value: T) -> T:
        """What rank 0 has, on every rank: a tensor of the shape that all have, in place, or what JSON can say."""
        if isinstance(value, Tensor):
            dist.broadcast(value, src=0)
            return value
        text = bytearray(json.dumps(value).encode())
        size = torch.tensor(len(text), device=self.device)
        dist.broadcast(size, src=0)
        # The others' bytes are only room for rank 0's.
        said = torch.frombuffer(text.ljust(int(size))[: int(size)], dtype=torch.uint8).to(self.device)
        dist.broadcast(said, src=0)
        received: T = json.loads(said.cpu().numpy().tobytes())
        return received


Ranks = VirtualRanks | ProcessRanks
