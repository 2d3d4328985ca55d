"""Head grouping (the paper's HG): which heads stand beside each other on a rank, and beside which part of the MLP.

    scatter   split the heads into N equal groups so that sum over groups, over pairs of heads in a group, of
              |A_h - A_h'| is largest: heads of different function come together
    match     give groups g to MLP partitions j so that sum of V[g, j] is largest (an assignment problem), with
              V[g, j] = sum over tokens of |MLP_j(norm2(X + P_g + b))|, before the residual is added

`A_h`, a head's signature, are its attention probabilities over all calibration samples. Heads are then permuted for
good: rows of Q, K and V and columns of the output projection, which leaves the undropped block's function as it is.

Grouped-query attention moves whole key/value heads with their query heads. With fewer key/value heads K than ranks N,
each is on N/K neighbouring ranks, its query heads are scattered over these, and groups stay with their neighbours. Open
in the paper, chosen here: a key/value head's signature is that of all its query heads, one after the other.

Legend: S samples, B batch, T tokens, D hidden size, H query heads, K key/value heads, N ranks.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from spd.block import Block
from spd.sharding import Cut

EXACT = 20_000
"""Up to so many ways to split the heads, all are tried; beyond, exchange search."""
RESTARTS = 20

Groups = list[tuple[int, ...]]
Split = Callable[[np.ndarray, int, int], Groups]
"""(distances [U, U], number of groups, seed) -> groups of units."""


def head_distances(block: Block, x: Tensor, inputs: dict[str, Any], batch_size: int = 8) -> np.ndarray:
    """Euclidean distances [H, H] between the heads' attention probabilities over block inputs [S, T, D]."""
    gram: Any = 0.0
    for batch in x.split(batch_size):
        signatures = _attention_probabilities(block, batch, inputs).transpose(0, 1).flatten(1)  # [H, B T T]
        with torch.autocast(x.device.type, enabled=False):  # a distance is the small difference of large products
            gram = gram + (signatures.float() @ signatures.float().T).double()
    squares = gram.diagonal()
    squared = squares[:, None] + squares[None, :] - 2 * gram
    squared.fill_diagonal_(0.0)
    return squared.clamp_min(0).sqrt().cpu().numpy()


@torch.no_grad()
def _attention_probabilities(block: Block, x: Tensor, inputs: dict[str, Any]) -> Tensor:
    """[B, H, T, T]. Only Hugging Face's eager attention gives them, and it needs the causal mask."""
    attention: Any = block.layer.get_submodule("self_attn")
    config, length = attention.config, x.shape[1]
    mask = torch.full((1, 1, length, length), torch.finfo(x.dtype).min, dtype=x.dtype, device=x.device).triu(1)
    normed, before = block.norm1(x), config._attn_implementation
    config._attn_implementation = "eager"
    try:
        probabilities: Tensor = attention(hidden_states=normed, **inputs | {"attention_mask": mask})[1]
        return probabilities
    finally:
        config._attn_implementation = before


def scatter(distances: np.ndarray, count: int, seed: int = 0) -> Groups:
    """Splits units into `count` equal groups with the largest sum of distances [U, U] within groups.

    Exact where there are at most `EXACT` splits; else the best of `RESTARTS` random splits, each improved by exchanging
    two units as long as that helps.
    """
    units, size = len(distances), len(distances) // count
    if size in (1, units):
        return [tuple(range(at, at + size)) for at in range(0, units, size)]
    splits = math.factorial(units) // (math.factorial(size) ** count * math.factorial(count))
    if splits <= EXACT:
        return max(_all_splits(list(range(units)), size), key=lambda groups: spread(distances, groups))
    generator = np.random.default_rng(seed)
    candidates = [_exchange(distances, generator.permutation(units), size) for _ in range(RESTARTS)]
    return max(candidates, key=lambda groups: spread(distances, groups))


def spread(distances: np.ndarray, groups: Sequence[Sequence[int]]) -> float:
    """Sum of the distances within groups: what `scatter` maximises."""
    return float(sum(distances[np.ix_(group, group)].sum() / 2 for group in map(list, groups)))


