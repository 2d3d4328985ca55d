"""What a rank needs of its GPU's memory, known before anything is put there."""

from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from spd.errors import UserError
from spd.families import Family
from spd.gpu.head import part_of
from spd.sharding import Cut, fits_tp_size, is_output


class Needed(NamedTuple):
    """Bytes."""

    weights: int
    cache: int
    activations: int
    """About: what two layers hold at once, and the logits."""
    runtime: int = 2 * 10**9
    """About: the buffers of NCCL, symmetric memory, cuBLAS and CUDA graphs."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)

    def fits(self, free: int) -> bool:
        """Whether it does into `free` bytes, of which a twentieth is lost between blocks of memory."""
        return self.total < 0.95 * free

    def __str__(self) -> str:
        parts = (self.weights, self.cache, self.activations + self.runtime)
        weights, cache, rest = (f"{part / 1e9:.2f}" for part in parts)
        return f"{self.total / 1e9:.2f} GB ({weights} of weights, {cache} of keys and values, about {rest} at work)"


def needed(
    config: PretrainedConfig, family: Family, tp_size: int, batch_size: int, prompt_length: int, cache_length: int,
    dtype: torch.dtype,
) -> Needed:  # fmt: skip
    """What one rank of a `GraphModel` needs."""
    settings: Any = config
    with torch.device("meta"):
        whole: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    cut = Cut.of_ranks(family, config, tp_size, [0])
    layers, output = f"{family.decoder}.layers.", whole.get_output_embeddings().weight
    numbers, vocab = 0, part_of(settings.vocab_size, tp_size, tp_size - 1)  # the last is the largest
    for name, parameter in whole.named_parameters():
        part = parameter.numel()
        if parameter is output and not config.tie_word_embeddings:
            part = part // settings.vocab_size * (vocab.stop - vocab.start)
        if name.startswith(layers):
            inside = name.removeprefix(layers).partition(".")[2]
            kind = cut.kind(inside)
            span = cut.span(kind)
            columns = is_output(kind)
            if span is not None and not (columns and inside.endswith("bias")):
                part = part // parameter.shape[1 if columns else 0] * (span[1] - span[0])
        numbers += part
    kv_heads = cut.kv_heads[1] - cut.kv_heads[0]
    cache = 2 * settings.num_hidden_layers * batch_size * kv_heads * cache_length * cut.head_size
    width = 6 * settings.hidden_size + 3 * (cut.width[1] - cut.width[0])
    activations = batch_size * (prompt_length * width + 3 * (vocab.stop - vocab.start))
    return Needed(*(count * dtype.itemsize for count in (numbers, cache, activations)))


def what_fits(
    free: int, config: PretrainedConfig, family: Family, tp_size: int, batch_size: int, prompt_length: int,
    cache_length: int, dtype: torch.dtype,
) -> str:  # fmt: skip
    """What of the same model would fit into `free` bytes a GPU, as settings to write."""

    def at(ranks: int = tp_size, batch: int = batch_size, prompt: int = prompt_length) -> Needed:
        return needed(config, family, ranks, batch, prompt, cache_length, dtype)  # a shorter prompt may need less cache

    if at().fits(free):
        return "this fits: something else takes memory there, or more is needed than is known"
    batches, prompts = (
        [of >> halvings for halvings in range(1, of.bit_length())] for of in (batch_size, prompt_length)
    )
    found = [f"latency.batch_size={batch}" for batch in batches if at(batch=batch).fits(free)][:1]
    found += [f"latency.prompt_length={prompt}" for prompt in prompts if at(prompt=prompt).fits(free)][:1]
    sizes = [2**power for power in range(7) if 2**power > tp_size]
    found += [f"parallel.tp_size={n}" for n in sizes if fits_tp_size(family, config, n) and at(n).fits(free)][:1]
    if not found:
        least = at(batch=1).total
        return f"nothing of this model fits; one sequence at this tp_size takes {least / 1e9:.1f} GB a GPU"
    return f"{' or '.join(found)} would fit"


def check_memory(rank: int, tp_size: int, device: torch.device | str, free: int, what: str, **shape: Any) -> None:
    """Raises UserError, with what would fit, unless a rank's part fits into `free` bytes of its GPU.

    `what` these bytes are is said ("free", "in all"); `shape` is what `needed` takes beside tp_size.
    """
    asked = needed(tp_size=tp_size, **shape)
    if not asked.fits(free):
        raise UserError(
            f"rank {rank} of {tp_size} needs {asked} and {device} has {free / 1e9:.2f} GB {what}, "
            f"of which a twentieth is kept: {what_fits(free, tp_size=tp_size, **shape)}."
        )
