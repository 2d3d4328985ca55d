"""A Hugging Face causal language model whose blocks are tensor parallel and can drop sync points.

Legend: B batch, T tokens, V vocabulary, D hidden size, L blocks, N ranks.
"""

import functools
import shutil
from collections.abc import Iterable, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Cache,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from spd.block import Block
from spd.checkpoint import Checkpoint, fingerprint, read_tokenizer
from spd.errors import UserError
from spd.families import Family
from spd.plan import PLAN_FILE, DropPlan
from spd.ranks import Ranks, VirtualRanks
from spd.sharding import BlockReader, Cut, InCheckpoint, InMemory, Source
from spd.strategies.correction import CORRECTION_FILE, Correction, TokenBefore

_AGAIN = "copy the folder again or prepare the model again"


class TensorParallelLM(nn.Module):
    """The model over the ranks of this process: Hugging Face's own, with `Block`s in the place of its layers.

    Embeddings, final norm and head are whole on every rank. Use `load` to make one.

    Attributes:
        hf: the Hugging Face model; its `generate`, caches and masks work as ever.
        blocks: its L blocks.
        outcomes: treated block -> what came of it, whether it is dropped at present or not.
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
        self.checkpoint, self.folder = checkpoint, checkpoint.folder
        self.config, self.family, self.ranks = config, family, ranks
        self.plan: DropPlan | None = None
        with torch.device("meta"):
            self.hf = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        self.hf.eval()
        checkpoint.expect({name: tuple(weight.shape) for name, weight in self.hf.named_parameters()})
        self._load_outside_blocks(checkpoint, dtype, device)
        self._load_blocks(dtype, device)
        if (checkpoint.folder / "generation_config.json").is_file():
            self.hf.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)

    def _load_outside_blocks(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        for name, _ in list(self.hf.named_parameters()):
            if not name.startswith(self._layers):
                module_name, _, leaf = name.rpartition(".")
                tensor = checkpoint.read(name).to(device, dtype)
                module = self.hf.get_submodule(module_name)
                module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
        if self.config.tie_word_embeddings:
            self.hf.get_output_embeddings().weight = self.hf.get_input_embeddings().weight
        decoder = self.decoder
        if hasattr(decoder, "rotary_emb"):  # its frequencies are computed, not stored
            decoder.rotary_emb = type(decoder.rotary_emb)(self.config).to(device)

    def _load_blocks(self, dtype: torch.dtype, device: torch.device) -> None:
        self.cut = Cut.of_ranks(self.family, self.config, self.tp_size, self.ranks.local)
        layer_type = type(self.decoder.layers[0])
        self._reader = BlockReader(self.family, self.hf.config, layer_type, self.cut)
        self._recovered: dict[int, Block] = {}
        self._original_elsewhere: set[int] = set()
        self.outcomes: dict[int, dict[str, Any]] = {}
        blocks = [self.read_block(i, dtype=dtype, device=device) for i in range(self.num_blocks)]
        self.decoder.layers = nn.ModuleList(blocks)

    def read_block(
        self,
        i: int,
        tensors: dict[str, Tensor] | None = None,
        correction: Correction | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> Block:
        """A new block `i` for the ranks of this process, from the checkpoint; the model itself stays as it is.

        Args:
            tensors: the layer's whole tensors by their names in it, to be used instead of the checkpoint's.
            correction: of the block while it is dropped.
            dtype, device: by default the model's.
        """
        source: Source = InCheckpoint(self.checkpoint, f"{self._layers}{i}.") if tensors is None else InMemory(tensors)
        layer, biases = self._reader.read(i, source, dtype or self.dtype, device or self.device)
        biases_of = biases.get("attention_output"), biases.get("mlp_output")
        block = Block(layer, self.family, self.ranks, *biases_of, correction)
        if correction is not None and correction.down_b is not None:
            correction.cache_slot = self.num_blocks + i
            block.register_forward_pre_hook(self._make_room_in_cache, with_kwargs=True)
        return block

    def layer_tensors(self, block: Block) -> dict[str, Tensor]:
        """The whole tensors of a block of all ranks, by their names in the Hugging Face layer."""
        names, biases = self.family, (block.attention_bias, block.mlp_bias)
        outputs = zip((names.attention_output, names.mlp_output), biases, strict=True)
        found = {f"{name}.bias": bias.data for name, bias in outputs if bias is not None}
        return found | {name: parameter.data for name, parameter in block.layer.named_parameters()}

    @property
    def _layers(self) -> str:
        return f"{self.family.decoder}.layers."

    def _make_room_in_cache(self, block: nn.Module, args: tuple, inputs: dict[str, Any]) -> None:
        # A cache has one slot a block (one without a config makes them when first needed), and behind these those of
        # corrections that look a token back.
        cache: Cache | None = inputs.get("past_key_values")
        if cache is not None:
            if (layer := cache.layer_class_to_replicate) is not None:
                cache.layers.extend(layer() for _ in range(self.num_blocks - len(cache.layers)))
            cache.layers.extend(TokenBefore() for _ in range(2 * self.num_blocks - len(cache.layers)))

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
            UserError: something else than numbers of blocks, or a block that does not exist.
        """
        if not isinstance(blocks, Iterable) or not all(isinstance(block, Integral) for block in blocks):
            raise UserError(
                f"drop takes a list of blocks by number, as in drop([0, 3]), not {blocks!r}; "
                "a fraction is for spd.make_plan(report, drop=0.5)."
            )
        strangers = sorted(set(blocks) - set(range(self.num_blocks)))
        if strangers:
            raise UserError(f"There is no block {strangers[0]}; this model's blocks are 0 to {self.num_blocks - 1}.")
        lost = sorted(self._original_elsewhere - set(blocks))
        if lost:
            raise UserError(
                f"Block {lost[0]} of {self.folder} was distilled to run dropped, and its original weights are not "
                "there any more; load the original model to run it undropped."
            )
        for i, block in enumerate(self.blocks):
            recovered = self._recovered.get(i)
            if recovered is not None and (recovered is block) != (i in blocks):
                # Its original is not kept beside it: a model should not need the memory of two.
                self.decoder.layers[i] = recovered if i in blocks else self.read_block(i)
        for i, block in enumerate(self.blocks):
            block.dropped = i in blocks
        if self.plan is not None and tuple(self.plan.dropped) != self.dropped:
            self.plan = None  # it no longer says what the model is

    def take_over(self, plan: DropPlan) -> None:
        """Applies the plan that was saved with this model's weights."""
        corrected = {i for i, outcome in plan.outcomes.items() if "correction" in outcome["kept"].split("+")}
        if corrected:
            self.load_corrections(self.folder / CORRECTION_FILE)
            if without := sorted(i for i in corrected if self.blocks[i].correction is None):
                raise UserError(
                    f"{self.folder / CORRECTION_FILE} lacks the correction of block {without[0]}; {_AGAIN}."
                )
        self.outcomes = dict(plan.outcomes)
        self._original_elsewhere = plan.distilled
        self.drop(plan.dropped)
        self.plan = plan

    def recover(self, i: int, block: Block, outcome: dict[str, Any]) -> None:
        """Installs `block` as what block `i` is while it is dropped, and drops it; undropped it is the original again.

        `outcome` is what a plan says of it (`DropPlan.outcomes`).
        """
        self.outcomes[i] = outcome
        self._recovered[i] = self.decoder.layers[i] = block
        block.dropped = True

    def forget(self) -> None:
        """Takes back what `recover` did: the original blocks, nothing dropped."""
        self.drop([])
        self._recovered.clear()
        self.outcomes.clear()

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

    @property
    def final_norm(self) -> nn.Module:
        """What the last block's output passes through before the head."""
        return getattr(self.decoder, self.family.final_norm) or nn.Identity()

    def head(self, x: Tensor) -> Tensor:
        """Logits [B, T, V] of the last block's output [B, T, D]."""
        decoder, x = self.decoder, self.final_norm(x)
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
            self.save_corrections(partial / CORRECTION_FILE)
            partial.replace(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def save_corrections(self, file: Path) -> None:
        """Writes the corrections of the dropped blocks, of all ranks; nothing where there are none."""
        tensors = {
            f"{i}.{name}": tensor.contiguous()
            for i in self.dropped
            if (correction := self.blocks[i].correction) is not None
            for name, tensor in correction.tensors().items()
        }
        if tensors:
            save_file(tensors, file)

    def load_corrections(self, file: Path) -> None:
        """Reads what `save_corrections` wrote, for the ranks of this process; to be used by blocks while dropped.

        Raises:
            UserError: the file is missing or damaged.
        """
        for i in range(self.num_blocks):
            try:
                correction = Correction.load(file, i, self.ranks.local, self.dtype, self.device)
            except (OSError, SafetensorError) as error:
                raise UserError(f"{file} is missing or damaged ({error}); {_AGAIN}.") from error
            if correction is not None:
                self.decoder.layers[i] = self.read_block(i, correction=correction)

    def _merged(self) -> dict[str, Tensor]:
        state = {name: p.data for name, p in self.hf.named_parameters() if not name.startswith(self._layers)}
        for i, block in enumerate(self.blocks):
            tensors = self.layer_tensors(block)
            state |= {f"{self._layers}{i}.{name}": tensor.contiguous() for name, tensor in tensors.items()}
        return state
