"""Next-token loss and perplexity on unpadded samples.

Legend: S samples, B batch, T tokens, V vocabulary.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from spd.model import TensorParallelLM


def perplexity(model: TensorParallelLM, samples: Tensor, batch_size: int = 8) -> float:
    """exp of the mean next-token loss over samples [S, T], with the blocks that the model has dropped."""
    loss = 0.0
    with torch.inference_mode():
        for ids in samples.to(model.device).split(batch_size):
            loss += next_token_loss(model(ids), ids)
    return math.exp(loss / (samples.shape[0] * (samples.shape[1] - 1)))


def next_token_loss(logits: Tensor, ids: Tensor) -> float:
    """Summed loss of logits [B, T, V] at predicting each of the ids [B, T] but the first."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum").item()
