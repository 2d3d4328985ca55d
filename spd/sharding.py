"""Cuts a transformer block: the model's own Hugging Face layer with the heads and MLP columns of this process's ranks.

Legend: D hidden size, H query heads, K key/value heads, h head size, F MLP width, N ranks (tp_size), n of them in this
process (N virtual ones, or one), B batch, T tokens.

    query rows, attention_output columns   H/N heads a rank
    key_value rows                         K/N heads a rank; when N > K, one head for N/K neighbouring ranks
    mlp_input rows, mlp_output columns     F/N columns a rank
    output biases                          not in the layer: added once, after the sum over ranks
    everything else (norms)                whole, one copy for all ranks of a process

The ranks of a process are neighbours, so each tensor is one piece, and the n ranks' parts of it are equal runs.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig

from spd.checkpoint import Checkpoint
from spd.errors import UserError
from spd.families import Family

Span = tuple[int, int]
"""Half-open range of rows or columns."""

Kind = Literal["query", "key_value", "mlp_input", "attention_output", "mlp_output", "whole"]


def check_tp_size(family: Family, config: PretrainedConfig, tp_size: int) -> None:
    """Raises UserError, with the sizes that would work, unless heads and MLP can be cut for `tp_size` ranks."""
    if fits_tp_size(family, config, tp_size):
        return
    heads, kv_heads = family.heads(config)
    sizes = [str(n) for n in range(1, heads + 1) if fits_tp_size(family, config, n)]
    raise UserError(
        f"tp_size={tp_size} does not cut this model evenly: it has {heads} heads, {kv_heads} key/value heads and an "
        f"MLP width of {family.mlp_width(config)}. Sizes that do: {', '.join(sizes)}."
    )


def fits_tp_size(family: Family, config: PretrainedConfig, n: int) -> bool:
    """Whether heads and MLP can be cut for `n` ranks."""
    heads, kv_heads = family.heads(config)
    kv_fit = n > 0 and (kv_heads % n == 0 or n % kv_heads == 0)
    return kv_fit and heads % n == 0 and family.mlp_width(config) % n == 0


@dataclass(frozen=True)
class Cut:
    """The part of every block that the ranks of one process hold."""

    family: Family
    ranks: int
    """n."""
    heads: Span
    kv_heads: Span
    width: Span
    head_size: int

    @classmethod
    def of_ranks(cls, family: Family, config: PretrainedConfig, tp_size: int, ranks: list[int]) -> "Cut":
        """Rank `i` takes heads `[iH/N, (i+1)H/N)`, the key/value heads these attend to, and as much of the MLP."""
        heads, kv_heads = family.heads(config)
        head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        first, last = _share(heads, tp_size, ranks)
        group = heads // kv_heads
        return cls(
            family,
            ranks=len(ranks),
            heads=(first, last),
            kv_heads=(first // group, (last - 1) // group + 1),
            width=_share(family.mlp_width(config), tp_size, ranks),
            head_size=head_size,
        )

    def kind(self, parameter: str) -> Kind:
        """How a parameter of a layer, such as `self_attn.q_proj.weight`, is cut."""
        module = parameter.rpartition(".")[0]
        if module == self.family.query:
            return "query"
        if module in self.family.key_value:
            return "key_value"
        if module in self.family.mlp_input:
            return "mlp_input"
        if module == self.family.attention_output:
            return "attention_output"
        return "mlp_output" if module == self.family.mlp_output else "whole"

    def span(self, kind: Kind) -> Span | None:
        """The rows (or columns, for the output layers) held of a parameter of that kind; None is all."""
        if kind == "whole":
            return None
        if kind in ("mlp_input", "mlp_output"):
            return self.width
        first, last = self.kv_heads if kind == "key_value" else self.heads
        return first * self.head_size, last * self.head_size


def _share(total: int, n: int, ranks: list[int]) -> Span:
    return ranks[0] * total // n, (ranks[-1] + 1) * total // n


def is_output(kind: Kind) -> bool:
    """Whether a layer of that kind is cut by columns and summed over ranks."""
    return kind in ("attention_output", "mlp_output")


class Source(Protocol):
    """Where the tensors of one layer are read from, by their name in the layer and slice by slice."""

    def read(self, name: str, rows: slice = ..., columns: slice | None = ...) -> Tensor:
        """The given rows and columns of a tensor, in memory of its own."""


class InMemory:
    """A `Source` of whole tensors."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def read(self, name: str, rows: slice = slice(None), columns: slice | None = None) -> Tensor:
        """The given rows and columns of a tensor, copied."""
        tensor = self.tensors[name]
        return (tensor[rows] if columns is None else tensor[rows, columns]).clone()


