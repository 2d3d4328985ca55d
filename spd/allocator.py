"""Memory of a forward is kept for the next one, on CPUs.

By default glibc gives large blocks back to the kernel as soon as they are freed, and the next forward pays for fresh
pages: up to half the time of a dropped block with batches of short texts (experiments/engine/README.md).
"""

import ctypes
import functools

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT = 2**30
_LARGEST = 2**25  # the most that glibc takes


@functools.cache
def keep_freed_memory() -> None:
    """Lets this process keep up to 1 GiB that it freed, of blocks up to 32 MiB; does nothing without glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
