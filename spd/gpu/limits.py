"""What a device can do at most, measured where it is needed: the floors that latencies are shown beside."""

from typing import NamedTuple

import torch

from spd.gpu.timing import events_ms


class Rates(NamedTuple):
    """Of one GPU, or a CPU."""

    bandwidth: float
    """Bytes a second that a copy reads and writes."""
    flops: float
    """Floating-point operations a second of a large matrix product."""

    @classmethod
    def measured(cls, dtype: torch.dtype, device: torch.device | str = "cuda") -> "Rates":
        """The best of three tries each; takes 4 GiB for a moment (a sixteenth of that on a CPU)."""
        rates = cls._measured(dtype, torch.device(device))
        torch.cuda.empty_cache()
        return rates

    @classmethod
    def _measured(cls, dtype: torch.dtype, device: torch.device) -> "Rates":
        bytes_copied, width = (2**31, 8192) if device.type == "cuda" else (2**27, 512)
        big = torch.empty(bytes_copied, dtype=torch.uint8, device=device).random_()  # zeros can be quicker
        to = torch.empty_like(big)
        a, b = (torch.randn(width, width, device=device, dtype=dtype) for _ in "ab")
        to.copy_(big)
        a @ b
        copy_ms = min(events_ms(lambda: to.copy_(big), 5) for _ in range(3))
        product_ms = min(events_ms(lambda: a @ b, 10) for _ in range(3))
        return cls(2 * big.numel() / copy_ms * 1e3, 2 * width**3 / product_ms * 1e3)

    def floor_ms(self, bytes_read: int, operations: float) -> float:
        """The least that a forward can take: reading its bytes, or its matrix products, whichever is longer."""
        return 1e3 * max(bytes_read / self.bandwidth, operations / self.flops)
