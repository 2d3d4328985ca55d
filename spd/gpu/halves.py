"""The two halves of a block, on one rank, as functions of fused weights; what is between them is summed over ranks.

    attention   X = R + c + S      P_i = attention of rank i's heads
    mlp         U   = X + b + P    R = U   c = b2       S_i = MLP_i(norm2(U))           TP, P = sum_i(P_i)
                U_i = X + b + P_i  R = X   c = b + b2   S_i = P_i + MLP_i(norm2(U_i))   SPD

A block hands on the residual `R`, which all ranks have, biases `c`, and the sum `S` over ranks of the `S_i`; the next
one adds them, so that additions and norm become one kernel, and an SPD block writes no residual. The equations are
those of `spd.block.Block`. Every tensor comes as an argument: compiled once, a function serves all blocks.

Legend: B batch, T tokens, C cache length, D hidden size, H query heads, K key/value heads, h head size, F MLP width,
N ranks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from spd.errors import UserError
from spd.families import Family
from spd.gpu import attention, head
from spd.sharding import Kind


class Weights(NamedTuple):
    """One rank's part of a block."""

    norm1: Tensor
    norm1_bias: Tensor | None
    qkv: Tensor
    """[(H + 2 K) h / N, D]"""
    qkv_bias: Tensor | None
    attention_output: Tensor
    """[D, H h / N]"""
    attention_bias: Tensor | None
    """b [D], whole"""
    norm2: Tensor
    norm2_bias: Tensor | None
    mlp_input: Tensor
    """[F / N, D], or gate above up, [2 F / N, D]"""
    mlp_input_bias: Tensor | None
    mlp_output: Tensor
    """[D, F / N]"""
    mlp_bias: Tensor | None
    """b2 [D], whole"""
    biases: Tensor | None
    """b + b2"""

    @classmethod
    def of(cls, layer: nn.Module, family: Family, biases: dict[Kind, nn.Parameter]) -> "Weights":
        """Fuses what `spd.sharding.BlockReader` read of one rank.

        Raises:
            UserError: the layer has parts that these functions do not use (Qwen3's norms of queries and keys, say).
        """
        outputs = (family.attention_output, family.mlp_output)
        used = {family.attention_norm, family.mlp_norm, family.query, *family.key_value, *family.mlp_input, *outputs}
        if unused := {name.rpartition(".")[0] for name, _ in layer.named_parameters()} - used:
            raise UserError(
                f"latency=gpu does not know what {min(unused)} of a {type(layer).__name__} does; write latency=cpu."
            )

        def joined(names: tuple[str, ...], leaf: str) -> Tensor | None:
            parts = [getattr(layer.get_submodule(name), leaf) for name in names]
            return None if parts[0] is None else torch.cat([part.data for part in parts])

        def norm(name: str) -> tuple[Tensor, Tensor | None]:
            module = layer.get_submodule(name)
            bias = getattr(module, "bias", None)
            return module.weight.data, None if bias is None else bias.data  # type: ignore[union-attr, return-value]

        b, b2 = (biases[kind].data if kind in biases else None for kind in ("attention_output", "mlp_output"))
        qkv = (family.query, *family.key_value)
        fused = [(joined(names, "weight"), joined(names, "bias")) for names in (qkv, family.mlp_input)]
        attention_output, mlp_output = (layer.get_submodule(name).weight.data for name in outputs)
        (qkv_weight, qkv_bias), (mlp_weight, mlp_bias) = fused
        assert qkv_weight is not None
        assert mlp_weight is not None
        return cls(
            *norm(family.attention_norm),
            qkv_weight,
            qkv_bias,
            attention_output,  # type: ignore[arg-type]
            b,
            *norm(family.mlp_norm),
            mlp_weight,
            mlp_bias,
            mlp_output,  # type: ignore[arg-type]
            b2,
            b if b2 is None else _plus(b2, b),
        )

    @property
    def bytes(self) -> int:
        """What a decoding step reads at least: of the biases `b`, and `b2` or `b + b2`."""
        return sum(tensor.nbytes for tensor in self._replace(biases=None) if tensor is not None)


