"""How much each block minds losing its sync point (the paper's Algorithm 1, and two other measures).

Legend: S samples, T tokens, L blocks; ppl(D) the perplexity with the blocks of set D dropped.

    suffix  s_i = ppl({i, ..., L-1}) - ppl({i+1, ..., L-1})    the paper's: exact inputs, worst case behind
    alone   s_i = ppl({i}) - ppl({})
    front   s_i = ppl({0, ..., i}) - ppl({0, ..., i-1})

All three evaluate models that differ from block `i` on, so the hidden states before it are computed once and kept, and
so is block `i`'s attention, which both of its kinds share. Per batch these are L(L+1)/2 attentions and L MLPs more
instead of L(L+1) of each: about L/2 + 1 forwards.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spd.errors import UserError
from spd.launch import Progress
from spd.model import TensorParallelLM
from spd.perplexity import next_token_loss, to_perplexity
from spd.plan import ModelIdentity, distilled
from spd.results import write_json

ORDERS = ("suffix", "alone", "front")


@dataclass(frozen=True)
class SensitivityReport:
    """Measured sensitivities of one model at one tp size."""

    order: str
    """suffix, alone or front."""
    tp_size: int
    sensitivities: list[float]
    """s_i of every block, in perplexity."""
    dense_perplexity: float
    """ppl({})."""
    tokens: int
    """Predicted tokens the perplexities are means over."""
    source: ModelIdentity
    format: int = field(default=1)

    @property
    def num_blocks(self) -> int:
        """L."""
        return len(self.sensitivities)

    def ranked(self) -> list[int]:
        """Blocks from the least to the most sensitive; the first n are dropped for a drop fraction n/L."""
        return sorted(range(self.num_blocks), key=self.sensitivities.__getitem__)

    def classes(self, tau1: float, tau2: float) -> list[str]:
        """ISB (`s <= tau1`), SB (`tau1 < s <= tau2`) or ESB (`s > tau2`) for every block."""
        if tau1 > tau2:
            raise UserError(f"tau1={tau1} is above tau2={tau2}; swap them: ISB <= tau1 < SB <= tau2 < ESB.")
        return ["ISB" if s <= tau1 else "SB" if s <= tau2 else "ESB" for s in self.sensitivities]

    def jumps(self) -> tuple[float, float]:
        """`(tau1, tau2)` in the middle of the two largest jumps of the sorted sensitivities, on a logarithmic scale.

        Sensitivities below a thousandth of the dense perplexity are noise and count as that. With a single jump both
        thresholds lie in it (no SB); with none, every block is an ISB.
        """
        floor = self.dense_perplexity / 1000
        values = sorted(math.log(max(s, floor)) for s in self.sensitivities)
        gaps = sorted(((b - a, (a + b) / 2) for a, b in itertools.pairwise(values) if b > a), reverse=True)[:2]
        middles = sorted(math.exp(middle) for _, middle in gaps) or [max(floor, *self.sensitivities)]
        return middles[0], middles[-1]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "SensitivityReport":
        """The inverse of `to_dict`.

        Raises:
            UserError: not a report of this format.
        """
        try:
            if fields["format"] != 1 or fields["order"] not in ORDERS:
                raise ValueError("unknown format or order")
            return cls(**fields | {"source": ModelIdentity(**fields["source"])})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"Not a sensitivity report of this version ({error}); measure it again.") from error

    def save(self, path: str | Path) -> None:
        """Writes the report as JSON."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "SensitivityReport":
        """Reads a report; UserError when it is none."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(f"{path} cannot be read as a sensitivity report: {error}") from error

    def plot(self, path: str | Path, tau1: float = 0.05, tau2: float = 10.0) -> None:
        """Draws the sensitivities by block, coloured by class, as PNG."""
        from spd.figures import plot_sensitivity

        plot_sensitivity(self, path, tau1, tau2)


def measure_sensitivity(
    model: TensorParallelLM,
    samples: Tensor,
    order: str = "suffix",
    batch_size: int = 8,
    on_progress: Progress | None = None,
) -> SensitivityReport:
    """Measures every block's sensitivity on calibration samples. What the model has dropped is left as it is.

    Args:
        model: virtual or real ranks (then called on every rank alike).
        samples: token ids [S, T], unpadded, T >= 2.
        order: "suffix" (Algorithm 1), "alone" or "front".
        batch_size: samples at a time.
        on_progress: called with (models evaluated, models to evaluate), counted over batches.

    Raises:
        UserError: unknown order, no samples, samples of fewer than two tokens, a model with distilled blocks, or a loss
            that is no number.
    """
    if lost := distilled(model.outcomes):
        raise UserError(
            f"Block {min(lost)} was distilled to run dropped, so what it minds cannot be measured any more; "
            "load the original model."
        )
    if order not in ORDERS:
        raise UserError(f"order={order!r} is not known; write one of {', '.join(ORDERS)}.")
    if samples.ndim != 2 or samples.shape[0] < 1 or samples.shape[1] < 2:
        raise UserError(f"Calibration samples must be [S, T] with S >= 1 and T >= 2, not {list(samples.shape)}.")
    blocks, last = model.blocks, model.num_blocks
    batches = samples.split(batch_size)
    loss = torch.zeros(last + 1, dtype=torch.float64)
    steps = itertools.count(1)
    with torch.inference_mode():
        for ids in batches:
            ids = ids.to(model.device)
            x, inputs = model.embed(ids)
            for i in range(last + 1):
                # x is the input of block i behind the blocks that the order wants there; y goes on to the end.
                y = x
                for j in range(i, last):
                    heads = blocks[j].attention(y, **inputs)
                    if j == i:
                        at_x = heads
                    changed = order == "suffix" or (order == "alone" and j == i)
                    y = blocks[j].spd(y, heads) if changed else blocks[j].tp(y, heads)
                # One sample at a time, a third quicker: the logits of a batch are larger than all else.
                loss[i] += sum(next_token_loss(model.head(y[k : k + 1]), ids[k : k + 1]) for k in range(len(ids)))
                if i < last:
                    x = blocks[i].spd(x, at_x) if order == "front" else blocks[i].tp(x, at_x)
                if on_progress:
                    on_progress(next(steps), len(batches) * (last + 1))
    tokens = samples.shape[0] * (samples.shape[1] - 1)
    ppl = [to_perplexity(total, tokens) for total in loss.tolist()]
    sensitivities, dense = _differences(order, ppl)
    return SensitivityReport(order, model.tp_size, sensitivities, dense, tokens, ModelIdentity.of(model))


def _differences(order: str, ppl: Sequence[float]) -> tuple[list[float], float]:
    """Sensitivities and dense perplexity from the L + 1 perplexities in the order they were measured."""
    if order == "suffix":  # ppl[i]: i, ..., L-1 dropped
        return [here - after for here, after in itertools.pairwise(ppl)], ppl[-1]
    if order == "alone":  # ppl[i]: i dropped; ppl[L]: none
        return [here - ppl[-1] for here in ppl[:-1]], ppl[-1]
    return [after - here for here, after in itertools.pairwise(ppl)], ppl[0]  # front; ppl[i]: 0, ..., i-1 dropped
