"""Loads a checkpoint for tensor-parallel ranks: what everything begins with."""

from pathlib import Path

import torch

from spd.allocator import keep_freed_memory
from spd.checkpoint import Checkpoint, parse_dtype, read_config, resolve
from spd.errors import UserError
from spd.families import family_of
from spd.model import TensorParallelLM
from spd.plan import PLAN_FILE, DropPlan
from spd.ranks import ProcessRanks, Ranks, VirtualRanks
from spd.sharding import check_tp_size


def load(
    path: str | Path,
    tp_size: int | None = None,
    ranks: str = "virtual",
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> TensorParallelLM:
    """Loads a checkpoint for `tp_size` tensor-parallel ranks, with nothing dropped.

    A folder written by `TensorParallelLM.save_pretrained` comes back as it was: with its plan's tp size and its blocks
    dropped. On a CPU the process keeps memory that it frees from then on (`spd.allocator`).

    Args:
        path: a Hugging Face folder or hub id with safetensors weights.
        tp_size: N; by default that of the folder's plan, or 1.
        ranks: "virtual" for all N ranks in this process, "processes" for one a process under torchrun.
        dtype: float32, float16 or bfloat16; by default the checkpoint's.
        device: by default cpu for virtual ranks and for processes where there is no GPU, else the process's GPU.

    Raises:
        UserError: the folder is incomplete or damaged, the family is unknown, tp_size does not cut the model
            evenly, the folder's plan is for another tp size, or `ranks="processes"` without torchrun.
    """
    folder = resolve(path)
    config = read_config(folder)
    family = family_of(config)
    plan = DropPlan.load(folder / PLAN_FILE) if (folder / PLAN_FILE).is_file() else None
    if plan is not None and tp_size not in (None, plan.tp_size):
        if plan.dropped:
            raise UserError(
                f"{folder} was prepared for tp_size={plan.tp_size}, not {tp_size}; prepare the original again."
            )
        plan = None  # nothing was done to the model
    if tp_size is None:
        tp_size = plan.tp_size if plan else 1
    check_tp_size(family, config, tp_size)
    if ranks not in ("virtual", "processes"):
        raise UserError(f"ranks={ranks!r} is not known; write 'virtual' or 'processes'.")
    where = find_device(device, ranks)
    # The checkpoint is looked at before any process group is made: a bad one should fail on every rank by itself.
    checkpoint = Checkpoint(folder)
    who: Ranks = VirtualRanks(tp_size) if ranks == "virtual" else ProcessRanks(tp_size, where)
    model = TensorParallelLM(checkpoint, config, family, who, parse_dtype(dtype, config), where)
    if plan is not None:
        plan.check_fits(model)
        model.take_over(plan)
    if where.type == "cpu":
        keep_freed_memory()
    return model


def find_device(device: str | torch.device | None, ranks: str) -> torch.device:
    """The device, made sure to be there; each process under torchrun has its own GPU."""
    if device is None:
        device = "cuda" if ranks == "processes" and torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device={device!r} is not known; write cpu, cuda or cuda:1.") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device='{device}' cannot be used; write cpu, cuda or cuda:1.")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError("device='cuda' but torch sees no GPU here; write device='cpu'.")
        if ranks == "processes":
            device = torch.device("cuda", torch.distributed.get_node_local_rank(fallback_rank=0))
            torch.cuda.set_device(device)
    return device
