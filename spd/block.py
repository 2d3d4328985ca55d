"""The TP block and the SPD block.

Legend: B batch, T tokens, D hidden size, N ranks, n of them in this process, i a rank; P_i = attention of rank i's
heads through its columns of the output projection, b and b2 the output biases of attention and MLP (absent in LLaMA,
present in OPT).
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from spd.families import Family
from spd.ranks import Ranks
from spd.sharding import RankColumns
from spd.strategies.correction import Correction


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

    @property
    def attention_output(self) -> RankColumns:
        """The output product of the attention."""
        return cast(RankColumns, self.layer.get_submodule(self.family.attention_output))

    @property
    def mlp_output(self) -> RankColumns:
        """The output product of the MLP."""
        return cast(RankColumns, self.layer.get_submodule(self.family.mlp_output))

    def forward(self, x: Tensor, **inputs: Any) -> Tensor:
        """[B, T, D] -> [B, T, D]; `inputs` are what Hugging Face gives a layer: mask, positions, cache."""
        heads = self.attention(x, **inputs)
        return self.spd(x, heads, **inputs) if self.dropped else self.tp(x, heads)

    def attention(self, x: Tensor, **inputs: Any) -> Tensor:
        """What the heads of this process's ranks give, before the output product: [B, T, n H/N h] for `X`."""
        layer: Any = self.layer
        heads: Tensor = layer.self_attn(hidden_states=self.norm1(x), **inputs)[0]
        return heads

    def partials(self, heads: Tensor) -> Tensor:
        """`P_i` of every rank of this process, [n, B, T, D]."""
        return self.attention_output.partials(heads, len(self.ranks.local))

    def mlp(self, x: Tensor) -> Tensor:
        """The MLP before its output product, of normed inputs that ranks share, [B, T, D], or of each rank's own.

        [B, T, n F/N] or, of [n, B, T, D], [n, B, T, F/N].
        """
        return self.family.mlp(self.layer, x)

    def tp(self, x: Tensor, heads: Tensor) -> Tensor:
        """The block's output as tensor parallelism has it, from `X` and what `attention` gave: two sync points."""
        u = x + _plus(self.ranks.sum(self.attention_output.total(heads)), self.attention_bias)
        return u + _plus(self.ranks.sum(self.mlp_output.total(self.mlp(self.norm2(u)))), self.mlp_bias)

    def spd(self, x: Tensor, heads: Tensor, **inputs: Any) -> Tensor:
        """The block's output with the sync point after attention dropped: one sync point.

        `inputs` are for a correction that looks a token back; without them, `X` are whole sequences without padding.
        """
        partials = self.partials(heads)
        attended = partials.sum(0)  # before `_u` writes over them
        local = attended + self.mlp_output.total(self.mlp(self.norm2(self._u(x, partials, **inputs))))
        return _plus(x, self.attention_bias) + _plus(self.ranks.sum(local), self.mlp_bias)

    def mlp_inputs(self, x: Tensor, heads: Tensor, **inputs: Any) -> Tensor:
        """`U_i` [n, B, T, D] of every rank of this process."""
        return self._u(x, self.partials(heads), **inputs)

    def _u(self, x: Tensor, partials: Tensor, **inputs: Any) -> Tensor:
        """`U_i` [n, B, T, D] from `X` [B, T, D] and `P_i` [n, B, T, D], which are written over."""
        residual = _plus(x, self.attention_bias)
        if self.correction is not None:
            normed = self.norm1(x)
            before = self.correction.before(normed, inputs.get("position_ids"), inputs.get("past_key_values"))
            partials = torch.stack([p + self.correction(rank, normed, p, before) for rank, p in enumerate(partials)])
        return partials.add_(residual)


def _plus(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias
