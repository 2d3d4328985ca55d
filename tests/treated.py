"""What the tests of treated blocks share: plans with blocks of every class, and blocks with what goes into them."""

import itertools
from typing import Any

import torch
from torch import Tensor

import spd
from spd.block import Block
from spd.config import CorrectionConfig, CorrectionKind, DistillationConfig
from spd.model import TensorParallelLM
from spd.plan import DropPlan, ModelIdentity
from spd.sensitivity import SensitivityReport
from spd.strategies import correction
from spd.strategies.correction import Correction

CLASSES = ["ISB", "SB", "ESB"]
"""Of the three blocks of a tiny checkpoint, by `plan_of`."""


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    """To rounding: within a part of the largest number."""
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def plan_of(model: TensorParallelLM, strategy: str, drop: float = 1.0) -> DropPlan:
    """Block 0 is in-sensitive, 1 sensitive, 2 extremely sensitive."""
    report = SensitivityReport("suffix", model.tp_size, [0.0, 1.0, 100.0], 10.0, 1, ModelIdentity.of(model))
    return spd.make_plan(report, drop, strategy)


def tokens(samples: int, length: int, seed: int = 5) -> Tensor:
    """Random token ids [S, T]."""
    return torch.randint(4, 64, (samples, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def block_inputs(model: TensorParallelLM, i: int, input_ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """`X` [S, T, D] of block `i` with nothing dropped before it, and what goes with it."""
    x, inputs = model.embed(input_ids)
    for block in model.blocks[:i]:
        x = block.tp(x, block.attention(x, **inputs))
    return x, inputs


@torch.no_grad()
def teacher(block: Block, x: Tensor, inputs: dict[str, Any]) -> Tensor:
    """The block's outputs with both sync points."""
    return block.tp(x, block.attention(x, **inputs))


def correct(model: TensorParallelLM, settings: CorrectionConfig, dropped: list[int]) -> list[Correction]:
    """Gives every block a correction of random token ids and drops some; returns the corrections."""
    corrections = []
    for i in range(model.num_blocks):
        x, inputs = block_inputs(model, i, tokens(16, 12))
        fix = correction.fit(model.read_block(i), x, inputs, settings)
        corrections.append(fix)
        model.recover(i, model.read_block(i, correction=fix), {"kept": "correction", "loss": {}, "notes": []})
    model.drop(dropped)
    return corrections


QUICK = DistillationConfig(learning_rate=3e-3, epochs=2, batch_size=8)
RANK = CorrectionConfig(CorrectionKind.shift, rank=8, ridge=1e-2)
CALIBRATION = tokens(32, 12)


def prepare(model: TensorParallelLM, strategy: str, drop: float = 1.0, **options: Any) -> TensorParallelLM:
    """Applies a strategy to blocks of every class, quickly."""
    given: dict[str, Any] = dict(distillation=QUICK, corrections=RANK, say=lambda _: None) | options
    return spd.apply(model, plan_of(model, strategy, drop), CALIBRATION, **given)


def plan_in(model: TensorParallelLM) -> DropPlan:
    assert model.plan is not None
    return model.plan


def weights(model: TensorParallelLM, i: int) -> dict[str, Tensor]:
    block = model.blocks[i]
    return {name: t.clone() for name, t in itertools.chain(block.named_parameters(), block.named_buffers())}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def truncate(data: bytes) -> bytes:
    return data[:-100]


def empty(data: bytes) -> bytes:
    return b""
