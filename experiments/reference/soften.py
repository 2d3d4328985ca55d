"""Fine-tune a reference model for some steps, in every other one without the sync point of one block.

    python -m experiments.reference.soften build/ref_opt --out build/softer

For a model that falls off a cliff: one block carries nearly all that dropping costs. It learns to bear being dropped
a little, the others are left alone. Writes `<out>/<steps>/` (a Hugging Face folder, float16) after each of the asked
numbers of steps; `<out>/soften.json` has the accuracies there: dense, with every other block dropped, with all dropped.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import spd

from .check import accuracies
from .tokenizer import build_tokenizer
from .train import batches, save


def soften(
    start: Path,
    out: Path,
    *,
    block: int,
    tp_size: int,
    stops: list[int],
    batch: int,
    learning_rate: float,
    seed: int,
    device: str,
    workers: int,
    limit: int | None,
) -> None:
    """AdamW on all weights, constant rate after ten steps; even steps are dense, odd ones drop the block."""
    texts = batches(start.name, seed, max(stops), batch, workers, curriculum=0.0)
    model = spd.load(start, tp_size=tp_size, device=device, dtype="float32")
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    others = [i for i in range(model.num_blocks) if i != block]
    record: dict[str, Any] = {
        "start": start.name, "block": block, "tp_size": tp_size, "batch": batch, "learning_rate": learning_rate,
        "seed": seed, "stops": {},
    }  # fmt: skip
    begun = time.perf_counter()
    for step, rows in enumerate(texts, start=1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, step / 10)
        tokens = torch.from_numpy(rows.astype(np.int64)).to(device)
        model.drop([block] if step % 2 else [])
        loss = cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step in stops:
            found: dict[str, Any] = {"loss": loss.item(), "seconds": round(time.perf_counter() - begun, 1)}
            for name, dropped in (("dense", []), ("others", others), ("all", [*others, block])):
                model.drop(dropped)
                found[name] = accuracies(model, model.tokenizer, limit, few_shot=False)
            record["stops"][step] = found
            means = " ".join(f"{name} {found[name]['mean']:.3f}" for name in ("dense", "others", "all"))
            print(f"{out.name} {step}: loss {loss.item():.3f} {found['seconds']}s | {means}", flush=True)
            _save(model, start.name, out / str(step))
    (out / "soften.json").write_text(json.dumps(record, indent=1))


def _save(model: spd.TensorParallelLM, name: str, folder: Path) -> None:
    model.drop([])
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(Path(scratch) / "model")
        save(AutoModelForCausalLM.from_pretrained(Path(scratch) / "model"), build_tokenizer(name), folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("start", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--block", type=int, default=0)
    parser.add_argument("--tp-size", type=int, default=8)
    parser.add_argument("--stops", type=int, nargs="+", default=[5])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=101)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--limit", type=int, help="items a task, for the accuracies at the stops; by default all")
    options = vars(parser.parse_args())
    soften(options.pop("start"), options.pop("out"), **options)
