"""The choice of the next token, of a vocabulary that is cut over the ranks.

A rank has the logits of its part. The likeliest token of all is found with one small sum over ranks: each puts its best
logit and that token's id in a place of its own, and zeros in the others'. (A serving engine that samples collects the
logits instead.)

Legend: B batch, V vocabulary, N ranks.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

_BASE, _DIGITS = 256, 3
"""A token's id is written in digits, as bfloat16 has all integers to 256 and few above."""
_PLACE = 1 + _DIGITS
_PIECE = 512
"""Logits that are looked through by one thread block: torch's compiler gives it a whole row otherwise."""


def part_of(vocab_size: int, tp_size: int, rank: int) -> slice:
    """The tokens whose logits a rank has: as many as any other, or one more."""
    return slice(vocab_size * rank // tp_size, vocab_size * (rank + 1) // tp_size)


def candidates_size(batch_size: int, tp_size: int) -> int:
    """Numbers in what is summed."""
    return tp_size * batch_size * _PLACE


def candidates(logits: Tensor, first: Tensor, mine: Tensor) -> Tensor:
    """What is to be summed, [N, B, _PLACE], of one rank.

    Args:
        logits: of its part of the vocabulary, [B, V/N].
        first: id of the part's first token.
        mine: [N, 1, 1], True for this rank.
    """
    padded = F.pad(logits, (0, -logits.shape[1] % _PIECE), value=-torch.inf)
    best_of, place_in = padded.unflatten(1, (-1, _PIECE)).max(-1)  # [B, pieces]
    best, piece = best_of.max(-1)
    token = first + piece * _PIECE + place_in.gather(1, piece.unsqueeze(1)).squeeze(1)
    digits = [(token // _BASE**i % _BASE).to(best.dtype) for i in range(_DIGITS)]
    return torch.where(mine, torch.stack([best, *digits], -1), 0)


def likeliest(summed: Tensor) -> Tensor:
    """Ids [B, 1] of the likeliest tokens, of the sum over ranks of `candidates`."""
    best = summed[..., :1].argmax(0, keepdim=True)  # [1, B, 1]
    digits = summed.gather(0, best.expand(1, -1, _PLACE))[0, :, 1:].long()
    ones, tens, hundreds = digits.split(1, dim=1)
    return ones + _BASE * (tens + _BASE * hundreds)
