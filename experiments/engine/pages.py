"""What it costs that freed memory goes back to the kernel, and that it does not (`spd.allocator`), on a CPU.

    python -m experiments.engine.pages

Processes that keep what they free and processes that do not, in turns, at tp 8: the time and the page faults of a
dropped block on a batch of short texts, and the evaluation and sensitivity of experiments.engine.speed. Writes
pages.json beside this file: medians over launches, with the lowest and the highest.
"""

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import spd
import spd.loading
from spd.launch import Progress, run_ranks
from spd.perplexity import perplexity
from spd.results import environment

HERE = Path(__file__).parent
MODELS = HERE.parent / "reference/models"
TP_SIZE, LAUNCHES, SHORT = 8, 5, (8, 48)


def timed(work: Callable[[], Any], times: int) -> tuple[float, float]:
    """Milliseconds, the median, and page faults, the mean, of one of `times` calls after two more."""
    taken = []
    for call in range(times + 2):
        if call == 2:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / times
    return 1e3 * float(np.median(taken[2:])), faults


@torch.inference_mode()
def launch(settings: dict[str, Any], on_progress: Progress) -> dict[str, Any]:
    """What `run_ranks` calls in a process of its own: numbers by model."""
    if not settings["keep"]:
        spd.loading.keep_freed_memory = lambda: None  # type: ignore[assignment]
    found = {}
    for folder in sorted(MODELS.glob("ref_*")):
        model = spd.load(folder, tp_size=TP_SIZE, dtype="float32")
        random = torch.Generator().manual_seed(0)
        short, long = (torch.randint(4, model.config.vocab_size, size, generator=random) for size in (SHORT, (8, 256)))
        block = model.blocks[3]
        x, inputs = model.embed(short)
        heads = block.attention(x, **inputs)
        block_ms, faults = timed(lambda block=block, x=x, heads=heads: block.spd(x, heads), 30)  # type: ignore[misc]
        evaluation_ms, _ = timed(lambda model=model, long=long: perplexity(model, long), 5)  # type: ignore[misc]
        sensitivity_ms, _ = timed(lambda model=model, long=long: spd.measure_sensitivity(model, long), 2)  # type: ignore[misc]
        found[folder.name] = {
            "block_ms": block_ms,
            "block_faults": faults,
            "evaluation_ms": evaluation_ms,
            "sensitivity_over_evaluation": sensitivity_ms / evaluation_ms,
        }
    return found


def main() -> None:
    """Measures and writes pages.json."""
    launches: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for _ in range(LAUNCHES):
        for keep, found in launches.items():
            found.append(run_ranks("experiments.engine.pages:launch", {"keep": keep}, tp_size=1))
    rows: list[dict[str, Any]] = []
    for keep, found in launches.items():
        for model in found[0]:
            rows.append({"model": model, "kept": keep})
            for name in found[0][model]:
                low, median, high = np.percentile([one[model][name] for one in found], [0, 50, 100]).round(3)
                rows[-1][name] = {"median": median, "low": low, "high": high}
    record = {"tp_size": TP_SIZE, "tokens": list(SHORT), "launches": LAUNCHES, "rows": rows}
    (HERE / "pages.json").write_text(json.dumps(record | {"environment": environment()}, indent=1) + "\n")
    for row in rows:
        print(
            row["model"],
            row["kept"],
            {name: number["median"] for name, number in row.items() if isinstance(number, dict)},
        )


if __name__ == "__main__":
    main()
