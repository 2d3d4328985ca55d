"""What joins the GPUs: how a slower interconnect is had, and what it measures."""

from typing import Any

import torch
import torch.distributed as dist

from spd.gpu import all_reduce

_NO_MULTICAST = {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
# From three GPUs on NCCL may multicast, over direct links, whatever P2P says.
_NO_DIRECT_LINKS = _NO_MULTICAST | {"NCCL_P2P_DISABLE": "1", "NCCL_NVLS_ENABLE": "0"}
ENVIRONMENT: dict[str, dict[str, str]] = {
    "native": _NO_MULTICAST | {"NCCL_P2P_DISABLE": "0", "NCCL_SHM_DISABLE": "0"},
    "lbw": _NO_DIRECT_LINKS | {"NCCL_SHM_DISABLE": "0"},
    "socket": _NO_DIRECT_LINKS | {"NCCL_SHM_DISABLE": "1"},
}
"""Interconnect -> what the ranks' environment says: to use what there is (whether NCCL multicasts is left to the user's
NCCL_NVLS_ENABLE; the symmetric-memory kernels used here need none, and not every machine permits it); to go through
host memory instead of direct links (the paper's low-bandwidth setting); to go through sockets."""

_SMALL, _LARGE = 2**13, 2**26


def probe(device: torch.device) -> dict[str, Any] | None:
    """What NCCL's all-reduce measures over the links in use: all ranks call it together.

    Returns:
        "small_message_us" (microseconds of 8 KiB), "bandwidth_gb_per_s" (bus bandwidth of 64 MiB in GB/s: bytes over
        time, times 2 (N - 1) / N); None with one rank, and where ranks share a GPU.
    """
    ranks = dist.get_world_size()
    if ranks == 1 or dist.get_backend() != "nccl":
        return None
    reduce = all_reduce.make("nccl", 0, torch.bfloat16, device)
    small, large = (all_reduce.time_us(reduce, size // 2, torch.bfloat16, device) for size in (_SMALL, _LARGE))
    bandwidth = _LARGE / large * 2 * (ranks - 1) / ranks / 1e3
    return {"small_message_us": round(small, 2), "bandwidth_gb_per_s": round(bandwidth, 2)}
