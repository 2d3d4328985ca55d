"""Small models of every family as the engine of latency=gpu runs them, for its tests."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from spd.checkpoint import Checkpoint, read_config
from spd.families import family_of
from spd.gpu.model import Arm, GraphModel
from spd.paths import ROOT

FAMILIES = [ROOT / "experiments/reference/models" / name for name in ("ref_llama", "ref_opt", "ref_qwen2")]
PROMPT, NEW = 20, 12
every_family = pytest.mark.parametrize("folder", FAMILIES, ids=lambda folder: folder.name)


def graph_model(folder: Path, tp_size: int = 1, rank: int = 0, **options) -> GraphModel:
    config = read_config(folder)
    options = {"dtype": torch.float32, "device": "cpu", "compiled": False, "cache_length": 64} | options
    return GraphModel(
        config, family_of(config), tp_size, rank, checkpoint=Checkpoint(folder), prompt_length=PROMPT, **options
    )


def prompts(folder: Path, batch: int, device: str = "cpu") -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(5, read_config(folder).vocab_size, (batch, PROMPT), generator=random).to(device)


def greedy(model: GraphModel, ids: Tensor, arm: Arm, new: int = NEW) -> tuple[Tensor, list[Tensor]]:
    """The tokens, and the logits that each was chosen by."""
    model.prompt.copy_(ids)
    model.prefill(arm)
    tokens, logits = [model.token.clone()], [model.logits.clone()]
    for _ in range(new - 1):
        model.decode(arm)
        tokens.append(model.token.clone())
        logits.append(model.logits.clone())
    return torch.cat(tokens, 1), logits
