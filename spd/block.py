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

PIECE = 2**19
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
        pieces = zip(*map(self._pieces, self._seen(x, heads, **inputs)), strict=True)
        outputs = [self._spd_local(*piece) for piece in pieces]
        local = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return _plus(x, self.attention_bias) + _plus(self.ranks.sum(local.view_as(x)), self.mlp_bias)

    def _spd_local(self, residual: Tensor, heads: Tensor, *known: Tensor) -> Tensor:
        """`sum_i(P_i + MLP_i(norm2(U_i)))` [B, T, D] over this process's ranks, from what `_seen` gives."""
        partials = self.partials(heads)
        attended = partials[0] if len(partials) == 1 else partials.sum(0)
        return attended + self.mlp_output.total(self.mlp(self.norm2(self._u(residual, partials, *known))))

    def mlp_inputs(self, x: Tensor, heads: Tensor, **inputs: Any) -> Tensor:
        """`U_i` [n, B, T, D] of every rank of this process."""
        residual, _, *known = self._seen(x, heads, **inputs)
        return self._u(residual, self.partials(heads), *known)

    def _seen(self, x: Tensor, heads: Tensor, **inputs: Any) -> list[Tensor]:
        """What a dropped block goes by, token by token: `X + b`, heads, and for a correction `norm1(X)`, also of the
        token before if it looks there."""
        residual = _plus(x, self.attention_bias)
        if self.correction is None:
            return [residual, heads]
        normed = self.norm1(x)
        before = self.correction.before(normed, inputs.get("position_ids"), inputs.get("past_key_values"))
        return [residual, heads, normed] if before is None else [residual, heads, normed, before]

    def _u(
        self, residual: Tensor, partials: Tensor, normed: Tensor | None = None, before: Tensor | None = None
    ) -> Tensor:
        """`U_i` [n, B, T, D] from `X + b` [B, T, D], the partial sums `P_i` [n, B, T, D], which several ranks' are
        written over, and for a correction `norm1(X)` [B, T, D] and that of the token before."""
        if self.correction is not None:
            assert normed is not None
            with_missing = (p + self.correction(rank, normed, p, before) for rank, p in enumerate(partials))
            partials = torch.stack(list(with_missing))
        return partials.add_(residual) if len(partials) > 1 else residual + partials

    def _pieces(self, x: Tensor) -> tuple[Tensor, ...]:
        """[B, T, ...] by tokens, [1, t, ...]: on a GPU all at once.

        On a CPU, of many ranks, as many as stay in its cache: fresh memory costs as much as the arithmetic.
        """
        n, tokens = len(self.ranks.local), x.flatten(0, 1).unsqueeze(0)
        if n == 1 or x.device.type != "cpu":
            return (tokens,)
        most = max(1, PIECE // (n * self.mlp_output.out_features))
        return tokens.chunk(-(-tokens.shape[1] // most), dim=1)


def _plus(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias
