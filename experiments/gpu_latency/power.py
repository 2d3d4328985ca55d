"""Clock and power of a machine's GPUs while something runs, as nvidia-smi tells them.

A GPU that reaches its power limit lowers its clock: times of two machines, or of two hours, differ by that too.
"""

import io
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pandas as pd

COLUMNS = {
    "index": "gpu",
    "clocks.sm": "sm_mhz",
    "power.draw": "watts",
    "clocks_event_reasons.sw_power_cap": "power_capped",
}
"""What nvidia-smi is asked for -> what it is called here. The last is true where the power limit lowers the clock."""
EVERY_S = 3.0


@contextmanager
def sampled(every_s: float = EVERY_S) -> Iterator[list[pd.DataFrame]]:
    """Samples of all GPUs at once and every so many seconds while the body runs, in the list that it gets: a row a GPU,
    `COLUMNS` and whole "seconds" since its beginning. No samples where there is no nvidia-smi."""
    samples: list[pd.DataFrame] = []
    over, began = threading.Event(), time.monotonic()

    def watch() -> None:
        while True:
            seconds = time.monotonic() - began
            try:
                samples.append(_sample().assign(seconds=int(seconds)))
            except (OSError, subprocess.SubprocessError):
                return
            if over.wait(every_s):
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield samples
    finally:
        over.set()
        watcher.join()


def _sample() -> pd.DataFrame:
    asked = ["nvidia-smi", f"--query-gpu={','.join(COLUMNS)}", "--format=csv,noheader,nounits"]
    said = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=30).stdout
    found = pd.read_csv(io.StringIO(said), names=list(COLUMNS.values()), skipinitialspace=True)
    return found.assign(power_capped=found["power_capped"].eq("Active"))
