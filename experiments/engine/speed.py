"""What virtual ranks and sensitivities cost, in forwards of the dense Hugging Face model.

    python -m experiments.engine.speed

times, interleaved in one run, the dense model, the same model over virtual ranks with nothing and with everything
dropped, and a whole suffix-order sensitivity measurement, on 8 x 256 tokens of every reference model, and writes
speed.json beside this file. A ratio is the median over repeats of arm / dense, with its 10th and 90th percentile.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import spd
from spd.perplexity import perplexity
from spd.results import environment

HERE = Path(__file__).parent
MODELS = HERE.parent / "reference/models"
TP_SIZE, REPEATS = 8, 9


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ratio(arm: list[float], base: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile of arm / base, pairing what was measured next to each other."""
    low, median, high = np.percentile(np.array(arm) / np.array(base), [10, 50, 90])
    return {"median": float(median), "p10": float(low), "p90": float(high)}


@torch.inference_mode()
def measure(folder: Path) -> dict[str, Any]:
    """All ratios of one model."""
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = spd.load(folder, tp_size=TP_SIZE, dtype="float32")
    ids = torch.randint(4, model.config.vocab_size, (8, 256), generator=torch.Generator().manual_seed(0))

    def forward(dropped: range) -> Callable[[], Any]:
        def run() -> None:
            model.drop(dropped)
            model(ids)

        return run

    def evaluate() -> None:
        model.drop([])
        perplexity(model, ids)

    everything = range(model.num_blocks)
    arms: dict[str, Callable[[], Any]] = {
        "dense_hf": lambda: dense(ids, use_cache=False),
        "virtual_nothing_dropped": forward(range(0)),
        "virtual_all_dropped": forward(everything),
        "evaluation": evaluate,
        "suffix_sensitivity": lambda: spd.measure_sensitivity(model, ids),
    }
    times: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(REPEATS + 1):  # the first warms up
        for name in list(arms)[:: 1 if repeat % 2 else -1]:
            times[name].append(seconds(arms[name]))
    times = {name: values[1:] for name, values in times.items()}
    return {
        "blocks": model.num_blocks,
        "dense_hf_ms": float(np.median(times["dense_hf"]) * 1000),
        "forward_over_dense_hf": {
            name: ratio(times[name], times["dense_hf"]) for name in ("virtual_nothing_dropped", "virtual_all_dropped")
        },
        "suffix_sensitivity_over_evaluation": ratio(times["suffix_sensitivity"], times["evaluation"]),
        "suffix_sensitivity_allowed": model.num_blocks / 2 + 2,
    }


def main() -> None:
    """Measures every reference model and writes speed.json."""
    rows = {folder.name: measure(folder) for folder in sorted(MODELS.glob("ref_*"))}
    print(json.dumps(rows, indent=2))
    record = {"tp_size": TP_SIZE, "tokens": [8, 256], "repeats": REPEATS, "models": rows, "environment": environment()}
    (HERE / "speed.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
