"""One rank's part of a model with static caches, whose prefill and decoding step run as CUDA graphs.

Embedding, head and greedy choice belong to every forward, from token ids to the next token. Of the head each rank has a
part (`spd.gpu.head`); the embedding is whole on all (a serving engine that cuts it sums once more).

Legend: B batch, T prompt tokens, C cache length, D hidden size, K key/value heads, h head size, N ranks, V vocabulary.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PretrainedConfig

from spd.checkpoint import Checkpoint
from spd.families import Family
from spd.gpu import all_reduce, graphs, head
from spd.gpu.all_reduce import AllReduce
from spd.gpu.attention import causal_mask, in_parts
from spd.gpu.halves import TUNED, Halves, Stage, Weights
from spd.gpu.timing import events_ms, meet, slowest
from spd.sharding import BlockReader, Cut, InCheckpoint, Source


@dataclass(frozen=True)
class Arm:
    """What is timed: which blocks are dropped, and, for the ceilings, which all-reduces are left out altogether."""

    dropped: frozenset[int] = frozenset()
    attention_all_reduce: bool = True
    """False leaves out the one after attention in all blocks: faster than any plan, and not a model one can use."""
    mlp_all_reduce: bool = True
    """False leaves out the other one as well, and that of the choice of the next token."""

    def all_reduces(self, blocks: int) -> int:
        """How many so many blocks have."""
        return (blocks - len(self.dropped)) * self.attention_all_reduce + blocks * self.mlp_all_reduce


class RandomLayer:
    """A `spd.sharding.Source` of one layer's tensors with random numbers, made on the device slice by slice.

    Norms scale by one and biases are zero, so that activations stay of order one through any number of blocks.
    """

    def __init__(self, shapes: dict[str, torch.Size], seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shapes, self.dtype, self.device = shapes, dtype, device
        self.random = torch.Generator(device).manual_seed(seed)

    def read(self, name: str, rows: slice = slice(None), columns: slice | None = None) -> Tensor:
        """The given rows and columns of a tensor that never exists as a whole."""
        whole = self.shapes[name]
        parts = (rows, slice(None) if columns is None else columns)
        shape = [len(range(*part.indices(size))) for part, size in zip(parts, whole, strict=False)]
        made = torch.empty(shape, dtype=self.dtype, device=self.device)
        if len(shape) == 1:
            return made.fill_(0.0 if name.endswith("bias") else 1.0)
        return made.normal_(0.0, 0.02, generator=self.random)


class States(NamedTuple):
    """What a block takes from the one before it (`spd.gpu.halves`); of the first one, in brackets."""

    residual: Tensor
    """R [B, T, D] (embeddings)"""
    summed: Tensor
    """S [B, T, D] (zeros)"""
    carried: Tensor | None
    """c [D] (zeros), where blocks have output biases"""
    rope: tuple[Tensor, Tensor] | None
    """Cosines and sines [T, h]"""
    positions: Tensor
    """[T]"""


class GraphModel:
    """One rank of a model for one batch size, prompt length and cache length.

    Args:
        config, family: what the model is.
        tp_size, rank: N, and which of the ranks this is.
        checkpoint: where its weights are; None for random ones, for which the config alone is needed.
        batch_size, prompt_length, cache_length: B, T and C; C >= T.
        all_reduce: the sum over ranks; None if there is one rank, or to time a rank by itself.
        dtype, device: of weights and activations.
        compiled: half blocks by torch.compile.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        family: Family,
        tp_size: int,
        rank: int,
        *,
        checkpoint: Checkpoint | None = None,
        batch_size: int = 1,
        prompt_length: int = 128,
        cache_length: int = 512,
        all_reduce: AllReduce | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cuda",
        compiled: bool = True,
    ) -> None:
        self.device, self.dtype, self.all_reduce = torch.device(device), dtype, all_reduce
        settings: Any = config
        self.num_blocks = settings.num_hidden_layers
        self.halves, self._compiled = Halves(family, config, compiled=compiled), compiled
        with torch.device("meta"):
            whole: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        self.vocab = head.part_of(settings.vocab_size, tp_size, rank)
        """Tokens whose logits this rank has."""
        self._first = torch.tensor(self.vocab.start, device=self.device)
        self._mine = torch.arange(tp_size, device=self.device).view(-1, 1, 1) == rank
        self._read(whole, config, family, tp_size, rank, checkpoint)
        kv_heads = (self.blocks[0].qkv.shape[0] - self.blocks[0].attention_output.shape[1]) // 2
        self._kv_heads = kv_heads // self.halves.head_size
        self._chosen: dict[tuple[int, int, int | None], dict[str, str]] = {}
        self.position = torch.zeros(1, dtype=torch.long, device=self.device)
        """Where in the sequence the last token stands; prefill sets it, a decoding step moves it on."""
        self.resize(batch_size, prompt_length, cache_length)

    def resize(self, batch_size: int, prompt_length: int, cache_length: int) -> None:
        """Takes other B, T and C; graphs that were captured before are of no use any more."""
        shape = (batch_size, self._kv_heads, cache_length, self.halves.head_size)
        self.cache: list[list[Tensor]] = []  # let go of before as much is asked for again
        self.cache = [[torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in "kv"] for _ in self.blocks]
        self.prompt = torch.zeros(batch_size, prompt_length, dtype=torch.long, device=self.device)
        """Token ids [B, T] that prefill reads."""
        self.token = torch.zeros(batch_size, 1, dtype=torch.long, device=self.device)
        """The last token chosen, [B, 1], that a decoding step reads and replaces."""
        self.logits = torch.zeros(batch_size, len(self.head), dtype=self.dtype, device=self.device)
        """Logits [B, V/N] of this rank's part of the vocabulary, that `token` was chosen by."""
        self._causal = causal_mask(prompt_length, self.device)
        self.kernels = {phase: _at(0, self._versions(phase)) for phase in self.halves.versions}
        """Phase -> function -> which of `Halves.versions` is used; compiled, chosen when one is first captured."""
        self._columns = torch.arange(cache_length, device=self.device)
        self._warm: set[int | None] = set()
        self._parts = functools.cache(functools.partial(in_parts, device=self.device))

    @torch.no_grad()
    def _read(
        self,
        whole: Any,
        config: PretrainedConfig,
        family: Family,
        tp_size: int,
        rank: int,
        checkpoint: Checkpoint | None,
    ) -> None:
        decoder = whole.get_submodule(family.decoder)
        names = {id(parameter): name for name, parameter in whole.named_parameters()}
        shapes = {name: parameter.shape for name, parameter in decoder.layers[0].named_parameters()}
        every = {name: parameter.shape for name, parameter in whole.named_parameters()}
        # Seeds: of what is cut, of every rank its own.
        of_all, of_rank = (RandomLayer(every, seed, self.dtype, self.device) for seed in (-1, -2 - rank))

        def tensor(parameter: Tensor, random: RandomLayer = of_all, rows: slice = slice(None)) -> Tensor:
            source = random if checkpoint is None else checkpoint
            return source.read(names[id(parameter)], rows).to(self.device, self.dtype)

        def layer(i: int) -> Source:
            if checkpoint is None:
                return RandomLayer(shapes, i * tp_size + rank, self.dtype, self.device)
            return InCheckpoint(checkpoint, f"{family.decoder}.layers.{i}.")

        embedding, output = whole.get_input_embeddings().weight, whole.get_output_embeddings().weight
        self.embedding = tensor(embedding)
        tied = output is embedding or config.tie_word_embeddings
        self.head = self.embedding[self.vocab] if tied else tensor(output, of_rank, self.vocab)
        """[V/N, D]"""
        norm = getattr(decoder, family.final_norm)
        bias = getattr(norm, "bias", None)
        self.final_norm = tensor(norm.weight), None if bias is None else tensor(bias)
        positions = getattr(decoder, "embed_positions", None)
        self.positions = None if positions is None else tensor(positions.weight)[positions.offset :]
        self.rotary = None
        if hasattr(decoder, "rotary_emb"):
            self.rotary = type(decoder.rotary_emb)(config).to(self.device)
        cut = Cut.of_ranks(family, config, tp_size, [rank])
        reader = BlockReader(family, config, type(decoder.layers[0]), cut)
        self.blocks: list[Weights] = []
        for i in range(self.num_blocks):
            read, biases = reader.read(i, layer(i), self.dtype, self.device)
            self.blocks.append(Weights.of(read, family, biases))

    def _embed(self, ids: Tensor, positions: Tensor) -> States:
        """What the first block takes, of token ids [B, T] at positions [T]."""
        residual, rope = F.embedding(ids, self.embedding), None
        if self.rotary is not None:
            cos, sin = self.rotary(residual, positions.unsqueeze(0))
            rope = cos[0], sin[0]
        if self.positions is not None:
            residual = residual + self.positions[positions]
        biases = self.blocks[0].biases
        carried = None if biases is None else torch.zeros_like(biases)
        return States(residual, torch.zeros_like(residual), carried, rope, positions)

    @torch.no_grad()
    def _blocks(self, states: States, arm: Arm, reach: int | None, blocks: int | None = None) -> States:
        """What is behind the last block, or the first few; decoding looks at `reach` cached positions, and prefill, for
        which that is None, at its own prompt."""
        residual, summed, carried, rope, positions = states
        phase = _phase(reach)
        stage = Stage(**{name: self.halves.versions[phase][name][kind] for name, kind in self.kernels[phase].items()})
        room = all_reduce.room(self.all_reduce, residual.shape)
        where: tuple[Any, ...] = (self._causal,)
        if reach is not None:
            where = positions, self._columns[:reach] <= positions, self._parts(reach)
        for i, (w, cache) in enumerate(zip(self.blocks[:blocks], self.cache[:blocks], strict=True)):
            keys, values = (part[:, :, :reach] for part in cache)
            x, partial = stage.attention(residual, summed, carried, w, room, rope, keys, values, *where)
            dropped = i in arm.dropped
            attended = partial if dropped or not arm.attention_all_reduce else self._sum(partial)
            residual, local, carried = stage.mlp(x, attended, w, room, dropped=dropped)
            summed = self._sum(local) if arm.mlp_all_reduce else local
        return States(residual, summed, carried, rope, positions)

    def work(self, decode_at: int | None) -> tuple[int, float]:
        """Bytes that a forward reads at least, weights and keys and values up to `decode_at`, and the operations of its
        matrix products. `decode_at` is None for prefill."""
        batch, prompt = self.prompt.shape
        size = self.dtype.itemsize
        blocks, last = sum(block.bytes for block in self.blocks), self.head.numel() * size
        read, tokens = blocks + last, batch * prompt
        if decode_at is not None:
            read += sum(cache[:, :, :decode_at].numel() * size for pair in self.cache for cache in pair)
            tokens = batch
        return read, 2 * (blocks / size * tokens + last / size * batch)

    def _sum(self, local: Tensor) -> Tensor:
        return local if self.all_reduce is None else self.all_reduce(local)

    def _choose(self, last: States, arm: Arm) -> None:
        """Leaves logits and the next token behind."""
        states = last.residual, last.summed, last.carried
        logits, candidates = self.halves.last(*states, *self.final_norm, self.head, self._first, self._mine)
        self.logits.copy_(logits)
        self.token.copy_(self.halves.likeliest(self._sum(candidates) if arm.mlp_all_reduce else candidates))

    def _states(self, reach: int | None) -> States:
        """What goes into the first block: of `token` in decoding, of `prompt` in prefill, for which `reach` is None."""
        if reach is None:
            return self._embed(self.prompt, self._columns[: self.prompt.shape[1]])
        return self._embed(self.token, self.position)

    @torch.no_grad()
    def prefill(self, arm: Arm) -> None:
        """From `prompt` to the first token."""
        self._choose(self._blocks(self._states(None), arm, None), arm)
        self.position.fill_(self.prompt.shape[1])

    @torch.no_grad()
    def decode(self, arm: Arm, reach: int | None = None) -> None:
        """From `token`, at `position` below `reach` (by default C), to the next one."""
        reach = reach or len(self._columns)
        self._choose(self._blocks(self._states(reach), arm, reach), arm)
        self.position.add_(1)

    @torch.no_grad()  # also what is warmed up: compiled functions are of one grad mode
    def capture(
        self, arm: Arm, *, decode: bool, reach: int | None = None, blocks_alone: bool = False, pool: Any = None
    ) -> Callable[[], object]:
        """`prefill` or `decode` as a CUDA graph; a call replays it. On a CPU a call runs it.

        Args:
            arm: what is dropped or left out.
            decode, reach: which of the two, and what `decode` is given.
            blocks_alone: without embedding, head and choice, on states that were embedded before.
            pool: memory that graphs which never run at once can share.
        """
        reach = (reach or len(self._columns)) if decode else None
        self._warm_up(reach)
        run: Callable[[], object]
        run = functools.partial(self.decode, arm, reach) if decode else functools.partial(self.prefill, arm)
        if blocks_alone:
            run = functools.partial(self._blocks, self._states(reach), arm, reach)
        return graphs.capture(run, self.device, pool)

    def _warm_up(self, reach: int | None) -> None:
        """Compiles both blocks' functions, and lets libraries make their workspaces, once for each kind of graph."""
        if reach in self._warm or (self.device.type == "cpu" and not self._compiled):
            return
        self._warm.add(reach)

        def run() -> None:
            for arm in (Arm(), Arm(frozenset({0, 1}))):
                # Two blocks have all the shapes that more have.
                self._choose(self._blocks(self._states(reach), arm, reach, blocks=2), arm)

        self.position.zero_()
        phase, size = _phase(reach), (*self.prompt.shape, reach)
        versions = self._versions(phase)
        for place in range(max(map(len, versions.values()))):
            self.kernels[phase] = _at(place, versions)
            graphs.warm_up(run, self.device, times=2)
        if size not in self._chosen:
            self._chosen[size] = self._quicker_kernels(reach, versions)
        self.kernels[phase] = self._chosen[size]

    def _versions(self, phase: str) -> dict[str, list[str]]:
        """Names of those of `Halves.versions` that serve this batch size."""
        one = phase == "decode" and len(self.token) == 1
        return {
            name: [kind for kind in some if one or kind != TUNED] for name, some in self.halves.versions[phase].items()
        }

    def _quicker_kernels(self, reach: int | None, versions: dict[str, list[str]]) -> dict[str, str]:
        """Of each function of a phase the version with which it is the quickest, on the slowest rank.

        Judged inside of blocks, every second of them dropped, as a kernel's time depends on what runs before it.
        """
        # In decoding, sixteen, which have more weights than any cache holds.
        arm, blocks = Arm(frozenset(range(0, 16, 2))), 4 if reach is None else 16
        run = functools.partial(self._blocks, self._states(reach), arm, reach, blocks=blocks)
        phase, chosen = _phase(reach), _at(0, versions)

        def ms(replay: Callable[[], object]) -> float:
            meet(self.device)
            return slowest(torch.tensor(events_ms(replay, 1)), self.device).item()

        for name, some in versions.items():
            if len(some) == 1:
                continue
            replays, pool = [], graphs.shared_pool(self.device)
            for version in some:
                self.kernels[phase] = chosen | {name: version}
                replays.append(graphs.capture(run, self.device, pool))
                replays[-1]()
            trials = max(3, min(41, int(500 / ms(replays[0]))))  # about as long for each function, but those of seconds
            taken = torch.zeros(trials, len(some))
            for trial in range(trials):
                for place in range(len(some))[:: -1 if trial % 2 else 1]:
                    taken[trial, place] = ms(replays[place])
            chosen[name] = some[int(taken.median(0).values.argmin())]
        return chosen


def _phase(reach: int | None) -> str:
    return "prefill" if reach is None else "decode"


def _at(place: int, versions: dict[str, list[str]]) -> dict[str, str]:
    """Of each function the version at a place, or its last."""
    return {name: some[min(place, len(some) - 1)] for name, some in versions.items()}
