"""Requests a second through lm-eval: virtual ranks against lm-eval's own Hugging Face model.

    python -m experiments.evaluation.throughput --record experiments/evaluation/throughput.json

scores the same requests of the reference tasks with both, in turns in one run, at several batch
sizes, tp 8. A ratio is the median over repeats of ours / lm-eval's own, with its 10th and 90th percentile.
"""

import argparse
import contextlib
import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import spd
from experiments.reference.write import HERE as REFERENCE
from spd.config import ROOT
from spd.harness import SpdLM
from spd.results import environment
from spd.tasks import task_manager

TP_SIZE = 8


def requests_of(items: int) -> list[Instance]:
    """What the zero-shot reference tasks ask about their first items."""
    settings = yaml.safe_load((ROOT / "conf/eval/reference_zero_shot.yaml").read_text())
    tasks = task_manager(settings["tasks"], REFERENCE / "tasks").load(settings["tasks"])["tasks"]
    found: list[Instance] = []
    for task in tasks.values():
        task.build_all_requests(limit=items)
        found += task.instances
    return found


def measure(name: str, batch_size: int | str, items: int, repeats: int, device: str) -> dict[str, Any]:
    """Requests a second of lm-eval's own model, and ratios to it with nothing and with everything dropped."""
    folder = REFERENCE / "models" / name
    asked = requests_of(items)
    own = HFLM(pretrained=str(folder), device=device, dtype="float32", batch_size=batch_size)
    model = spd.load(folder, tp_size=TP_SIZE, device=device, dtype="float32")
    everything = list(range(model.num_blocks))

    def seconds(dropped: list[int] | None) -> float:
        if dropped is not None:
            model.drop(dropped)
        # A new one each time, as it keeps its answers; "auto" is found anew by both.
        scorer = own if dropped is None else SpdLM(model, batch_size=batch_size)
        if batch_size == "auto":
            scorer.batch_sizes = {}
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            scorer.loglikelihood(asked, disable_tqdm=True)
        return time.perf_counter() - start

    arms: dict[str, list[int] | None] = {"own": None, "nothing_dropped": [], "everything_dropped": everything}
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for repeat in range(repeats + 1):  # the first warms up
        for arm in list(arms)[:: 1 if repeat % 2 else -1]:
            times[arm].append(seconds(arms[arm]))
    rates = {arm: len(asked) / np.array(taken[1:]) for arm, taken in times.items()}
    row: dict[str, Any] = {
        "model": name,
        "batch_size": batch_size,
        "requests": len(asked),
        "own_requests_per_s": round(float(np.median(rates["own"])), 1),
    }
    for arm in ("nothing_dropped", "everything_dropped"):
        low, median, high = np.percentile(rates[arm] / rates["own"], [10, 50, 90])
        row[arm] = {"median": round(median, 3), "p10": round(low, 3), "p90": round(high, 3)}
    return row


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["ref_llama", "ref_opt", "ref_qwen2"])
    parser.add_argument("--batch-sizes", nargs="+", default=["8", "32", "auto"])
    parser.add_argument("--items", type=int, default=20, help="of each of the seven tasks")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    rows = []
    for name in options.models:
        for size in options.batch_sizes:
            batch_size = size if size == "auto" else int(size)
            rows.append(measure(name, batch_size, options.items, options.repeats, options.device))
            print(json.dumps(rows[-1]), flush=True)
    if options.record:
        found = {"tp_size": TP_SIZE, "repeats": options.repeats, "threads": torch.get_num_threads(), "rows": rows}
        options.record.write_text(json.dumps(found | {"environment": environment()}, indent=1) + "\n")
