"""The TP block and the SPD block.

Legend: B batch, T tokens, D hidden size, N ranks, i a rank; P_i = attention of rank i's heads through its columns of
the output projection, b and b2 the output biases of attention and MLP (absent in LLaMA, present in OPT).
"""

from typing import Any

from torch import Tensor, nn

from spd.families import Family
from spd.ranks import Ranks


class Block(nn.Module):
    """One transformer block over the shards of this process.

        TP block    U   = X + sum_i(P_i) + b                        sync point 1
                    out = U + sum_i(MLP_i(norm2(U))) + b2           sync point 2

        SPD block   U_i = X + P_i + b                               stays on the rank
                    out = X + b + sum_i(P_i + MLP_i(norm2(U_i))) + b2    the only sync point

    `sum_i` is `ranks.sum`. With `N = 1` the two are the same function. Source: the paper's section 3, and its appendix
    for where the residuals go.

    Args:
        shards: the Hugging Face layers of this process's ranks (see `spd.sharding`).
        family: where these layers keep their parts.
        ranks: who sums.
        attention_bias: b [D] or None.
        mlp_bias: b2 [D] or None.
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
    ) -> None:
        super().__init__()
        self.shards = nn.ModuleList(shards)
        self.family = family
        self.ranks = ranks
        self.norm1 = shards[0].get_submodule(family.attention_norm)
        self.norm2 = shards[0].get_submodule(family.mlp_norm)
        self.attention_bias = attention_bias
        self.mlp_bias = mlp_bias
        self.dropped = False

    def forward(self, x: Tensor, **inputs: Any) -> Tensor:
        """[B, T, D] -> [B, T, D]; `inputs` are what Hugging Face gives a layer: mask, positions, cache."""
        partials = self.attention(x, **inputs)
        return self.spd(x, partials) if self.dropped else self.tp(x, partials)

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

    def spd(self, x: Tensor, partials: list[Tensor]) -> Tensor:
        """The block's output with the sync point after attention dropped, from `X` and `P_i`: one sync point."""
        residual = _plus(x, self.attention_bias)
        outputs = (
            # In place on the MLP's own output: with many virtual ranks fresh memory costs as much as the arithmetic.
            self.family.mlp(shard, self.norm2(residual + p)).add_(p)
            for shard, p in zip(self.shards, partials, strict=True)
        )
        return residual + _plus(self.ranks.sum(outputs), self.mlp_bias)


def _plus(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias
