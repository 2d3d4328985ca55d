"""What ranks of the tests of latency=gpu run."""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from spd.checkpoint import Checkpoint, read_config
from spd.families import family_of
from spd.gpu import all_reduce
from spd.gpu.model import Arm, GraphModel
from spd.gpu.rank import meet, start
from spd.launch import Progress

RANKS_DROP = [0, 5, 11]


def compared(settings: dict[str, Any], on_progress: Progress) -> dict[str, Any]:
    """Raises unless a model, compiled and captured on GPUs, gives the wanted logits with every kind of all-reduce."""
    rank, folder, given = int(os.environ["RANK"]), Path(settings["folder"]), load_file(settings["want"])
    device, config = start(settings, rank), read_config(folder)
    ids, want, equal = given["ids"].to(device), given["want"], []
    arm = Arm(frozenset(RANKS_DROP))
    for kind in settings["kinds"]:
        reduce = all_reduce.make(kind, ids.numel() * config.hidden_size, torch.float32, device)
        model = GraphModel(
            config, family_of(config), dist.get_world_size(), rank, checkpoint=Checkpoint(folder),
            batch_size=len(ids), cache_length=64, prompt_length=ids.shape[1], all_reduce=reduce, dtype=torch.float32,
            device=device, compiled=device.type == "cuda",
        )  # fmt: skip
        first, step = model.capture(arm, decode=False), model.capture(arm, decode=True)
        model.prompt.copy_(ids)
        meet(device)
        first()
        for i in range(want.shape[1]):
            if i:
                step()
            torch.testing.assert_close(model.logits.cpu(), want[:, i], atol=2e-3, rtol=1e-3)
            model.token.copy_(want[:, i].argmax(-1, keepdim=True))
        equal.append(kind)
        on_progress(len(equal), len(settings["kinds"]))
    return {"equal": equal}
