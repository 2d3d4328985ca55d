"""Functions that `test_launch.py` runs on ranks."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from spd.errors import UserError


def add_ranks(arguments: dict[str, Any], on_progress: Any) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    total = torch.tensor(float(dist.get_rank() + arguments["start"]))
    dist.all_reduce(total)
    for done in range(3):
        on_progress(done + 1, 3)
        time.sleep(0.3)
    return {"total": total.item(), "threads": os.environ["OMP_NUM_THREADS"], "ranks": dist.get_world_size()}


def fail_in_the_middle(arguments: dict[str, Any], on_progress: Any) -> dict[str, Any]:
    """One rank goes as `arguments["how"]` says while the others wait for it in an all-reduce."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    dist.barrier()
    if dist.get_rank() == arguments["rank"]:
        if arguments["how"] == "exception":
            raise ZeroDivisionError("this rank divided by zero")
        if arguments["how"] == "abort":
            print("a library gives up", file=sys.stderr, flush=True)
            os.abort()
        os.kill(os.getpid(), signal.SIGKILL)
    for _ in range(1000):
        dist.all_reduce(torch.zeros(1))
    return {}


def user_error(arguments: dict[str, Any], on_progress: Any) -> dict[str, Any]:
    raise UserError("there are 8 heads: tp_size 1, 2, 4 or 8 would work")


def sleep_for_ever(arguments: dict[str, Any], on_progress: Any) -> dict[str, Any]:
    if (marker := arguments.get("marker")) is not None:
        Path(f"{marker}{os.environ['RANK']}").write_text(str(os.getpid()))
    while True:
        time.sleep(0.1)
