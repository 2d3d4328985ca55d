"""The TP block and the SPD block.

Legend: B batch, T tokens, D hidden size, N ranks, n of them in this process, i a rank; P_i = attention of rank i's
heads through its columns of the output projection, b and b2 the output biases of attention and MLP (absent in LLaMA,
present in OPT).
"""

from typing import Any

import torch
from torch import Tensor, nn

from spd.families import Family
from spd.ranks import Ranks
from spd.strategies.correction import Correction

PIECE = 2**18
"""Numbers of all ranks together in a piece of `Block.spd`, on a CPU."""


class Block(nn.Module):
    """One transformer block over the ranks of this process.

        TP block    U   = X + sum_i(P_i) + b                        sync point 1
                    out = U + sum_i(MLP_i(norm2(U))) + b2           sync point 2

        SPD block   U_i = X + P_i + b                               stays on the rank
                    out = X + b + sum_i(P_i + MLP_i(norm2(U_i))) + b2    the only sync point

    `sum_i` is `ranks.sum`. With `N = 1` the two are the same function. Source: the paper's section 3, and its appendix
    for where the residuals go. With a correction, `U_i = X + P_i + b + M_i`, where `M_i` predicts what the other ranks'
    attention would have added (`spd.strategies.correction`; beyond the paper).

    Args:
        layer: the Hugging Face layer with the heads and MLP columns of this process's ranks (see `spd.sharding`).
        family: where it keeps its parts.
        ranks: who sums.
        attention_bias: b [D] or None.
        mlp_bias: b2 [D] or None.
        correction: used while the block is dropped.
    """

    dropped: bool
    """Whether the sync point after attention is dropped; can be changed between any two forwards."""

    def __init__(
        self,
        layer: nn.Module,
        family: Family,
        ranks: Ranks,
        attention_bias: nn.Parameter | None,
        mlp_bias: nn.Parameter | None,
        correction: Correction | None = None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.family = family
        self.ranks = ranks
        self.norm1 = layer.get_submodule(family.attention_norm)
        self.norm2 = layer.get_submodule(family.mlp_norm)
        self.attention_bias = attention_bias
        self.mlp_bias = mlp_bias
        self.correction = correction
        self.dropped = False

    def forward(self, x: Tensor, **inputs: Any) -> Tensor:
        """[B, T, D] -> [B, T, D]; `inputs` are what Hugging Face gives a layer: mask, positions, cache."""
        if self.dropped:
            return self.spd(x, self.attention(x, **inputs), **inputs)
        return self.tp(x, self.attention(x, split=False, **inputs))

    def attention(self, x: Tensor, split: bool = True, **inputs: Any) -> Tensor:
        """`P_i` of every rank of this process, [n, B, T, D], or their sum, [1, B, T, D], for the block input `X`."""
        layer: Any = self.layer
        self._split(self.family.attention_output, split)
        partials: Tensor = layer.self_attn(hidden_states=self.norm1(x), **inputs)[0]
        return partials

    def mlp(self, x: Tensor, split: bool = False) -> Tensor:
        """`MLP_i` of every rank of this process, [n, B, T, D], or their sum, [1, B, T, D].

        `x` is what all ranks share, [B, T, D], or each rank's own, [n, B, T, D], after the norm.
        """
        self._split(self.family.mlp_output, split)
        return self.family.mlp(self.layer, x)

    def _split(self, output: str, split: bool) -> None:
        linear: Any = self.layer.get_submodule(output)
        linear.split = len(self.ranks.local) if split else 1

    def tp(self, x: Tensor, partials: Tensor) -> Tensor:
        """The block's output as tensor parallelism has it, from `X` and `P_i`: two sync points."""
        u = x + _plus(self.ranks.sum(partials), self.attention_bias)
        return u + _plus(self.ranks.sum(self.mlp(self.norm2(u))), self.mlp_bias)

    def spd(self, x: Tensor, partials: Tensor, **inputs: Any) -> Tensor:
        """The block's output with the sync point after attention dropped, from `X` and `P_i`: one sync point.

        `inputs` are for a correction that looks a token back; without them, `X` are whole sequences without padding.
        """
        residual = _plus(x, self.attention_bias)
        known = self._with_missing(x, partials, **inputs)
        pieces = zip(self._pieces(residual.unsqueeze(0)), self._pieces(known), strict=True)
        outputs = [self.mlp(self.norm2(r + k)) for r, k in pieces]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
        # What this process's ranks add up to, whichever is summed first.
        total = output.view(1, *x.shape) + (partials if len(partials) == 1 else partials.sum(0, keepdim=True))
        return residual + _plus(self.ranks.sum(total), self.mlp_bias)

    def mlp_inputs(self, x: Tensor, partials: Tensor, **inputs: Any) -> Tensor:
        """`U_i` [n, B, T, D] of every rank of this process, from `X` and `P_i`."""
        return _plus(x, self.attention_bias) + self._with_missing(x, partials, **inputs)

    def _with_missing(self, x: Tensor, partials: Tensor, **inputs: Any) -> Tensor:
        """`P_i`, with a correction `P_i + M_i`, [n, B, T, D]."""
        if self.correction is None:
            return partials
        normed, correction = self.norm1(x), self.correction
        before = correction.before(normed, inputs.get("position_ids"), inputs.get("past_key_values"))
        return torch.stack([p + correction(rank, normed, p, before) for rank, p in enumerate(partials)])

    def _pieces(self, x: Tensor) -> tuple[Tensor, ...]:
        """[1 or n, B, T, D] by tokens, [1 or n, 1, t, D]: on a GPU all at once.

        On a CPU, of many ranks, as many as stay in its cache: fresh memory costs as much as the arithmetic.
        """
        tokens, n = x.flatten(1, 2).unsqueeze(1), len(self.ranks.local)
        if n == 1 or x.device.type != "cpu":
            return (tokens,)
        return tokens.split(max(1, PIECE // (n * x.shape[-1])), dim=2)


def _plus(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias
