"""Sync-Point Drop: tensor-parallel LLM inference with fewer all-reduces (Kim et al., ICML 2025, arXiv 2502.20727)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spd.data import load_samples as load_samples
    from spd.errors import UserError as UserError
    from spd.loading import load as load
    from spd.model import TensorParallelLM as TensorParallelLM
    from spd.plan import DropPlan as DropPlan
    from spd.plan import make_plan as make_plan
    from spd.sensitivity import SensitivityReport as SensitivityReport
    from spd.sensitivity import measure_sensitivity as measure_sensitivity
    from spd.strategies.recovery import apply as apply

__version__ = "0.1.0"

_HOMES = {
    "UserError": "spd.errors",
    "TensorParallelLM": "spd.model",
    "load": "spd.loading",
    "load_samples": "spd.data",
    "DropPlan": "spd.plan",
    "make_plan": "spd.plan",
    "SensitivityReport": "spd.sensitivity",
    "measure_sensitivity": "spd.sensitivity",
    "apply": "spd.strategies.recovery",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    # Imported on first use: `run.py --help` and a refused configuration should not wait for torch.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'spd' has no attribute {name!r}")