class Stage(NamedTuple):
    """The functions of prefill, or of decoding: of each one of `Halves.versions`."""

    attention_input: Callable[[Tensor, Tensor, Tensor | None, Weights], tuple[Tensor, Tensor]]
    attend: Callable[..., Tensor]
    attention_output: Callable[[Tensor, Weights, Tensor | None], Tensor]
    mlp_input: Callable[[Tensor, Tensor, Weights, bool], tuple[Tensor, Tensor]]
    mlp_output: Callable[[Tensor, Tensor | None, Weights, Tensor | None], Tensor]

    def attention(
        self, residual: Tensor, summed: Tensor, carried: Tensor | None, w: Weights, room: Tensor | None, *where: Any
    ) -> tuple[Tensor, Tensor]:
        """`X` and `P_i` [B, T, D], which may be left in `room`, from `R`, `S` and `c`; `where` is what `attend` takes
        beside `qkv`."""
        x, qkv = self.attention_input(residual, summed, carried, w)
        return x, self.attention_output(self.attend(qkv, *where), w, room)

    def mlp(
        self, x: Tensor, attended: Tensor, w: Weights, room: Tensor | None, *, dropped: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """`R` and `S_i` [B, T, D], which may be left in `room`, and `c` [D], from `X` and the sum of the `P_i`; where
        the block is dropped, from `X` and `P_i`. `P_i` may be overwritten, so that both may be in the
        same `room`."""
        residual, hidden = self.mlp_input(x, attended, w, dropped)
        local = self.mlp_output(hidden, attended if dropped else None, w, room)
        return residual, local, w.biases if dropped else w.mlp_bias


TUNED = "tuned"
"""The version of a product that is a Triton kernel chosen by trial, for one token alone."""


class Halves:
    """The functions of one architecture.

    Args:
        family, config: what the model is.
        compiled: by torch.compile; otherwise as they are written.
    """

    def __init__(self, family: Family, config: PretrainedConfig, *, compiled: bool) -> None:
        settings: Any = config
        self.head_size = getattr(config, "head_dim", None) or settings.hidden_size // family.heads(config)[0]
        self.gated = len(family.mlp_input) == 2
        self.activation: Callable[[Tensor], Tensor] = ACT2FN[
            settings.hidden_act if self.gated else settings.activation_function
        ]
        self.eps = getattr(config, "rms_norm_eps", 1e-5)

        def built(f: Callable, **options: Any) -> Any:
            return torch.compile(f, fullgraph=True, dynamic=False, options=options) if compiled else f

        torch._dynamo.config.recompile_limit = 64  # a function has a version for each shape and model
        activated = built(self.activated)

        def plain_output(hidden: Tensor, partial: Tensor | None, w: Weights, room: Tensor | None) -> Tensor:
            if partial is None:
                return _product(activated(hidden), w.mlp_output, room)
            # In place the product's own kernel adds `P_i`; compiled, the sum is one kernel more.
            total = partial.view(-1, partial.shape[-1])  # never a copy: the sum would be lost
            total.addmm_(activated(hidden).flatten(0, 1), w.mlp_output.T)
            return partial

        plain: dict[str, Callable] = {
            "attention_input": built(self.attention_input),
            "attention_output": lambda heads, w, room: _product(heads, w.attention_output, room),
            "mlp_input": built(self.mlp_input),
            "mlp_output": plain_output,
        }

        # One token's products are of a matrix and a vector, and become Triton kernels, fused with what is around them.
        def tuned(f: Callable) -> Any:
            return built(f, coordinate_descent_tuning=True)

        of_tp, added, attention_output = (tuned(f) for f in (self.mlp_input, self.mlp_output, self.attention_output))
        zeros: dict[torch.device, Tensor] = {}

        def tuned_input(x: Tensor, attended: Tensor, w: Weights, dropped: bool) -> tuple[Tensor, Tensor]:
            u, hidden = of_tp(x, attended, w, False)
            return x if dropped else u, hidden

        def tuned_output(hidden: Tensor, partial: Tensor | None, w: Weights, room: Tensor | None) -> Tensor:
            if partial is None:  # an SPD block's very kernel, with nothing to add: which is chosen by trial differs
                device = w.mlp_output.device
                if device not in zeros:
                    zeros[device] = hidden.new_zeros(1, 1, len(w.mlp_output))
                partial = zeros[device]
            return added(hidden, partial, w)

        triton: dict[str, Callable] = {
            "attention_input": tuned(self.attention_input),
            "attention_output": lambda heads, w, room: attention_output(heads, w),
            "mlp_input": tuned_input,
            "mlp_output": tuned_output,
        }
        self.versions: dict[str, dict[str, dict[str, Callable]]] = {
            "prefill": {
                "attend": {
                    "sdpa": built(lambda *given: self._prompt(attention.prompt_by_sdpa, *given)),
                    "flex": built(lambda *given: self._prompt(attention.prompt_by_flex, *given)),
                },
                **{name: {"plain": function} for name, function in plain.items()},
            },
            "decode": {
                "attend": {
                    "reductions": built(lambda *given: self._token(attention.token_by_reductions, *given)),
                    "flex": built(lambda *given: self._token(attention.token_by_flex, *given)),
                },
                **{name: {"plain": function, TUNED: triton[name]} for name, function in plain.items()},
            },
        }
        """Of both phases, function of a `Stage` -> its versions, of which sizes, GPU and luck decide the quickest."""
        if self.head_size < attention.SMALLEST_FLEX_HEAD:
            for phase in self.versions.values():
                del phase["attend"]["flex"]
        self.last, self.likeliest = built(self._last), built(head.likeliest)

    def norm(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """RMSNorm, or LayerNorm where there is a bias."""
        if bias is not None:
            return F.layer_norm(x, weight.shape, weight, bias, self.eps)
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)

    def attention_input(
        self, residual: Tensor, summed: Tensor, carried: Tensor | None, w: Weights
    ) -> tuple[Tensor, Tensor]:
        """`X` [B, T, D]; queries, keys and values [B, T, (H + 2 K) h / N]."""
        x = _plus(residual, carried) + summed
        return x, F.linear(self.norm(x, w.norm1, w.norm1_bias), w.qkv, w.qkv_bias)

    def _split(self, qkv: Tensor, kv_heads: int, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H/N, T, h], keys and values [B, K/N, T, h], with their positions in them."""
        heads = qkv.unflatten(-1, (-1, self.head_size))
        q, k, v = (
            part.transpose(1, 2) for part in heads.split([heads.shape[2] - 2 * kv_heads, kv_heads, kv_heads], dim=2)
        )
        if rope is not None:
            q, k = (_rotated(part, *rope) for part in (q, k))
        return q, k, v

    def _prompt(
        self,
        attend: Callable[[Tensor, Tensor, Tensor, BlockMask], Tensor],
        qkv: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        keys: Tensor,
        values: Tensor,
        causal: BlockMask,
    ) -> Tensor:
        """What the heads find [B, T, H h / N] of the prompt; fills the cache [B, K/N, C, h] from its beginning."""
        q, k, v = self._split(qkv, keys.shape[1], rope)
        keys[:, :, : k.shape[2]] = k
        values[:, :, : v.shape[2]] = v
        return attend(q, k, v, causal).transpose(1, 2).flatten(2)

    def _token(
        self,
        attend: Callable[[Tensor, Tensor, Tensor, Tensor, BlockMask], Tensor],
        qkv: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        keys: Tensor,
        values: Tensor,
        position: Tensor,
        mask: Tensor,
        parts: BlockMask,
    ) -> Tensor:
        """What the heads find [B, 1, H h / N] of the token at `position` [1]; `mask` [C] is True up to it, and `parts`
        are those of `spd.gpu.attention.in_parts`."""
        q, k, v = self._split(qkv, keys.shape[1], rope)
        keys.index_copy_(2, position, k)
        values.index_copy_(2, position, v)
        return attend(q, keys, values, mask, parts).flatten(1).unsqueeze(1)

    @staticmethod
    def attention_output(heads: Tensor, w: Weights) -> Tensor:
        """`P_i` [B, T, D]."""
        return F.linear(heads, w.attention_output)

    def mlp_input(self, x: Tensor, attended: Tensor, w: Weights, dropped: bool) -> tuple[Tensor, Tensor]:
        """`R` [B, T, D] and the MLP's input product [B, T, F/N] or [B, T, 2 F/N], from `X` and the sum of the `P_i`, or
        for a dropped block `P_i`."""
        u = _plus(x, w.attention_bias) + attended
        hidden = F.linear(self.norm(u, w.norm2, w.norm2_bias), w.mlp_input, w.mlp_input_bias)
        return x if dropped else u, hidden

    def activated(self, hidden: Tensor) -> Tensor:
        """What the MLP's output product takes, [B, T, F/N]."""
        if not self.gated:
            return self.activation(hidden)
        gate, up = hidden.chunk(2, dim=-1)
        return self.activation(gate) * up

    def mlp_output(self, hidden: Tensor, partial: Tensor, w: Weights) -> Tensor:
        """`S_i` [B, T, D]; `partial` is `P_i` of an SPD block, and zero of a TP block."""
        return partial + F.linear(self.activated(hidden), w.mlp_output)

    def _last(
        self,
        residual: Tensor,
        summed: Tensor,
        carried: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        part: Tensor,
        first: Tensor,
        mine: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Of the last token the logits [B, V/N] of a rank's `part` of the head, and `spd.gpu.head.candidates`."""
        x = (_plus(residual, carried) + summed)[:, -1]
        logits = F.linear(self.norm(x, weight, bias), part)
        return logits, head.candidates(logits, first, mine)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of [B, heads, T, h] by [T, h]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _product(x: Tensor, weight: Tensor, room: Tensor | None) -> Tensor:
    """`x W'` [B, T, D], in `room` if there is one."""
    if room is None:
        return F.linear(x, weight)
    torch.mm(x.flatten(0, 1), weight.T, out=room.view(-1, len(weight)))
    return room


def _plus(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias
