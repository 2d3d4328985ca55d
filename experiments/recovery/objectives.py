"""What distillation compares, and of which inputs: every block of a reference model dropped, at tp 8.

    python -m experiments.recovery.objectives ref_qwen2 logits --device cuda --record objectives.csv

    block             outputs of the block, of the original model's inputs (what `zs_b2b` does)
    student           outputs of the block, of the inputs as the treated blocks before it leave them
    logits            the model's next-token probabilities, with original blocks before and after it
    student_logits    the same, with treated blocks before it and original ones after it

Probabilities are compared by sum_v (sqrt(p_v) - sqrt(q_v))^2, twice the squared Hellinger distance, which is a mean
squared error of what follows the block. Targets are the original model's in all four. Each block is corrected first,
and a step is kept where held-out samples are better for it, as in `spd.strategies.recovery`.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

import spd
from experiments.recovery.tune import SAMPLES, SEQUENCE_LENGTH
from experiments.reference.check import accuracies
from experiments.reference.train import MODELS
from experiments.reference.write import HERE as REFERENCE
from spd.block import Block
from spd.config import CorrectionConfig, DistillationConfig
from spd.perplexity import perplexity
from spd.strategies import b2b, correction

OBJECTIVES = ("block", "student", "logits", "student_logits")


class ToProbabilities(nn.Module):
    """What follows a block's output [B, T, D]: the other blocks as they are, then sqrt(V p) [B, T, V]."""

    def __init__(self, model: spd.TensorParallelLM, rest: list[Block], inputs: dict[str, Any]) -> None:
        super().__init__()
        self.through, self.inputs = [model], inputs  # in a list: the model is no part of this
        self.rest = rest

    def forward(self, x: Tensor) -> Tensor:
        for block in self.rest:
            x = block.tp(x, block.attention(x, **self.inputs))
        logits = self.through[0].head(x)
        return (logits.shape[-1] ** 0.5) * (0.5 * logits.log_softmax(-1)).exp()


@torch.no_grad()
def outputs(block: Block, x: Tensor, inputs: dict[str, Any], batch_size: int, *, dropped: bool) -> Tensor:
    """Of inputs [S, T, D], by batches."""
    through = block.spd if dropped else block.tp
    return torch.cat([through(some, block.attention(some, **inputs)) for some in x.split(batch_size)])


def treat(model: spd.TensorParallelLM, ids: Tensor, objective: str, settings: DistillationConfig, seed: int) -> None:
    """Corrects and distils every block in turn, and drops it."""
    batch, heldout = settings.batch_size, len(ids) // 8
    rate = settings.learning_rate
    assert rate is not None
    originals = list(model.blocks)
    with torch.no_grad():
        embedded = [model.embed(some) for some in ids.to(model.device).split(batch)]
    x, inputs = torch.cat([some for some, _ in embedded]), embedded[0][1]
    student, train = x, len(x) - heldout
    for i, original in enumerate(originals):
        y = outputs(original, x, inputs, batch, dropped=False)
        seen: nn.Module = b2b.AS_IT_IS
        targets = y
        if objective.endswith("logits"):
            seen = ToProbabilities(model, originals[i + 1 :], inputs)
            with torch.no_grad():
                targets = torch.cat([seen(some) for some in y.split(batch)])
        given = student if objective.startswith("student") else x
        judged = (given[train:], targets[train:], inputs, batch, seen)
        best, lowest, fix = original, b2b.block_loss(original, *judged), None
        new = correction.fit(original, given[:train], inputs, CorrectionConfig(), batch)
        corrected = model.read_block(i, None, new)
        if (loss := b2b.block_loss(corrected, *judged)) < lowest:
            best, lowest, fix = corrected, loss, new
        candidate = model.read_block(i, None, fix)
        b2b.distill(candidate, given, targets, inputs, settings, rate, heldout, seed + i, seen=seen)
        if (loss := b2b.block_loss(candidate, *judged)) < lowest:
            best, lowest = candidate, loss
        print(f"block {i}: {lowest:.4g}", flush=True)
        student = outputs(best, student, inputs, batch, dropped=True)
        model.recover(i, best, {"kept": objective})
        x = y


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("objective", choices=OBJECTIVES)
    parser.add_argument("--tp-size", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--samples", type=int, default=SAMPLES // 2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="items a task; by default all")
    parser.add_argument("--record", type=Path, help="a CSV file, to which the row is added")
    options = parser.parse_args()
    model = spd.load(
        REFERENCE / "models" / options.model, tp_size=options.tp_size, device=options.device, dtype="float32"
    )
    text = REFERENCE / "data/recovery.txt"
    ids = spd.load_samples(text, model.tokenizer, options.samples, SEQUENCE_LENGTH, seed=options.seed)
    settings = DistillationConfig(options.learning_rate, options.epochs, options.batch_size)
    begun = time.perf_counter()
    treat(model, ids, options.objective, settings, options.seed)
    row = {key: value for key, value in vars(options).items() if key not in ("device", "record", "limit")}
    row["seconds"] = round(time.perf_counter() - begun, 1)
    heldout = spd.load_samples(REFERENCE / "data/heldout.txt", model.tokenizer, 32, SEQUENCE_LENGTH)
    row |= {"perplexity": perplexity(model, heldout)}
    row |= {"accuracy": accuracies(model, model.tokenizer, options.limit, few_shot=False)["mean"]}
    print(*(f"{key} {value}" for key, value in row.items()), flush=True)
    if options.record:
        rows = pd.read_csv(options.record) if options.record.exists() else pd.DataFrame()
        pd.concat([rows, pd.DataFrame([row])], ignore_index=True).to_csv(options.record, index=False)
