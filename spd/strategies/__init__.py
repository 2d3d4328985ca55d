"""What is done to dropped blocks. Zero-shot (`zs`): nothing, they are SPD blocks with the original weights."""

from torch import Tensor

from spd.model import TensorParallelLM
from spd.plan import DropPlan


def apply(model: TensorParallelLM, plan: DropPlan, calibration: Tensor | None = None) -> TensorParallelLM:
    """Prepares the model as the plan says, in place, and returns it.

    Args:
        model: the original model, nothing applied to it yet.
        plan: made for this model at this tp size.
        calibration: token ids [S, T]; zero-shot does not need them.

    Raises:
        UserError: the plan is for another model, other weights or another tp size.
    """
    plan.check_fits(model, weights=True)
    model.drop(plan.dropped)
    model.plan = plan
    return model
