"""Where each architecture keeps the parts of a transformer block: one row a family.

A family is added by one row here, if its blocks are pre-norm with one attention and one MLP, each ending in a linear
layer whose input is split over ranks. Row names are paths inside a Hugging Face decoder layer. `latency=gpu` has
functions of its own (`spd.gpu.halves`), and refuses a layer with parts that they do not use.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from spd.errors import UserError


def _gated_mlp(layer: Any, x: Tensor) -> Tensor:
    return layer.mlp(x)


def _opt_mlp(layer: Any, x: Tensor) -> Tensor:
    return layer.fc2(layer.activation_fn(layer.fc1(x)))


@dataclass(frozen=True)
class Family:
    """How the linear layers of one decoder layer are cut for `N` ranks, and how its MLP is called.

    The defaults are those of LLaMA and everything built like it.
    """

    decoder: str = "model"
    """Path of the module that holds the embeddings, the blocks (`layers`) and the final norm."""
    final_norm: str = "norm"
    """Name of the final norm inside the decoder."""
    attention_norm: str = "input_layernorm"
    """norm1: applied to the block's input `X`."""
    mlp_norm: str = "post_attention_layernorm"
    """norm2: applied to the attention residual `U`."""
    query: str = "self_attn.q_proj"
    """Rows are cut by query head."""
    key_value: tuple[str, ...] = ("self_attn.k_proj", "self_attn.v_proj")
    """Rows are cut by key/value head; repeated on several ranks when `N > K`."""
    attention_output: str = "self_attn.o_proj"
    """Columns are cut by query head; its bias `b` is added once, after the sum over ranks."""
    mlp_input: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """Rows are cut by MLP width."""
    mlp_output: str = "mlp.down_proj"
    """Columns are cut by MLP width; its bias `b2` is added once, after the sum over ranks."""
    mlp: Callable[[Any, Tensor], Tensor] = field(default=_gated_mlp)
    """Calls the MLP of a layer, without norm or residual; of a layer that is cut for ranks, without its output product:
    [B, T, D] -> [B, T, D] or [B, T, F]."""
    width: str = "intermediate_size"
    """Name of the MLP width `F` in the Hugging Face config."""

    def heads(self, config: PretrainedConfig) -> tuple[int, int]:
        """`(H, K)`: query heads and key/value heads."""
        heads = config.num_attention_heads
        return heads, getattr(config, "num_key_value_heads", None) or heads

    def mlp_width(self, config: PretrainedConfig) -> int:
        """`F`, the MLP width of the whole model."""
        return getattr(config, self.width)

    def set_local_heads(self, attention: Any, heads: int, kv_heads: int) -> None:
        """Tells a Hugging Face attention module how many heads are left in it."""
        if hasattr(attention, "num_heads"):  # OPT views by it; the others infer the count from the weights
            attention.num_heads = heads
        if hasattr(attention, "num_key_value_groups"):  # changes when key/value heads are repeated
            attention.num_key_value_groups = heads // kv_heads


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "qwen2": Family(),
    "opt": Family(
        decoder="model.decoder",
        final_norm="final_layer_norm",
        attention_norm="self_attn_layer_norm",
        mlp_norm="final_layer_norm",
        attention_output="self_attn.out_proj",
        mlp_input=("fc1",),
        mlp_output="fc2",
        mlp=_opt_mlp,
        width="ffn_dim",
    ),
}
"""`model_type` of the Hugging Face config -> its row."""


def check_known(model_type: str | None) -> None:
    """Raises UserError, with the families there are and how to add one, unless the table has the family."""
    if model_type not in FAMILIES:
        raise UserError(
            f"The model family {model_type!r} is not known; known are {', '.join(sorted(FAMILIES))}. "
            "A pre-norm decoder is added by one row in spd/families.py that names its norms and linear layers."
        )


def family_of(config: PretrainedConfig) -> Family:
    """The row of a model's architecture.

    Raises:
        UserError: the family is not in the table, or the checkpoint uses a variant the method is not defined for.
    """
    check_known(config.model_type)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            "This checkpoint is quantised (quantization_config in its config.json), and its scales would be ignored; "
            "give the float32, float16 or bfloat16 original."
        )
    if config.model_type == "opt" and not config.do_layer_norm_before:
        raise UserError(
            "This OPT checkpoint normalises after each residual (do_layer_norm_before=false, as OPT-350m does); "
            "the SPD block is defined for pre-norm blocks only. Every other OPT size works."
        )
    if "sliding_attention" in (getattr(config, "layer_types", None) or []):
        raise UserError(
            "This checkpoint uses sliding-window attention (layer_types in its config.json), which is not supported; "
            "set use_sliding_window=false in config.json if the prompts are shorter than the window."
        )
    return FAMILIES[config.model_type]
