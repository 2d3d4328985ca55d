"""Which settings win back most: every block of a reference model dropped, at tp 8, over a grid.

    python -m experiments.recovery.tune ref_llama --device cuda --record experiments/recovery/tune.csv

Held-out perplexity and the zero-shot mean (the reference tasks' items scored as lm-eval does), after those of the dense
model and of zero-shot dropping; seconds are of treating all blocks. `conf/model/ref_*.yaml` follows it.
"""

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

import spd
from experiments.reference.check import accuracies
from experiments.reference.train import MODELS
from experiments.reference.write import HERE as REFERENCE
from spd.config import CorrectionConfig, CorrectionKind, DistillationConfig
from spd.perplexity import perplexity

SAMPLES, SEQUENCE_LENGTH = 1800, 256


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
    tau1: float,
    text: str,
    samples: int,
    after_final_norm: bool,
    limit: int | None,
) -> Iterator[dict[str, Any]]:
    """A row for the dense model, one for zero-shot dropping, and one for each setting."""
    folder = REFERENCE / "models" / name

    def look(model: spd.TensorParallelLM) -> dict[str, float]:
        heldout = spd.load_samples(REFERENCE / "data/heldout.txt", model.tokenizer, 32, SEQUENCE_LENGTH)
        accuracy = accuracies(model, model.tokenizer, limit, few_shot=False)["mean"]
        return {"perplexity": perplexity(model, heldout), "accuracy": accuracy}

    model = spd.load(folder, tp_size=tp_size, device=device, dtype="float32")
    calibration = spd.load_samples(REFERENCE / f"data/{text}.txt", model.tokenizer, samples, SEQUENCE_LENGTH)
    report = spd.measure_sensitivity(model, calibration[:32])
    common = {"model": name, "tp_size": tp_size}
    yield common | {"strategy": "dense"} | look(model)
    model.drop(range(model.num_blocks))
    yield common | {"strategy": "zs"} | look(model)
    distilled, corrected = "b2b" in strategy, "correction" in strategy
    grid = itertools.product(
        learning_rates if distilled else learning_rates[:1],
        epochs if distilled else epochs[:1],
        batch_sizes if distilled else batch_sizes[:1],
        kinds if corrected else kinds[:1],
        ranks if corrected else ranks[:1],
    )
    for rate, passes, batch, kind, rank in grid:
        model = spd.load(folder, tp_size=tp_size, device=device, dtype="float32")
        plan = spd.make_plan(report, drop=1.0, strategy=strategy, tau1=tau1, tau2=0.5)
        begun = time.perf_counter()
        spd.apply(
            model,
            plan,
            calibration,
            distillation=DistillationConfig(rate, passes, batch, after_final_norm),
            corrections=CorrectionConfig(kind=kind, rank=rank),
            say=lambda _: None,
        )
        seconds = round(time.perf_counter() - begun, 1)
        row = common | {"strategy": strategy, "tau1": tau1, "text": text, "samples": samples}
        if distilled:
            row |= {"learning_rate": rate, "epochs": passes, "batch_size": batch, "after_final_norm": after_final_norm}
        if corrected:
            row |= {"kind": kind.name, "rank": rank}
        yield row | {"blocks": len(model.outcomes), "seconds": seconds} | look(model)


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
    parser.add_argument("--tau1", type=float, default=-1.0)
    parser.add_argument("--text", default="recovery", help="a file of experiments/reference/data")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--after-final-norm", action="store_true", help="see spd.config.DistillationConfig")
    parser.add_argument("--limit", type=int, help="items a task; by default all")
    parser.add_argument("--record", type=Path, help="a CSV file, to which the rows are added")
    options = vars(parser.parse_args())
    record = options.pop("record")
    rows = pd.read_csv(record) if record and record.exists() else pd.DataFrame()
    for found in tune(options.pop("model"), **options):
        print(*(f"{key} {value}" for key, value in found.items()), flush=True)
        rows = pd.concat([rows, pd.DataFrame([found])], ignore_index=True)
        if record:
            rows.drop_duplicates().to_csv(record, index=False)
