"""The choice of the next token, of a vocabulary that is cut over the ranks as serving engines cut it.

A rank has the logits of its part. The likeliest token of all is found with one small sum over ranks: each puts its best
logit and that token's id in a place of its own, and zeros in the others'.

Legend: B batch, V vocabulary, N ranks.
"""

import torch
from torch import Tensor

_BASE = 256
"""Digits of a token's id are below it: bfloat16 has all integers up to there."""
_DIGITS = 3
_PLACE = 8
"""Numbers in a place: of bfloat16 16 bytes, to which the symmetric-memory kernels' reads are aligned."""


def part_of(vocab_size: int, tp_size: int, rank: int) -> slice:
    """The tokens whose logits a rank has: as many as any other, or one more."""
    return slice(vocab_size * rank // tp_size, vocab_size * (rank + 1) // tp_size)


def message_size(batch_size: int, tp_size: int) -> int:
    """Numbers in what is summed."""
    return tp_size * batch_size * _PLACE


def candidate(logits: Tensor, first: Tensor, mine: Tensor) -> Tensor:
    """What is to be summed, [N, B, _PLACE], of one rank.

    Args:
        logits: of its part of the vocabulary, [B, V/N].
        first: id of the part's first token.
        mine: [N, 1, 1], True for this rank.
    """
    best, token = logits.max(-1)
    token = token + first
    digits = [(token // _BASE**i % _BASE).to(best.dtype) for i in range(_DIGITS)]
    rest = [torch.zeros_like(best)] * (_PLACE - 1 - _DIGITS)
    return torch.where(mine, torch.stack([best, *digits, *rest], -1), 0)


def likeliest(candidates: Tensor) -> Tensor:
    """Ids [B, 1] of the likeliest tokens, of what all ranks put together."""
    best = candidates[..., :1].argmax(0, keepdim=True)  # [1, B, 1]
    digits = candidates.gather(0, best.expand(1, -1, _PLACE))[0, :, 1 : 1 + _DIGITS].long()
    ones, tens, hundreds = digits.split(1, dim=1)
    return ones + _BASE * (tens + _BASE * hundreds)
