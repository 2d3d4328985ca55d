"""Next-token loss and perplexity on unpadded samples.

Legend: S samples, B batch, T tokens, V vocabulary.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from spd.errors import UserError
from spd.model import TensorParallelLM


def perplexity(model: TensorParallelLM, samples: Tensor, batch_size: int = 8) -> float:
    """exp of the mean next-token loss over samples [S, T], with the blocks that the model has dropped.

    Raises:
        UserError: the loss is no number.
    """
    loss = 0.0
    with torch.inference_mode():
        for ids in samples.to(model.device).split(batch_size):
            loss += next_token_loss(model(ids), ids)
    return to_perplexity(loss, samples.shape[0] * (samples.shape[1] - 1))


def to_perplexity(loss: float, tokens: int) -> float:
    """exp(loss / tokens) of a summed loss; UserError when that is not finite, as a ranking by it would mean nothing."""
    try:
        value = math.exp(loss / tokens)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise UserError(
            "The model's loss is not finite; float16 overflows where bfloat16 and float32 do not, so try "
            "dtype=bfloat16 or float32 (or the weights are damaged)."
        )
    return value


def next_token_loss(logits: Tensor, ids: Tensor) -> float:
    """Summed loss of logits [B, T, V] at predicting each of the ids [B, T] but the first."""
    # The last position predicts nothing; left in and ignored, as cutting it off would copy all logits.
    targets = ids.roll(-1, dims=1)
    targets[:, -1] = -100
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum").item()
