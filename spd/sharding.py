"""Cuts a transformer block into shards: the model's own Hugging Face layer with fewer heads and a narrower MLP.

Legend: D hidden size, H query heads, K key/value heads, h head size, F MLP width, N ranks (tp_size), L blocks.

    query rows, attention_output columns   H/N heads a rank
    key_value rows                         K/N heads a rank; when N > K, one head on N/K neighbouring ranks
    mlp_input rows, mlp_output columns     F/N columns a rank
    output biases                          in no shard: added once, after the sum over ranks
    everything else (norms)                whole, one copy for all ranks of a process
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from spd.checkpoint import Checkpoint
from spd.errors import UserError
from spd.families import Family

Span = tuple[int, int]
"""Half-open range of rows or columns."""

Kind = Literal["query", "key_value", "mlp_input", "attention_output", "mlp_output", "whole"]


def check_tp_size(family: Family, config: PretrainedConfig, tp_size: int) -> None:
    """Raises UserError, with the sizes that would work, unless heads and MLP can be cut for `tp_size` ranks."""
    if _fits(family, config, tp_size):
        return
    heads, kv_heads = family.heads(config)
    sizes = [str(n) for n in range(1, heads + 1) if _fits(family, config, n)]
    raise UserError(
        f"tp_size={tp_size} does not cut this model evenly: it has {heads} heads, {kv_heads} key/value heads and an "
        f"MLP width of {family.mlp_width(config)}. Sizes that do: {', '.join(sizes)}."
    )


def _fits(family: Family, config: PretrainedConfig, n: int) -> bool:
    heads, kv_heads = family.heads(config)
    kv_fit = n > 0 and (kv_heads % n == 0 or n % kv_heads == 0)
    return kv_fit and heads % n == 0 and family.mlp_width(config) % n == 0


@dataclass(frozen=True)
class Cut:
    """The part of every block that one rank holds."""

    family: Family
    heads: Span
    kv_heads: Span
    width: Span
    head_size: int

    @classmethod
    def of_rank(cls, family: Family, config: PretrainedConfig, tp_size: int, rank: int) -> "Cut":
        """Rank `i` takes heads `[iH/N, (i+1)H/N)`, the key/value heads these attend to, and as much of the MLP."""
        heads, kv_heads = family.heads(config)
        head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        first, last = _share(heads, tp_size, rank)
        group = heads // kv_heads
        return cls(
            family,
            heads=(first, last),
            kv_heads=(first // group, (last - 1) // group + 1),
            width=_share(family.mlp_width(config), tp_size, rank),
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
        """The rows (or columns, for the output layers) this rank holds of a parameter of that kind; None is all."""
        if kind == "whole":
            return None
        if kind in ("mlp_input", "mlp_output"):
            return self.width
        first, last = self.kv_heads if kind == "key_value" else self.heads
        return first * self.head_size, last * self.head_size


def _share(total: int, n: int, rank: int) -> Span:
    return rank * total // n, (rank + 1) * total // n


def is_output(kind: Kind) -> bool:
    """Whether a layer of that kind is cut by columns and summed over ranks."""
    return kind in ("attention_output", "mlp_output")


class Source(Protocol):
    """Where the tensors of one layer are read from, by their name in the layer and slice by slice."""

    def read(self, name: str, rows: slice = ..., columns: slice | None = ...) -> Tensor:
        """The given rows and columns of a tensor, in memory of its own."""


class InMemory:
    """A `Source` of whole tensors, as `merge` gives them."""

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


class BlockReader:
    """Makes the shards of single blocks.

    Args:
        family, config: what the model is.
        layer_type: the Hugging Face decoder layer class.
        cuts: one for each rank of this process.
    """

    def __init__(self, family: Family, config: PretrainedConfig, layer_type: type[nn.Module], cuts: list[Cut]) -> None:
        self.family, self.config, self.layer_type, self.cuts = family, config, layer_type, cuts

    def read(
        self, block: int, source: Source, dtype: torch.dtype, device: torch.device
    ) -> tuple[list[nn.Module], dict[Kind, nn.Parameter]]:
        """The layer of every local rank with that rank's slices only, and the output biases [D] there are, by kind.

        Ranks that hold the same slice (norms, repeated key/value heads) share one parameter. The cache slot of local
        rank `r` is `block + r L`: slot 0 to L-1 is what Hugging Face expects of an ordinary model.
        """

        def parameter(name: str, kind: Kind, span: Span | None) -> nn.Parameter:
            part = slice(None) if span is None else slice(*span)
            tensor = source.read(name, slice(None), part) if is_output(kind) else source.read(name, part)
            return nn.Parameter(tensor.to(device, dtype), requires_grad=False)

        read: dict[tuple[str, Span | None], nn.Parameter] = {}
        shards: list[nn.Module] = []
        biases: dict[Kind, nn.Parameter] = {}
        for position, cut in enumerate(self.cuts):
            with torch.device("meta"):
                layer = self.layer_type(self.config, layer_idx=block)
            for name, _ in list(layer.named_parameters()):
                kind = cut.kind(name)
                module_name, _, leaf = name.rpartition(".")
                module = layer.get_submodule(module_name)
                if is_output(kind) and leaf == "bias":
                    module.register_parameter("bias", None)
                    if kind not in biases:
                        biases[kind] = parameter(name, "whole", None)
                    continue
                key = (name, cut.span(kind))
                if key not in read:
                    read[key] = parameter(name, kind, key[1])
                module.register_parameter(leaf, read[key])
                if isinstance(module, nn.Linear) and leaf == "weight":
                    module.out_features, module.in_features = module.weight.shape
            attention: Any = layer.get_submodule("self_attn")
            attention.layer_idx = block + position * self.config.num_hidden_layers
            self.family.set_local_heads(attention, cut.heads[1] - cut.heads[0], cut.kv_heads[1] - cut.kv_heads[0])
            shards.append(layer)
        return shards, biases


def merge(shards: list[nn.Module], biases: dict[Kind, nn.Parameter], cuts: list[Cut]) -> dict[str, Tensor]:
    """The whole layer's tensors from the shards of all ranks, by their name in the layer: the inverse of cutting."""
    family = cuts[0].family
    names: dict[Kind, str] = {"attention_output": family.attention_output, "mlp_output": family.mlp_output}
    merged = {f"{names[kind]}.bias": bias.data for kind, bias in biases.items()}
    for name, parameter in shards[0].named_parameters():
        kind = cuts[0].kind(name)
        if kind == "whole":
            merged[name] = parameter.data
            continue
        # Repeated key/value heads: one copy of each.
        parts = {cut.span(kind): shard.get_parameter(name).data for cut, shard in zip(cuts, shards, strict=True)}
        merged[name] = torch.cat(list(parts.values()), dim=1 if is_output(kind) else 0)
    return merged
