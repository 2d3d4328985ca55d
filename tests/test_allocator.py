"""Memory that one forward frees serves the next one."""

import platform
import subprocess
import sys

import pytest

from spd.config import ROOT

FORWARDS = """
import resource, torch, spd
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this C library has no mallopt")
def test_forwards_of_short_texts_take_no_fresh_pages() -> None:
    # A process of its own: this one has loaded other models. Without spd.allocator they take thousands.
    done = subprocess.run(
        [sys.executable, "-c", FORWARDS], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert int(done.stdout) < 500
