"""Long context and long generation: what dropping costs far into a text, for every strategy.

    python -m experiments.long_text.measure ref_llama --device cuda --record experiments/long_text/long_text.csv
    python -m experiments.long_text.draw

The whole context of a reference model, 512 tokens, at tp 8. Per strategy and drop fraction:

- loss: next-token loss against the position in held-out windows, in nats;
- loss_difference: that less the dense model's on the same windows;
- same: whether the model, continuing by itself, still has all of the dense model's greedy continuation after n tokens;
- next: whether its likeliest token is the dense one's, given the dense continuation so far.

Rows are means over bins of positions, with their standard errors over windows.
"""

import argparse
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from torch import Tensor
from torch.nn import functional as F

import spd
from experiments.reference.train import MODELS
from experiments.reference.write import HERE as REFERENCE
from spd.config import DistillationConfig, Strategy
from spd.model import TensorParallelLM
from spd.paths import ROOT
from spd.strategies.block_cache import BlockCache

STRATEGIES = [strategy.name for strategy in Strategy]
TP_SIZE, CONTEXT, PROMPT, BIN = 8, 512, 64, 32


@torch.inference_mode()
def losses(model: TensorParallelLM, windows: Tensor, batch_size: int = 8) -> Tensor:
    """Next-token loss [S, T - 1] of windows [S, T]."""
    found = []
    for ids in windows.to(model.device).split(batch_size):
        logits = model(ids)[:, :-1].float()
        found.append(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1))
    return torch.cat(found).cpu()


@torch.inference_mode()
def continuations(model: TensorParallelLM, prompts: Tensor, tokens: int, batch_size: int = 128) -> Tensor:
    """Greedy continuations [S, tokens] of prompts [S, T], which no end of text ends."""
    options: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    parts = prompts.to(model.device).split(batch_size)
    return torch.cat([model.generate(ids, **options)[:, ids.shape[1] :] for ids in parts]).cpu()


@torch.inference_mode()
def likeliest(model: TensorParallelLM, prompts: Tensor, continued: Tensor, batch_size: int = 8) -> Tensor:
    """The likeliest tokens [S, n], never the end of text, given prompts [S, T] and the tokens of [S, n] so far."""
    found = []
    for ids in torch.cat([prompts, continued], dim=1).to(model.device).split(batch_size):
        logits = model(ids)[:, prompts.shape[1] - 1 : -1]
        logits[..., model.hf.generation_config.eos_token_id] = -torch.inf
        found.append(logits.argmax(-1))
    return torch.cat(found).cpu()


def rows_of(what: str, values: Tensor) -> Iterator[dict[str, Any]]:
    """Means of values [S, n] over bins of the positions 1 to n, and their errors over S."""
    for first, part in zip(range(1, values.shape[1] + 1, BIN), values.double().split(BIN, dim=1), strict=True):
        single = part.mean(1)
        mean, stderr = single.mean().item(), (single.std() / len(single) ** 0.5).item()
        middle = first + (part.shape[1] - 1) / 2
        yield {"what": what, "position": middle, "value": round(mean, 5), "stderr": round(stderr, 5)}


def measure(
    name: str, device: str, strategies: list[str], drops: list[float], windows: int, samples: int, epochs: int | None
) -> Iterator[dict[str, Any]]:
    """All rows of a reference model."""
    folder = REFERENCE / "models" / name
    settings = yaml.safe_load((ROOT / f"conf/model/{name}.yaml").read_text())["distillation"]
    distillation = DistillationConfig(**settings | ({"epochs": epochs} if epochs else {}))
    model = spd.load(folder, tp_size=TP_SIZE, device=device, dtype="float32")
    heldout = spd.load_samples(REFERENCE / "data/heldout.txt", model.tokenizer, windows, CONTEXT)
    calibration = spd.load_samples(REFERENCE / "data/recovery.txt", model.tokenizer, samples, 256)
    report = spd.measure_sensitivity(model, calibration[:32])
    prompts = heldout[:, :PROMPT]
    dense = losses(model, heldout)
    continued = continuations(model, prompts, CONTEXT - PROMPT)
    for row in rows_of("loss", dense):
        yield {"model": name, "strategy": "dense", "drop": 0.0} | row
    with tempfile.TemporaryDirectory() as blocks:
        for strategy, drop in itertools.product(strategies, drops):
            plan = spd.make_plan(report, drop=drop, strategy=strategy, tau1=-1.0, tau2=0.5)
            model = spd.load(folder, tp_size=TP_SIZE, device=device, dtype="float32")
            spd.apply(
                model, plan, calibration, distillation=distillation, cache=BlockCache(Path(blocks)), say=lambda _: None
            )
            found = losses(model, heldout)
            agrees = continuations(model, prompts, CONTEXT - PROMPT) == continued
            looked_at = {
                "loss": found,
                "loss_difference": found - dense,
                "same": agrees.cumprod(1),
                "next": likeliest(model, prompts, continued) == continued,
            }
            for what, values in looked_at.items():
                for row in rows_of(what, values):
                    yield {"model": name, "strategy": strategy, "drop": drop} | row


def ordered(rows: pd.DataFrame) -> pd.DataFrame:
    """By model and strategy, whenever they were measured; the rest as it is."""
    places = {"dense": -1} | {strategy: place for place, strategy in enumerate(STRATEGIES)}
    return (
        rows.assign(place=rows["strategy"].map(places))
        .sort_values(["model", "place"], kind="stable")
        .drop(columns="place")
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, choices=STRATEGIES)
    parser.add_argument("--drops", type=float, nargs="+", default=[0.75, 1.0])
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--samples", type=int, default=900, help="calibration samples of 256 tokens")
    parser.add_argument("--epochs", type=int, help="of distillation; by default those of conf/model")
    parser.add_argument("--record", type=Path, help="a CSV file, in which the rows of these strategies are replaced")
    options = vars(parser.parse_args())
    record = options.pop("record")
    name = options.pop("model")
    again = ["dense", *options["strategies"]]
    others = pd.read_csv(record) if record and record.exists() else pd.DataFrame(columns=["model", "strategy"])
    others = others[(others["model"] != name) | ~others["strategy"].isin(again)]
    rows = []
    for row in measure(name, **options):
        print(*row.values(), flush=True)
        rows.append(row)
    if record:
        ordered(pd.concat([others, pd.DataFrame(rows)])).to_csv(record, index=False)
