"""The TP block and the SPD block.

Legend: B batch, T tokens, D hidden size, N ranks, i a rank; P_i = attention of rank i's heads through its columns of
the output projection, b and b2 the output biases of attention and MLP (absent in LLaMA, present in OPT).
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from spd.families import Family
from spd.ranks import Ranks
from spd.strategies.correction import Correction


class Block(nn.Module):
    """One transformer block over the shards of this process.

        TP block    U   = X + sum_i(P_i) + b                        sync point 1
                    out = U + sum_i(MLP_i(norm2(U))) + b2           sync point 2

        SPD block   U_i = X + P_i + b                               stays on the rank
                    out = X + b + sum_i(P_i + MLP_i(norm2(U_i))) + b2    the only sync point

    `sum_i` is `ranks.sum`. With `N = 1` the two are the same function. Source: the paper's section 3, and its appendix
    for where the residuals go. With a correction, `U_i = X + P_i + b + M_i`, where `M_i` predicts what the other ranks'
    attention would have added (`spd.strategies.correction`; beyond the paper).

    Args:
        shards: the Hugging Face layers of this process's ranks (see `spd.sharding`).
        family: where these layers keep their parts.
        ranks: who sums.
        attention_bias: b [D] or None.
        mlp_bias: b2 [D] or None.
        correction: used while the block is dropped.
    """

    dropped: bool
    """Whether the sync point after attention is dropped; can be changed between any two forwards."""

    def __init__(
        self,
        shards: list[nn.Module],
        family: Family,
        ranks: Ranks,
        attention_bias: nn.Parameter | None,
        mlp_bias: nn.Parameter | None,
        correction: Correction | None = None,
    ) -> None:
        super().__init__()
        self.shards = nn.ModuleList(shards)
        self.family = family
        self.ranks = ranks
        self.norm1 = shards[0].get_submodule(family.attention_norm)
        self.norm2 = shards[0].get_submodule(family.mlp_norm)
        self.attention_bias = attention_bias
        self.mlp_bias = mlp_bias
        self.correction = correction
        self.dropped = False

    def forward(self, x: Tensor, **inputs: Any) -> Tensor:
        """[B, T, D] -> [B, T, D]; `inputs` are what Hugging Face gives a layer: mask, positions, cache."""
        partials = self.attention(x, **inputs)
        return self.spd(x, partials, **inputs) if self.dropped else self.tp(x, partials)

    def attention(self, x: Tensor, **inputs: Any) -> list[Tensor]:
        """`P_i` [B, T, D] of every rank of this process, for the block input `X` [B, T, D]."""
        normed = self.norm1(x)
        shards: Any = self.shards
        return [shard.self_attn(hidden_states=normed, **inputs)[0] for shard in shards]

    def tp(self, x: Tensor, partials: list[Tensor]) -> Tensor:
        """The block's output as tensor parallelism has it, from `X` and `P_i`: two sync points."""
        u = x + _plus(self.ranks.sum(partials), self.attention_bias)
        normed = self.norm2(u)
        return u + _plus(self.ranks.sum(self.family.mlp(shard, normed) for shard in self.shards), self.mlp_bias)

    def spd(self, x: Tensor, partials: list[Tensor], **inputs: Any) -> Tensor:
        """The block's output with the sync point after attention dropped, from `X` and `P_i`: one sync point.

        `inputs` are for a correction that looks a token back; without them, `X` are whole sequences without padding.
        """
        residual = _plus(x, self.attention_bias)
        outputs = (
            # In place on the MLP's own output: with many virtual ranks fresh memory costs as much as the arithmetic.
            self.family.mlp(shard, self.norm2(u)).add_(p)
            for shard, p, u in zip(self.shards, partials, self.mlp_inputs(x, partials, **inputs), strict=True)
        )
        return residual + _plus(self.ranks.sum(outputs), self.mlp_bias)

    def mlp_inputs(self, x: Tensor, partials: list[Tensor], **inputs: Any) -> Iterator[Tensor]:
        """`U_i` [B, T, D] of every rank of this process, one after the other, from `X` and `P_i`."""
        residual = _plus(x, self.attention_bias)
        if self.correction is None:
            return (residual + p for p in partials)
        normed, correction = self.norm1(x), self.correction
        before = correction.before(normed, inputs.get("position_ids"), inputs.get("past_key_values"))
        return (residual + p + correction(rank, normed, p, before) for rank, p in enumerate(partials))


def _plus(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias
