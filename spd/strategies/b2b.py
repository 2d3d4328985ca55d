"""Block-to-block distillation (the paper's ZS+B2B).

    teacher   TP(theta_0, X)     the original block with both sync points
    student   SPD(theta, X)      the same block with the sync point after attention dropped
    loss      mean over samples, tokens and hidden units of (SPD(theta, X) - TP(theta_0, X))^2

`X` is the original model's input of the block, and only this block's weights `theta` move, so blocks are independent of
each other and a distilled block serves every drop fraction. Open in the paper, chosen here: AdamW without weight decay,
a short warm-up and a cosine to zero. Ours too, and off unless asked for: the last block's outputs are compared as the
head sees them, after the final norm.

Legend: S samples, B batch, T tokens, D hidden size.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spd.block import Block
from spd.config import DistillationConfig

Seen = Callable[[Tensor], Tensor]
AS_IT_IS = nn.Identity()
DIVERGED = 10.0
"""Distillation is stopped when the held-out loss is this many times that of the block it began with."""


def distill(
    student: Block,
    x: Tensor,
    targets: Tensor,
    inputs: dict[str, Any],
    settings: DistillationConfig,
    learning_rate: float,
    heldout: int,
    seed: int,
    on_epoch: Callable[[int, int], None] | None = None,
    seen: Seen = AS_IT_IS,
) -> dict[str, Any]:
    """Trains the student in place and leaves it with the weights of the epoch that is best on held-out samples.

    Args:
        student: of all N ranks, float32; its correction, if it has one, stays as it is.
        x: block inputs `X` of the original model, [S, T, D].
        targets: the teacher's outputs [S, T, D], as `seen`.
        inputs: what Hugging Face gives a layer beside `X`.
        settings: epochs and batch size.
        learning_rate: AdamW's.
        heldout: the last so many samples pick the epoch and are not trained on.
        seed: of the order of samples.
        on_epoch: called with (epochs done, epochs in all).
        seen: what follows the block, after which outputs are compared.

    Returns:
        `loss`, held out, before the first and after every epoch; `best_epoch` (0: no epoch was better than none);
        `stopped`, a sentence, if it ended early.
    """
    train, order = len(x) - heldout, torch.Generator().manual_seed(seed)
    parameters: list[Tensor] = list(student.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    steps = settings.epochs * math.ceil(train / settings.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    losses = [block_loss(student, x[train:], targets[train:], inputs, settings.batch_size, seen)]
    best, best_epoch, stopped = [p.detach().clone() for p in parameters], 0, None
    for epoch in range(1, settings.epochs + 1):
        for picked in torch.randperm(train, generator=order).to(x.device).split(settings.batch_size):
            output = seen(_spd(student, x[picked], inputs))
            F.mse_loss(output, targets[picked]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
        losses.append(block_loss(student, x[train:], targets[train:], inputs, settings.batch_size, seen))
        if losses[-1] < losses[best_epoch]:
            best_epoch = epoch
            torch._foreach_copy_(best, [p.detach() for p in parameters])
        if on_epoch:
            on_epoch(epoch, settings.epochs)
        if not math.isfinite(losses[-1]):
            stopped = f"the loss was no number in epoch {epoch} at learning rate {learning_rate:g}"
        elif losses[-1] > DIVERGED * losses[0]:
            stopped = (
                f"the loss was over {DIVERGED:g} times the first in epoch {epoch} at learning rate {learning_rate:g}"
            )
        if stopped:
            break
    with torch.no_grad():
        torch._foreach_copy_(parameters, best)
    for parameter in parameters:
        parameter.requires_grad_(False)
    return {"loss": losses, "best_epoch": best_epoch, "stopped": stopped}


def _rate(step: int, steps: int) -> float:
    """Learning rate over its peak: up within a twentieth of the steps, then a cosine down to zero."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def block_loss(
    block: Block, x: Tensor, targets: Tensor, inputs: dict[str, Any], batch_size: int, seen: Seen = AS_IT_IS
) -> float:
    """Mean squared error of the dropped block's outputs for inputs [S, T, D], as seen, against targets [S, T, D]."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for some, wanted in zip(x.split(batch_size), targets.split(batch_size), strict=True):
        total += (seen(_spd(block, some, inputs)) - wanted).square().sum(dtype=torch.float64)
    return (total / targets.numel()).item()


def _spd(block: Block, x: Tensor, inputs: dict[str, Any]) -> Tensor:
    return block.spd(x, block.attention(x, **inputs))
