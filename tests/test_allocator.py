"""Memory that one forward frees serves the next one."""

import os
import platform
import subprocess
import sys

import pytest

from spd.paths import ROOT

FORWARDS = """
import resource, sys, torch, spd, spd.loading
if "fresh" in sys.argv:
    spd.loading.keep_freed_memory = lambda: None
model = spd.load("experiments/reference/models/ref_llama", tp_size=8, dtype="float32")
model.drop(range(12))
ids = torch.randint(500, (8, 48))
faults = []
with torch.inference_mode():
    for _ in range(6):
        model(ids)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[2])
"""
AS_IT_STARTS = {"MALLOC_MMAP_THRESHOLD_": str(2**17), "MALLOC_TRIM_THRESHOLD_": str(2**17)}
"""The C library's thresholds, which it raises by what a process has freed so far: sometimes far enough, by luck."""


def fresh_pages(*arguments: str, **environment: str) -> int:
    # A process of its own: this one has loaded other models.
    done = subprocess.run(
        [sys.executable, "-c", FORWARDS, *arguments],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this C library has no mallopt")
def test_forwards_of_short_texts_take_a_tenth_of_the_fresh_pages_at_most() -> None:
    # How threads are scheduled decides what they find free.
    assert fresh_pages() < fresh_pages("fresh", **AS_IT_STARTS) / 10
