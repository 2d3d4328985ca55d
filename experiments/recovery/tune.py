"""Which distillation settings win back most: every block of a reference model dropped, at tp 8, over a grid.

    python -m experiments.recovery.tune ref_llama --device cuda --record experiments/recovery/tune_ref_llama.json

Held-out perplexity and the zero-shot mean (the reference tasks' items scored as lm-eval does) beside those of the dense
model and of zero-shot dropping; seconds are of treating all blocks. `conf/model/ref_*.yaml` is to follow it.
"""

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import spd
from experiments.reference.check import accuracies
from experiments.reference.train import MODELS
from experiments.reference.write import HERE as REFERENCE
from spd.config import CorrectionConfig, CorrectionKind, DistillationConfig
from spd.perplexity import perplexity
from spd.results import environment

SAMPLES, SEQUENCE_LENGTH = 512, 256


def tune(
    name: str,
    *,
    tp_size: int,
    device: str,
    strategy: str,
    learning_rates: list[float],
    epochs: list[int],
    batch_sizes: list[int],
    kinds: list[CorrectionKind],
    ranks: list[int],
    samples: int,
    limit: int | None,
) -> dict[str, Any]:
    """One row for each setting: learning rate, epochs, batch size, kind and rank of the correction."""
    folder = REFERENCE / "models" / name
    rows: list[dict[str, Any]] = []

    def look(model: spd.TensorParallelLM) -> dict[str, float]:
        heldout = spd.load_samples(REFERENCE / "data/heldout.txt", model.tokenizer, 32, SEQUENCE_LENGTH)
        accuracy = accuracies(model, model.tokenizer, limit, few_shot=False)["mean"]
        return {"perplexity": perplexity(model, heldout), "accuracy": accuracy}

    model = spd.load(folder, tp_size=tp_size, device=device, dtype="float32")
    calibration = spd.load_samples(REFERENCE / "data/calibration.txt", model.tokenizer, samples, SEQUENCE_LENGTH)
    report = spd.measure_sensitivity(model, calibration[:32])
    found = {"model": name, "tp_size": tp_size, "strategy": strategy, "limit": limit, "dense": look(model)}
    model.drop(range(model.num_blocks))
    found["zs"] = look(model)
    grid = itertools.product(learning_rates, epochs, batch_sizes, kinds, ranks)
    for rate, passes, batch, kind, rank in grid:
        model = spd.load(folder, tp_size=tp_size, device=device, dtype="float32")
        plan = spd.make_plan(report, drop=1.0, strategy=strategy, tau1=0.0, tau2=0.5)
        begun = time.perf_counter()
        spd.apply(
            model,
            plan,
            calibration,
            distillation=DistillationConfig(learning_rate=rate, epochs=passes, batch_size=batch),
            corrections=CorrectionConfig(kind=kind, rank=rank),
            say=lambda _: None,
        )
        seconds = time.perf_counter() - begun
        row = {"learning_rate": rate, "epochs": passes, "batch_size": batch, "kind": kind.name, "rank": rank}
        kept = {i: outcome["kept"] for i, outcome in model.outcomes.items()}
        rows.append(row | look(model) | {"seconds": round(seconds, 1), "kept": kept})
        shown = {key: value for key, value in rows[-1].items() if key != "kept"}
        print(name, strategy, *(f"{key} {value}" for key, value in shown.items()), flush=True)
    return found | {"rows": rows, "environment": environment()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--tp-size", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--strategy", default="zs_b2b")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3, 4e-3])
    parser.add_argument("--epochs", type=int, nargs="+", default=[10, 20, 40])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--kinds", type=CorrectionKind, nargs="+", default=[CorrectionConfig.kind])
    parser.add_argument("--ranks", type=int, nargs="+", default=[CorrectionConfig.rank])
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--limit", type=int, help="items a task; by default all")
    parser.add_argument("--record", type=Path)
    options = vars(parser.parse_args())
    record = options.pop("record")
    result = tune(options.pop("model"), **options)
    if record:
        record.write_text(json.dumps(result, indent=1) + "\n")
