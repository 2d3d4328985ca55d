"""What is done to a model: which blocks are dropped, how each was treated, and for which model and tp size."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spd.errors import UserError
from spd.results import write_json

if TYPE_CHECKING:
    from spd.model import TensorParallelLM
    from spd.sensitivity import SensitivityReport

PLAN_FILE = "spd_plan.json"
"""Name of the plan inside a saved checkpoint."""

STRATEGIES: dict[str, dict[str, str]] = {
    "zs": {"ISB": "zs", "SB": "zs", "ESB": "zs"},
    "zs_b2b": {"ISB": "zs", "SB": "b2b", "ESB": "b2b"},
    "zs_b2b_hg": {"ISB": "zs", "SB": "b2b", "ESB": "hg+b2b"},
    "zs_hg": {"ISB": "zs", "SB": "zs", "ESB": "hg"},
    "zs_correction": {"ISB": "zs", "SB": "correction", "ESB": "correction"},
    "zs_correction_b2b": {"ISB": "zs", "SB": "correction+b2b", "ESB": "correction+b2b"},
}
"""Strategy -> what is done to a dropped block of each class, step by step (paper, section 4; the corrections, and hg
without b2b, are ours): zs nothing, hg head grouping, correction, b2b distillation."""


def distilled(outcomes: dict[int, dict[str, Any]]) -> set[int]:
    """Blocks whose weights are no longer the original function, by what came of them: they serve dropped only."""
    return {block for block, outcome in outcomes.items() if "b2b" in outcome["kept"].split("+")}


@dataclass(frozen=True)
class ModelIdentity:
    """What a report or a plan was made for, so that it is never used with another model."""

    model_type: str
    num_blocks: int
    hidden_size: int
    weights: str
    """SHA-256 of the original checkpoint (`spd.checkpoint.fingerprint`)."""

    @classmethod
    def of(cls, model: "TensorParallelLM") -> "ModelIdentity":
        """The identity of a loaded model."""
        return cls(model.config.model_type, model.num_blocks, model.config.hidden_size, model.fingerprint)


@dataclass(frozen=True)
class DropPlan:
    """Which blocks of one model are dropped at one tp size, and how each dropped block is treated."""

    tp_size: int
    strategy: str
    drop: float
    """Asked drop fraction n/L."""
    dropped: list[int]
    """Dropped blocks, ascending."""
    treatment: dict[int, str]
    """Dropped block -> what is done to it, as STRATEGIES has it: "zs", "hg+b2b", ..."""
    classes: dict[int, str]
    """Every block -> ISB, SB or ESB; empty for blocks dropped by hand."""
    tau1: float | None
    tau2: float | None
    order: str | None
    """The sensitivity measure the blocks were ranked by; None, like the thresholds, for blocks dropped by hand."""
    source: ModelIdentity
    recovery: dict[str, Any] | None = None
    """Settings, seed and calibration data that blocks were treated with, once the plan was applied."""
    outcomes: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Treated block -> what came of it (`spd.strategies.recovery`): "kept", the steps whose result it runs with, and
    "loss", held out, before and after each step."""
    format: int = field(default=2)

    @property
    def distilled(self) -> set[int]:
        """`distilled` of this plan's outcomes."""
        return distilled(self.outcomes)

    @classmethod
    def by_hand(cls, model: "TensorParallelLM") -> "DropPlan":
        """What a model is whose blocks were dropped with `model.drop` instead of by a plan."""
        return cls(
            tp_size=model.tp_size,
            strategy="zs",
            drop=len(model.dropped) / model.num_blocks,
            dropped=list(model.dropped),
            treatment={
                block: model.outcomes[block]["kept"] if block in model.outcomes else "zs" for block in model.dropped
            },
            classes={},
            tau1=None,
            tau2=None,
            order=None,
            source=ModelIdentity.of(model),
            outcomes={block: model.outcomes[block] for block in model.dropped if block in model.outcomes},
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return dataclasses.asdict(self)

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "DropPlan":
        """Reads a plan, or that of a point's record (result.json).

        Raises:
            UserError: not a plan of this format.
        """
        try:
            fields = json.loads(Path(path).read_text())
            fields = fields.get("plan") or fields
            if fields["format"] != 2:
                raise ValueError(f"format {fields['format']}, this version reads 2")
            for name in ("treatment", "classes", "outcomes"):  # JSON has no integer keys
                fields[name] = {int(block): value for block, value in fields[name].items()}
            return cls(**fields | {"source": ModelIdentity(**fields["source"])})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not a usable plan ({error}); make it again with spd.make_plan.") from error

    def check_fits(self, model: "TensorParallelLM", weights: bool = False) -> None:
        """Raises UserError unless the plan is for a model of this shape and tp size, and of these weights if asked."""
        mine, its = self.source, model.config
        shape = (its.model_type, model.num_blocks, its.hidden_size)
        if (mine.model_type, mine.num_blocks, mine.hidden_size) != shape:
            raise UserError(
                f"The plan was made for a {mine.model_type} of {mine.num_blocks} blocks and hidden size "
                f"{mine.hidden_size}; this model is a {shape[0]} of {shape[1]} blocks and hidden size {shape[2]}."
            )
        if self.tp_size != model.tp_size:
            raise UserError(
                f"The plan was made for tp_size={self.tp_size} and the model is loaded with tp_size={model.tp_size}; "
                "sensitivities differ between tp sizes, so make a plan for this one."
            )
        if weights and mine.weights != model.fingerprint:
            raise UserError("The plan was made for other weights of the same shape; make one for these.")


def blocks_at(drop: float, blocks: int) -> int:
    """The number of `blocks` nearest to a fraction, the larger of two."""
    return math.floor(drop * blocks + 0.5)  # round() would take 10.5 to 10 and 7.5 to 8


def make_plan(
    report: "SensitivityReport",
    drop: float,
    strategy: str = "zs",
    tau1: float = 0.05,
    tau2: float = 10.0,
    thresholds: str = "tau",
) -> DropPlan:
    """Drops the `n` least sensitive blocks (`n/L` nearest to `drop`) and says how each is treated (paper, section 4).

    Args:
        report: measured sensitivities of the model.
        drop: fraction n/L of blocks to drop, 0 to 1.
        strategy: one of STRATEGIES.
        tau1, tau2: perplexity increases that part ISB from SB and SB from ESB (published: 0.05 and 10).
        thresholds: "tau" uses tau1 and tau2, "jumps" finds both where the sorted sensitivities jump.

    Raises:
        UserError: drop outside 0..1, unknown strategy, or thresholds in the wrong order.
    """
    if not 0 <= drop <= 1:
        raise UserError(f"drop={drop} is outside 0..1; it is the fraction of blocks whose sync point is dropped.")
    if strategy not in STRATEGIES:
        raise UserError(f"strategy={strategy!r} is not known; write one of {', '.join(STRATEGIES)}.")
    if thresholds == "jumps":
        tau1, tau2 = report.jumps()
    elif thresholds != "tau":
        raise UserError(f"thresholds={thresholds!r} is not known; write 'tau' or 'jumps'.")
    dropped = sorted(report.ranked()[: blocks_at(drop, report.num_blocks)])
    classes = report.classes(tau1, tau2)
    return DropPlan(
        tp_size=report.tp_size,
        strategy=strategy,
        drop=drop,
        dropped=dropped,
        treatment={block: STRATEGIES[strategy][classes[block]] for block in dropped},
        classes=dict(enumerate(classes)),
        tau1=tau1,
        tau2=tau2,
        order=report.order,
        source=report.source,
    )