def random_groups(distances: np.ndarray, count: int, seed: int) -> Groups:
    """A random split of as many units, the baseline of `scatter`."""
    return _cut(np.random.default_rng(seed).permutation(len(distances)), len(distances) // count)


def _all_splits(units: list[int], size: int) -> Iterator[Groups]:
    if not units:
        yield []
        return
    first, *others = units
    for chosen in itertools.combinations(others, size - 1):
        left = [unit for unit in others if unit not in chosen]
        for rest in _all_splits(left, size):
            yield [(first, *chosen), *rest]


def _exchange(distances: np.ndarray, order: np.ndarray, size: int) -> Groups:
    groups = _cut(order, size)
    while True:
        group_of = np.empty(len(order), dtype=int)
        for g, group in enumerate(groups):
            group_of[list(group)] = g
        to_group = np.stack([distances[:, list(group)].sum(1) for group in groups], axis=1)  # [U, G]
        stay = to_group[np.arange(len(order)), group_of]
        move = to_group[:, group_of]  # [u, v]: u to the group of v
        gain = move + move.T - stay[:, None] - stay[None, :] - 2 * distances
        gain[group_of[:, None] == group_of[None, :]] = 0.0
        u, v = np.unravel_index(gain.argmax(), gain.shape)
        group_of[u], group_of[v] = group_of[v], group_of[u]
        exchanged = _cut(np.argsort(group_of, kind="stable"), size)
        # By the sum itself: gains that are rounding alone could go round in circles.
        if not spread(distances, exchanged) > spread(distances, groups):
            return groups
        groups = exchanged


def _cut(order: np.ndarray, size: int) -> Groups:
    groups = [tuple(sorted(int(unit) for unit in order[at : at + size])) for at in range(0, len(order), size)]
    return sorted(groups)


@torch.no_grad()
def mlp_norms(block: Block, x: Tensor, inputs: dict[str, Any], batch_size: int = 8) -> np.ndarray:
    """`V[g, j]` [N, N]: the norm of partition j's MLP outputs, summed over tokens, fed by the attention of rank g."""
    size = len(block.ranks.local)
    values = torch.zeros(size, size, dtype=torch.float64)
    for batch in x.split(batch_size):
        for g, u in enumerate(block.mlp_inputs(batch, block.attention(batch, **inputs))):
            outputs = block.mlp_output.partials(block.mlp(block.norm2(u)), size)
            values[g] += outputs.norm(dim=-1).double().sum((1, 2)).cpu()
    return values.numpy()


def match(values: np.ndarray, neighbours: int = 1) -> list[int]:
    """Which group each MLP partition gets, so that the sum of `V[g, j]` [N, N] is largest.

    Groups and partitions stay together in runs of `neighbours` (ranks that share a key/value head): runs go to runs,
    and the groups within one are matched among themselves. Exact.
    """
    runs = len(values) // neighbours
    blocks = values.reshape(runs, neighbours, runs, neighbours).swapaxes(1, 2)  # [run of groups, of partitions, g, j]
    inner = {pair: linear_sum_assignment(blocks[pair], maximize=True) for pair in np.ndindex(runs, runs)}
    outer = np.array([[blocks[a, b][inner[a, b]].sum() for b in range(runs)] for a in range(runs)])
    order = [0] * len(values)
    for a, b in zip(*linear_sum_assignment(outer, maximize=True), strict=True):
        for g, j in zip(*inner[a, b], strict=True):
            order[b * neighbours + j] = int(a * neighbours + g)
    return order


def scatter_heads(distances: np.ndarray, kv_heads: int, ranks: int, seed: int = 0, split: Split = scatter) -> Groups:
    """The query heads of every rank, scattered; `distances` [H, H]. Whole key/value heads move (see above).

    Another `split` of the units that can move is, with `random_groups`, the baseline.
    """
    per_kv = len(distances) // kv_heads
    queries = [list(range(at, at + per_kv)) for at in range(0, len(distances), per_kv)]
    if ranks <= kv_heads:
        pairs = distances.reshape(kv_heads, per_kv, kv_heads, per_kv) ** 2
        between = np.sqrt(np.einsum("aqbq->ab", pairs))  # signatures one after the other
        groups = split(between, ranks, seed)
        return [tuple(head for unit in group for head in queries[unit]) for group in groups]
    found: Groups = []
    for heads in queries:
        inside = split(distances[np.ix_(heads, heads)], ranks // kv_heads, seed)
        found += [tuple(heads[i] for i in group) for group in inside]
    return found


def permute_heads(tensors: dict[str, Tensor], groups: Groups, kv_heads: int, cut: Cut) -> dict[str, Tensor]:
    """The layer's tensors with query heads in the order of `groups`, and key/value heads in that of their queries."""
    order = [head for group in groups for head in group]
    per_kv = len(order) // kv_heads
    kv_order = [head // per_kv for head in order[::per_kv]]
    size, permuted = cut.head_size, dict(tensors)
    for name, tensor in tensors.items():
        kind = cut.kind(name)
        if kind in ("query", "key_value"):
            heads = order if kind == "query" else kv_order
            permuted[name] = tensor.unflatten(0, (-1, size))[heads].flatten(0, 1)
        elif kind == "attention_output" and tensor.ndim == 2:
            permuted[name] = tensor.unflatten(1, (-1, size))[:, order].flatten(1, 2)
    return permuted
