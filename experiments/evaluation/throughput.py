"""Requests a second through lm-eval: virtual ranks against lm-eval's own Hugging Face model.

    python -m experiments.evaluation.throughput --record experiments/evaluation/throughput.json

scores the same requests with both, in turns, at several batch sizes, tp 8: what the reference tasks ask of their first
items (choices), and whole texts. A launch is a process of its own for each case, as one process differs from the next
by a tenth, and one case leaves its memory to the next: its ratio is the median over repeats of ours / lm-eval's own.
Reported is the median over launches, with the lowest and the highest.
"""

import argparse
import contextlib
import io
import itertools
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
from spd.harness import SpdLM
from spd.launch import Progress, run_ranks
from spd.paths import ROOT
from spd.results import environment
from spd.tasks import task_manager

TP_SIZE = 8


def requests_of(kind: str, items: int) -> list[Instance]:
    """What the zero-shot reference tasks ask about their first items ("choices"); or held-out texts, seven for each
    item, of 1 to 240 words ("texts")."""
    if kind == "texts":
        words = (REFERENCE / "data/heldout.txt").read_text().split()
        lengths = np.random.default_rng(0).integers(1, 241, 7 * items)
        ends = np.cumsum(lengths)
        texts = [" ".join(words[end - length : end]) for end, length in zip(ends, lengths, strict=True)]
        return [Instance("loglikelihood_rolling", {}, (text,), i, ("text", i, 1)) for i, text in enumerate(texts)]
    settings = yaml.safe_load((ROOT / "conf/eval/reference_zero_shot.yaml").read_text())
    tasks = task_manager(settings["tasks"], REFERENCE / "tasks").load(settings["tasks"])["tasks"]
    found: list[Instance] = []
    for task in tasks.values():
        task.build_all_requests(limit=items)
        found += task.instances
    return found


def measure(name: str, batch_size: int | str, kind: str, items: int, repeats: int, device: str) -> dict[str, Any]:
    """Requests a second of lm-eval's own model, and ratios to it with nothing and with everything dropped."""
    folder = REFERENCE / "models" / name
    asked = requests_of(kind, items)
    own = HFLM(pretrained=str(folder), device=device, dtype="float32", batch_size=batch_size)
    model = spd.load(folder, tp_size=TP_SIZE, device=device, dtype="float32")

    def seconds(dropped: list[int] | None) -> float:
        if dropped is not None:
            model.drop(dropped)
        # "auto" is found anew by both each time.
        scorer = own if dropped is None else SpdLM(model, batch_size=batch_size)
        if batch_size == "auto":
            scorer.batch_sizes = {}
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # lm-eval's own bars
            score = scorer.loglikelihood if kind == "choices" else scorer.loglikelihood_rolling
            score(asked, disable_tqdm=True)
        return time.perf_counter() - start

    everything = list(range(model.num_blocks))
    arms: dict[str, list[int] | None] = {"own": None, "nothing_dropped": [], "everything_dropped": everything}
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for repeat in range(repeats + 1):  # the first warms up
        for arm in list(arms)[:: 1 if repeat % 2 else -1]:
            times[arm].append(seconds(arms[arm]))
    rates = {arm: len(asked) / np.array(taken[1:]) for arm, taken in times.items()}
    ratios = {arm: float(np.median(rates[arm] / rates["own"])) for arm in arms if arm != "own"}
    return {"requests": len(asked), "own_requests_per_s": float(np.median(rates["own"])), **ratios}


def launch(settings: dict[str, Any], on_progress: Progress) -> dict[str, Any]:
    """`measure`, as `run_ranks` calls it in a process of its own."""
    return measure(**settings) | {"threads": torch.get_num_threads()}


def over_launches(launches: list[dict[str, Any]]) -> dict[str, Any]:
    """One case's row: medians over its launches, and the ratios' range."""
    row: dict[str, Any] = {
        "requests": launches[0]["requests"],
        "own_requests_per_s": round(float(np.median([one["own_requests_per_s"] for one in launches])), 1),
    }
    for arm in ("nothing_dropped", "everything_dropped"):
        ratios = [one[arm] for one in launches]
        row[arm] = {"median": round(float(np.median(ratios)), 3), "low": round(min(ratios), 3)}
        row[arm]["high"] = round(max(ratios), 3)
    return row


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["ref_llama", "ref_opt", "ref_qwen2"])
    parser.add_argument("--batch-sizes", nargs="+", default=["8", "32", "auto"])
    parser.add_argument("--kinds", nargs="+", default=["choices", "texts"], choices=["choices", "texts"])
    parser.add_argument("--items", type=int, default=20, help="of each of the seven tasks")
    parser.add_argument("--repeats", type=int, default=7, help="of each launch")
    parser.add_argument("--launches", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    sizes = [size if size == "auto" else int(size) for size in options.batch_sizes]
    cases = list(itertools.product(options.models, sizes, options.kinds))
    found: dict[Any, list[dict[str, Any]]] = {case: [] for case in cases}
    for _, case in itertools.product(range(options.launches), cases):
        asked = dict(zip(("name", "batch_size", "kind"), case, strict=True))
        asked |= {"items": options.items, "repeats": options.repeats, "device": options.device}
        found[case].append(run_ranks("experiments.evaluation.throughput:launch", asked, tp_size=1, timeout_s=3600))
        print(case, json.dumps(found[case][-1]), flush=True)
    rows = [
        {"model": name, "batch_size": size, "kind": kind, **over_launches(found[name, size, kind])}
        for name, size, kind in cases
    ]
    told = {"tp_size": TP_SIZE, "launches": options.launches, "repeats": options.repeats}
    record = told | {"threads": found[cases[0]][0]["threads"], "rows": rows, "environment": environment()}
    print(json.dumps(rows, indent=1))
    if options.record:
        options.record.write_text(json.dumps(record, indent=1) + "\n")