class InCheckpoint:
    """A `Source` of one layer's tensors in a checkpoint, where their names begin with `prefix`."""

    def __init__(self, checkpoint: Checkpoint, prefix: str) -> None:
        self.checkpoint, self.prefix = checkpoint, prefix

    def read(self, name: str, rows: slice = slice(None), columns: slice | None = None) -> Tensor:
        """The given rows and columns of a tensor; nothing else of it is read."""
        return self.checkpoint.read(f"{self.prefix}{name}", rows, columns)


class RankRows(nn.Linear):
    """A linear layer whose output features are cut over `n` ranks.

    [B, T, D] -> [B, T, F] for an input that all ranks share; [n, B, T, D] -> [n, B, T, F/n] for one input a rank.
    """

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0] if x.ndim == 4 else 1
        if n == 1:
            return super().forward(x)
        weight = self.weight.view(n, -1, x.shape[-1])
        y = x.flatten(1, 2) @ weight.transpose(1, 2)
        y = y if self.bias is None else y + self.bias.view(n, 1, -1)
        return y.unflatten(1, x.shape[1:3])


class RankColumns(nn.Linear):
    """An output layer without bias, whose input features are cut over `n` ranks: each rank gives a partial result.

    Hugging Face's code calls it and gets its input back. The product is taken by whoever wants it, rank by rank or
    summed, of the input features of all these ranks, [B, T, F] or [n, B, T, F/n].
    """

    def forward(self, x: Tensor) -> Tensor:
        return x

    def partials(self, x: Tensor, n: int) -> Tensor:
        """[n, B, T, D]."""
        if n == 1:
            return self.total(x).unsqueeze(0)
        its = x if x.ndim == 4 else x.unflatten(-1, (n, -1)).permute(2, 0, 1, 3)
        weight = self.weight.unflatten(1, (n, -1)).permute(1, 2, 0)  # [n, F/n, D]
        return (its.flatten(1, 2) @ weight).unflatten(1, its.shape[1:3])

    def total(self, x: Tensor) -> Tensor:
        """The sum of the partial results, [B, T, D]."""
        return F.linear(x if x.ndim == 3 else x.permute(1, 2, 0, 3).flatten(2), self.weight)


class BlockReader:
    """Makes the layers of single blocks.

    Args:
        family, config: what the model is.
        layer_type: the Hugging Face decoder layer class.
        cut: the part that this process holds.
    """

    def __init__(self, family: Family, config: PretrainedConfig, layer_type: type[nn.Module], cut: Cut) -> None:
        self.family, self.config, self.layer_type, self.cut = family, config, layer_type, cut

    def read(
        self, block: int, source: Source, dtype: torch.dtype, device: torch.device
    ) -> tuple[nn.Module, dict[Kind, nn.Parameter]]:
        """The layer with this process's slices only, and the output biases [D] there are, by kind."""
        cut = self.cut
        with torch.device("meta"):
            layer = self.layer_type(self.config, layer_idx=block)
            for name, module in list(layer.named_modules()):
                if by_rank := _BY_RANK.get(cut.kind(f"{name}.weight")):
                    layer.set_submodule(name, by_rank(1, 1, bias=module.bias is not None))
        biases: dict[Kind, nn.Parameter] = {}
        for name, _ in list(layer.named_parameters()):
            module_name, _, leaf = name.rpartition(".")
            module, kind = layer.get_submodule(module_name), cut.kind(name)
            output_bias = is_output(kind) and leaf == "bias"
            span = None if output_bias else cut.span(kind)
            part = slice(None) if span is None else slice(*span)
            columns = is_output(kind) and not output_bias
            tensor = source.read(name, slice(None), part) if columns else source.read(name, part)
            parameter = nn.Parameter(tensor.to(device, dtype), requires_grad=False)
            if output_bias:
                module.register_parameter("bias", None)
                biases[kind] = parameter
                continue
            module.register_parameter(leaf, parameter)
            if isinstance(module, nn.Linear) and leaf == "weight":
                module.out_features, module.in_features = parameter.shape
        attention: Any = layer.get_submodule("self_attn")
        self.family.set_local_heads(attention, cut.heads[1] - cut.heads[0], cut.kv_heads[1] - cut.kv_heads[0])
        return layer, biases


_BY_RANK: dict[Kind, type[nn.Linear]] = {
    "mlp_input": RankRows,
    "attention_output": RankColumns,
    "mlp_output": RankColumns,
}
