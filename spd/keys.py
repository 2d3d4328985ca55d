"""What a result is found by again: all of a configuration and a machine that can change it, and nothing else."""

import os
from typing import Any

from spd.config import LatencyKind, RunConfig, Weights
from spd.gpu.interconnect import ENVIRONMENT
from spd.results import gpu_engine, hardware

# What cannot change a result (names of options and places, ports, how long to wait), or is replaced by a hash of its
# contents.
_NOT_IN_KEY: dict[str, set[str] | None] = {
    "tracker": None,
    "sweep": None,
    "output_dir": None,
    "save_model": None,
    "parallel": {"port"},
    "latency": {"timeout_s"},
    "model": {"name", "path", "architecture"},
    "data": {"path", "heldout_path", "dataset", "dataset_config", "split", "heldout_split", "data_root"},
    "eval": {"name", "include_path", "data_root"},
}
_OF_RANDOM = ("model", "parallel", "interconnect", "latency", "drop")
"""The sections that matter with weights=random, of which only latency is measured."""


def determining(settings: dict[str, Any]) -> dict[str, Any]:
    """What of a configuration (as `to_dict` gives it) can change a result."""
    kept = {section: value for section, value in settings.items() if _NOT_IN_KEY.get(section, ()) is not None}
    if settings["weights"] == Weights.random.name:  # nothing but latency is measured
        kept = {name: kept[name] for name in _OF_RANDOM}
    for section, names in _NOT_IN_KEY.items():
        if names is not None and section in kept:
            kept[section] = {name: value for name, value in settings[section].items() if name not in names}
    return kept


def machine(config: RunConfig) -> dict[str, Any]:
    """What a latency belongs to: hardware, and on GPUs the engine and what NCCL is told (but how much it says)."""
    here = hardware()
    found = {name: here[name] for name in ("cpu", "cores", "gpus")}
    if config.latency.name is not LatencyKind.gpu:
        return found
    ranks = os.environ | ENVIRONMENT[config.interconnect.name.name]
    nccl = {name: ranks[name] for name in sorted(ranks) if name.startswith("NCCL_") and "DEBUG" not in name}
    return found | {"engine": gpu_engine(), "nccl": nccl}
