"""A Hugging Face causal language model whose blocks are tensor parallel and can drop sync points.

Legend: B batch, T tokens, V vocabulary, D hidden size, L blocks, N ranks.
"""

import functools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Cache,
    DynamicLayer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from spd.block import Block
from spd.checkpoint import Checkpoint, fingerprint, parse_dtype, read_config, read_tokenizer, resolve
from spd.errors import UserError
from spd.families import Family, family_of
from spd.plan import PLAN_FILE, DropPlan
from spd.ranks import ProcessRanks, Ranks, VirtualRanks
from spd.sharding import BlockReader, Cut, check_tp_size, merge


def load(
    path: str | Path,
    tp_size: int | None = None,
    ranks: str = "virtual",
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> "TensorParallelLM":
    """Loads a checkpoint for `tp_size` tensor-parallel ranks, with nothing dropped.

    A folder written by `TensorParallelLM.save_pretrained` comes back as it was: with its plan's tp size and its blocks
    dropped.

    Args:
        path: a Hugging Face folder or hub id with safetensors weights.
        tp_size: N; by default that of the folder's plan, or 1.
        ranks: "virtual" for all N ranks in this process, "processes" for one a process under torchrun.
        dtype: float32, float16 or bfloat16; by default the checkpoint's.
        device: by default cpu for virtual ranks and for processes where there is no GPU, else the process's GPU.

    Raises:
        UserError: the folder is incomplete or damaged, the family is unknown, tp_size does not cut the model
            evenly, the folder's plan is for another tp size, or `ranks="processes"` without torchrun.
    """
    folder = resolve(path)
    config = read_config(folder)
    family = family_of(config)
    plan = DropPlan.load(folder / PLAN_FILE) if (folder / PLAN_FILE).is_file() else None
    if plan is not None and tp_size not in (None, plan.tp_size):
        if plan.dropped:
            raise UserError(
                f"{folder} was prepared for tp_size={plan.tp_size}, not {tp_size}; prepare the original again."
            )
        plan = None  # nothing was done to the model
    if tp_size is None:
        tp_size = plan.tp_size if plan else 1
    check_tp_size(family, config, tp_size)
    if ranks not in ("virtual", "processes"):
        raise UserError(f"ranks={ranks!r} is not known; write 'virtual' or 'processes'.")
    where = _device(device, ranks)
    # The checkpoint is looked at before any process group is made: a bad one should fail on every rank by itself.
    checkpoint = Checkpoint(folder)
    who: Ranks = VirtualRanks(tp_size) if ranks == "virtual" else ProcessRanks(tp_size, where)
    model = TensorParallelLM(checkpoint, config, family, who, parse_dtype(dtype, config), where)
    if plan is not None:
        plan.check_fits(model)
        model.plan = plan
        model.drop(plan.dropped)
    return model


def _device(device: str | torch.device | None, ranks: str) -> torch.device:
    if device is None:
        device = "cuda" if ranks == "processes" and torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device={device!r} is not known; write cpu, cuda or cuda:1.") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError("device='cuda' but torch sees no GPU here; write device='cpu'.")
        if ranks == "processes":
            device = torch.device("cuda", torch.distributed.get_node_local_rank(fallback_rank=0))
            torch.cuda.set_device(device)
    return device


class TensorParallelLM(nn.Module):
    """The model over the ranks of this process: Hugging Face's own, with `Block`s in the place of its layers.

    Embeddings, final norm and head are whole on every rank. Use `load` to make one.

    Attributes:
        hf: the Hugging Face model; its `generate`, caches and masks work as ever.
        blocks: its L blocks.
        plan: what was done to the model, when it was prepared by a plan.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: PretrainedConfig,
        family: Family,
        ranks: Ranks,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.folder, self.config, self.family, self.ranks = checkpoint.folder, config, family, ranks
        self.plan: DropPlan | None = None
        with torch.device("meta"):
            self.hf = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        self.hf.eval()
        checkpoint.expect({name: tuple(weight.shape) for name, weight in self.hf.named_parameters()})
        self._load_outside_blocks(checkpoint, dtype, device)
        self._load_blocks(checkpoint, dtype, device)
        if (checkpoint.folder / "generation_config.json").is_file():
            self.hf.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)

    def _load_outside_blocks(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        inside = f"{self.family.decoder}.layers."
        for name, _ in list(self.hf.named_parameters()):
            if not name.startswith(inside):
                module_name, _, leaf = name.rpartition(".")
                tensor = checkpoint.read(name).to(device, dtype)
                module = self.hf.get_submodule(module_name)
                module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
        if self.config.tie_word_embeddings:
            self.hf.get_output_embeddings().weight = self.hf.get_input_embeddings().weight
        decoder = self.decoder
        if hasattr(decoder, "rotary_emb"):  # its frequencies are computed, not stored
            decoder.rotary_emb = type(decoder.rotary_emb)(self.config).to(device)

    def _load_blocks(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self.cuts = [Cut.of_rank(self.family, self.config, self.tp_size, rank) for rank in self.ranks.local]
        layer_type = type(self.decoder.layers[0])
        reader = BlockReader(checkpoint, self.family, self.hf.config, layer_type, self.cuts, dtype, device)
        blocks = []
        for i in range(self.num_blocks):
            shards, biases = reader.read(i)
            biases_of = biases.get("attention_output"), biases.get("mlp_output")
            blocks.append(Block(shards, self.family, self.ranks, *biases_of))
        self.decoder.layers = nn.ModuleList(blocks)
        if len(self.cuts) > 1:
            for block in self.blocks:
                block.register_forward_pre_hook(self._make_room_in_cache, with_kwargs=True)

    def _make_room_in_cache(self, block: nn.Module, args: tuple, inputs: dict[str, Any]) -> None:
        # Hugging Face makes a cache with one slot a block; every virtual rank needs its own (see BlockReader.shards).
        cache: Cache | None = inputs.get("past_key_values")
        if cache is not None:
            cache.layers.extend(DynamicLayer() for _ in range(self.num_blocks * len(self.cuts) - len(cache.layers)))

    @property
    def decoder(self) -> Any:
        """The module that holds embeddings, blocks and final norm."""
        return self.hf.get_submodule(self.family.decoder)

    @property
    def blocks(self) -> list[Block]:
        """The L blocks, first to last."""
        return list(self.decoder.layers)

    @property
    def num_blocks(self) -> int:
        """L."""
        return self.config.num_hidden_layers

    @property
    def tp_size(self) -> int:
        """N."""
        return self.ranks.size

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.hf.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' type."""
        return self.hf.get_input_embeddings().weight.dtype

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer."""
        return read_tokenizer(self.folder)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the checkpoint the model was loaded from; reads all of its files."""
        return fingerprint(self.folder)

    @property
    def dropped(self) -> tuple[int, ...]:
        """The dropped blocks, ascending."""
        return tuple(i for i, block in enumerate(self.blocks) if block.dropped)

    def drop(self, blocks: Sequence[int]) -> None:
        """Drops exactly these blocks' attention sync points; `drop([])` restores all.

        Raises:
            UserError: a block that does not exist.
        """
        strangers = sorted(set(blocks) - set(range(self.num_blocks)))
        if strangers:
            raise UserError(f"There is no block {strangers[0]}; this model's blocks are 0 to {self.num_blocks - 1}.")
        for i, block in enumerate(self.blocks):
            block.dropped = i in blocks
        if self.plan is not None and tuple(self.plan.dropped) != self.dropped:
            self.plan = None  # it no longer says what the model is

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] of token ids [B, T]; `attention_mask` [B, T] has 0 at padding, on either side."""
        position_ids = None
        if attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
        output = self.hf(input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)
        return output.logits

    def embed(self, input_ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The first block's input [B, T, D] and what every block needs beside it, to go through `blocks` one by one.

        For unpadded token ids [B, T]: attention is causal and there is no mask.
        """
        decoder = self.decoder
        x = decoder.embed_tokens(input_ids)
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        inputs: dict[str, Any] = {"attention_mask": None, "position_ids": position_ids}
        if hasattr(decoder, "rotary_emb"):
            return x, inputs | {"position_embeddings": decoder.rotary_emb(x, position_ids)}
        if decoder.project_in is not None:
            x = decoder.project_in(x)
        return x + decoder.embed_positions(None, position_ids=position_ids), inputs

    def head(self, x: Tensor) -> Tensor:
        """Logits [B, T, V] of the last block's output [B, T, D]."""
        decoder = self.decoder
        norm = getattr(decoder, self.family.final_norm)
        x = x if norm is None else norm(x)
        if getattr(decoder, "project_out", None) is not None:
            x = decoder.project_out(x)
        return self.hf.get_output_embeddings()(x)

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Token ids [B, T + new]; greedy unless `do_sample=True`. Options are those of Hugging Face's `generate`.

        Raises:
            UserError: sampling with one rank a process.
        """
        if options.get("do_sample") and not isinstance(self.ranks, VirtualRanks):
            raise UserError("Real ranks would each draw another token; sample with ranks='virtual', or greedily.")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        options = {"do_sample": False} | options
        return self.hf.generate(input_ids, attention_mask=attention_mask, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes an ordinary Hugging Face checkpoint of unchanged shapes, its tokenizer, and the plan `load` goes by.

        Raises:
            UserError: the path is a file or a folder that holds something, or this process has one rank's shard only.
        """
        target = Path(folder)
        if not isinstance(self.ranks, VirtualRanks):
            raise UserError("This process holds one rank's shard only; load with ranks='virtual' to save the model.")
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(f"{target} is a file or not empty; give a new folder.")
        partial = target.with_name(f".{target.name}.partial")  # renamed when complete: no half-written model
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            save_torch_state_dict(self._merged(), partial, metadata={"format": "pt"})
            self.hf.config.save_pretrained(partial)
            self.hf.generation_config.save_pretrained(partial)
            self.tokenizer.save_pretrained(partial)
            (self.plan or DropPlan.by_hand(self)).save(partial / PLAN_FILE)
            partial.replace(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _merged(self) -> dict[str, Tensor]:
        inside = f"{self.family.decoder}.layers."
        state = {name: p.data for name, p in self.hf.named_parameters() if not name.startswith(inside)}
        for i, block in enumerate(self.blocks):
            layer = merge(list(block.shards), self.cuts)
            for module, bias in (
                (self.family.attention_output, block.attention_bias),
                (self.family.mlp_output, block.mlp_bias),
            ):
                if bias is not None:
                    layer[f"{module}.bias"] = bias.data
            state |= {f"{inside}{i}.{name}": tensor.contiguous() for name, tensor in layer.items()}
        return state
