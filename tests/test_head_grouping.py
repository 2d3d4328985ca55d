"""Head grouping: the two searches against brute force, and what moving heads leaves as it was."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from test_exactness import dense_logits
from transformers import AutoModelForCausalLM
from treated import assert_same, block_inputs, plan_of, tokens

import spd
from spd.strategies import head_grouping
from spd.strategies.head_grouping import Groups, head_distances, match, scatter, scatter_heads, spread


def random_distances(units: int, seed: int) -> np.ndarray:
    """Of random points, as signatures' are."""
    points = np.random.default_rng(seed).exponential(size=(units, 3))
    return np.linalg.norm(points[:, None] - points[None, :], axis=-1)


@st.composite
def matrices(draw: st.DrawFn, units: int) -> np.ndarray:
    """Symmetric, no number negative, the diagonal zero; nothing else is sure."""
    half = draw(arrays(float, (units, units), elements=st.floats(0, 10, width=32)))
    return np.triu(half, 1) + np.triu(half, 1).T


def assert_split(groups: Groups, units: int, count: int) -> None:
    assert [len(group) for group in groups] == [units // count] * count
    assert sorted(itertools.chain(*groups)) == list(range(units))


def mean_spread(distances: np.ndarray, count: int) -> float:
    """Expected `spread` of a random split: every pair is within a group with the same probability."""
    units = len(distances)
    return distances.sum() / 2 * (units // count - 1) / (units - 1)


@settings(max_examples=25, deadline=None)
@given(distances=matrices(6), count=st.sampled_from([1, 2, 3, 6]))
def test_few_heads_are_split_in_the_best_of_all_ways(distances: np.ndarray, count: int) -> None:
    groups, size = scatter(distances, count), 6 // count
    assert_split(groups, 6, count)
    cuts = [[order[at : at + size] for at in range(0, 6, size)] for order in itertools.permutations(range(6))]
    best = max(sum(distances[a, b] for group in cut for a, b in itertools.combinations(group, 2)) for cut in cuts)
    assert spread(distances, groups) == pytest.approx(best)


@pytest.mark.parametrize(("units", "count"), [(8, 2), (8, 4), (12, 3), (12, 4), (16, 2)])
def test_exchanging_heads_finds_splits_close_to_the_best(
    units: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(2 if units > 8 else 10):
        distances = random_distances(units, seed)
        exact = spread(distances, scatter(distances, count))
        with monkeypatch.context() as patch:
            patch.setattr(head_grouping, "EXACT", 0)
            groups = scatter(distances, count, seed)
        assert_split(groups, units, count)
        assert 0.99 * exact <= spread(distances, groups) <= exact * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_no_exchange_ends_below_the_mean_of_random_splits(data: st.DataObject) -> None:
    units, count = data.draw(st.sampled_from([(8, 2), (8, 4), (12, 6), (16, 4), (24, 8)]))
    distances = data.draw(matrices(units))
    order = np.random.default_rng(data.draw(st.integers(0, 99))).permutation(units)
    groups = head_grouping._exchange(distances, order, units // count)
    assert_split(groups, units, count)
    assert spread(distances, groups) >= mean_spread(distances, count) * (1 - 1e-9) - 1e-9


def test_many_heads_are_split_far_above_the_mean_and_the_same_way_for_the_same_seed() -> None:
    rng = np.random.default_rng(0)
    points = np.repeat(np.eye(4), 8, axis=0)[rng.permutation(32)]  # four kinds of heads
    distances = np.linalg.norm(points[:, None] - points[None, :], axis=-1)
    groups = scatter(distances, 8, seed=1)
    assert_split(groups, 32, 8)
    assert all(sorted(points[list(group)].argmax(1)) == [0, 1, 2, 3] for group in groups)
    assert groups == scatter(distances, 8, seed=1)
    assert mean_spread(distances, 8) == pytest.approx(
        np.mean([spread(distances, head_grouping.random_groups(distances, 8, seed)) for seed in range(200)]), rel=0.02
    )


@settings(max_examples=30, deadline=None)
@given(st.data(), st.sampled_from([(1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (2, 2), (4, 2), (6, 2), (4, 4), (6, 3)]))
def test_matching_is_the_best_of_all_permutations(data: st.DataObject, size: tuple[int, int]) -> None:
    ranks, neighbours = size
    values = data.draw(arrays(float, (ranks, ranks), elements=st.floats(0, 100, width=32)))

    def allowed(order: tuple[int, ...]) -> bool:
        runs = [{g // neighbours for g in order[at : at + neighbours]} for at in range(0, ranks, neighbours)]
        return all(len(run) == 1 for run in runs)

    def total(order: Any) -> float:
        return float(values[list(order), range(ranks)].sum())

    order = match(values, neighbours)
    assert sorted(order) == list(range(ranks))
    assert allowed(tuple(order))
    assert total(order) == pytest.approx(max(map(total, filter(allowed, itertools.permutations(range(ranks))))))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
def test_whole_key_value_heads_move_and_repeated_ones_stay_with_their_queries(ranks: int) -> None:
    distances = random_distances(16, 1)
    groups = scatter_heads(distances, kv_heads=4, ranks=ranks)
    assert_split(groups, 16, ranks)
    if ranks <= 4:
        for group in groups:
            assert all(set(range(4 * (head // 4), 4 * (head // 4) + 4)) <= set(group) for head in group)
    else:
        for rank, group in enumerate(groups):
            assert {head // 4 for head in group} == {rank // (ranks // 4)}


@pytest.mark.parametrize("seed", range(12))
def test_key_value_heads_are_as_far_apart_as_all_their_queries_one_after_the_other(seed: int) -> None:
    signatures = np.random.default_rng(seed).exponential(size=(8, 4, 5)) ** 3
    heads, whole = signatures.reshape(32, 5), signatures.reshape(8, 20)
    between = np.linalg.norm(whole[:, None] - whole[None, :], axis=-1)
    distances = np.linalg.norm(heads[:, None] - heads[None, :], axis=-1)
    best = [[head for unit in group for head in range(4 * unit, 4 * unit + 4)] for group in scatter(between, 2)]
    assert [list(group) for group in scatter_heads(distances, 8, 2)] == best


@pytest.mark.parametrize("tp_size", [2, 8])
def test_distances_are_those_of_the_attentions_transformers_gives(
    checkpoint: Callable[..., Path], family: str, tp_size: int
) -> None:
    folder, ids = checkpoint(family), tokens(10, 9)
    model = spd.load(folder, tp_size=tp_size)
    dense = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.inference_mode():
        attentions = dense(ids, output_attentions=True).attentions
    for i in (0, 2):
        x, inputs = block_inputs(model, i, ids)
        signatures = attentions[i].transpose(0, 1).flatten(1).double().numpy()
        expected = np.linalg.norm(signatures[:, None] - signatures[None, :], axis=-1)
        np.testing.assert_allclose(head_distances(model.blocks[i], x, inputs, 4), expected, atol=1e-3 * expected.max())


def test_attention_is_computed_as_before_afterwards(
    checkpoint: Callable[..., Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = spd.load(checkpoint(family), tp_size=4), tokens(8, 9)
    x, inputs = block_inputs(model, 1, ids)
    logits = model(ids)
    head_distances(model.blocks[1], x, inputs)
    assert model.hf.config._attn_implementation == "sdpa"
    assert torch.equal(model(ids), logits)

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory")

    layer: Any = model.blocks[1].layer
    monkeypatch.setattr(layer.self_attn, "forward", broken)
    with pytest.raises(RuntimeError, match="no memory"):
        head_distances(model.blocks[1], x, inputs)
    assert model.hf.config._attn_implementation == "sdpa"


@torch.inference_mode()
def test_norms_are_of_every_partition_fed_by_every_group(checkpoint: Callable[..., Path], family: str) -> None:
    model, ids = spd.load(checkpoint(family), tp_size=4), tokens(10, 9)
    x, inputs = block_inputs(model, 1, ids)
    block = model.blocks[1]
    values = head_grouping.mlp_norms(block, x, inputs, 4)
    partials = block.partials(block.attention(x, **inputs))
    bias = 0.0 if block.attention_bias is None else block.attention_bias
    for g, j in itertools.product(range(4), range(4)):
        output = block.mlp_output.partials(block.mlp(block.norm2(x + partials[g] + bias)), 4)[j]
        assert values[g, j] == pytest.approx(output.norm(dim=-1).sum().item(), rel=1e-5)


@dataclass
class Grouped:
    """A model with the heads of every block grouped anew."""

    original: Path
    model: spd.TensorParallelLM
    saved: Path
    groups: list[Groups]


@pytest.fixture(scope="module")
def grouped(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Grouped]:
    """Makes (once) the grouped model of a family and tp size."""

    @functools.cache
    def get(family: str, tp_size: int) -> Grouped:
        model = spd.load(checkpoint(family), tp_size=tp_size)
        plan = dataclasses.replace(plan_of(model, "zs_hg"), treatment=dict.fromkeys(range(3), "hg"))
        spd.apply(model, plan, tokens(16, 10), say=lambda _: None)
        saved = tmp_path_factory.mktemp(family) / "out"
        model.save_pretrained(saved)
        assert model.plan is not None
        return Grouped(checkpoint(family), model, saved, [model.plan.outcomes[i]["hg"]["groups"] for i in range(3)])

    return get


@pytest.mark.parametrize("tp_size", [2, 4, 8])
def test_grouped_heads_leave_the_dense_model_as_it_is(
    grouped: Callable[[str, int], Grouped], family: str, tp_size: int
) -> None:
    case, ids = grouped(family, tp_size), tokens(2, 11)
    for split in case.groups:
        assert_split(sorted(split), 8, tp_size)
    assert any(list(itertools.chain(*split)) != list(range(8)) for split in case.groups)
    before, after = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (case.original, case.saved))
    assert any(not torch.equal(tensor, after[name]) for name, tensor in before.items())
    expected = dense_logits(case.original, ids)
    assert_same(dense_logits(case.saved, ids), expected)
    again = spd.load(case.saved)
    assert torch.equal(again(ids), case.model(ids))
    again.drop([])
    assert_same(again(ids), expected)


@pytest.mark.parametrize("tp_size", [2, 4, 8])
def test_key_value_groups_are_whole_in_a_grouped_model(grouped: Callable[[str, int], Grouped], tp_size: int) -> None:
    for split in grouped("qwen2", tp_size).groups:
        heads = list(itertools.chain(*split))
        assert [{head // 4 for head in heads[at : at + 4]} for at in (0, 4)] in ([{0}, {1}], [{1}, {0}])


@torch.inference_mode()
@pytest.mark.parametrize("tp_size", [2, 4, 8])
def test_a_dropped_rank_sees_the_heads_of_its_group(
    grouped: Callable[[str, int], Grouped], family: str, tp_size: int
) -> None:
    # The paper's equation with transformers' own whole layer, all but the columns of the group's heads set to zero.
    case = grouped(family, tp_size)
    row = case.model.family
    x, inputs = case.model.embed(tokens(2, 7))
    decoder: Any = AutoModelForCausalLM.from_pretrained(case.original).get_submodule(row.decoder)
    layer = decoder.layers[1]
    outputs = [layer.get_submodule(row.attention_output), layer.get_submodule(row.mlp_output)]
    biases = [torch.zeros(32) if output.bias is None else output.bias.clone() for output in outputs]
    weights = [output.weight.clone() for output in outputs]
    for output in outputs:
        if output.bias is not None:
            output.bias.zero_()
    total = torch.zeros_like(x)
    for i, group in enumerate(case.groups[1]):
        outputs[0].weight.copy_(weights[0] * torch.isin(torch.arange(32) // 4, torch.tensor(group)))
        outputs[1].weight.copy_(weights[1] * (torch.arange(48) // (48 // tp_size) == i))
        p_i = layer.self_attn(hidden_states=layer.get_submodule(row.attention_norm)(x), **inputs)[0]
        total += p_i + row.mlp(layer, layer.get_submodule(row.mlp_norm)(x + p_i + biases[0]))
    assert_same(case.model.blocks[1](x, **inputs), x + biases[0] + total + biases[1])


def test_what_grouping_came_to_is_recorded(grouped: Callable[[str, int], Grouped]) -> None:
    plan = grouped("llama", 4).model.plan
    assert plan is not None
    for outcome in plan.outcomes.values():
        hg = outcome["hg"]
        assert hg["spread"] >= max(hg["spread_contiguous"], hg["spread_random"])
        assert hg["norms"] >= hg["norms_unmatched"] > 0
        assert set(outcome["loss"]) == {"zs", "hg"}
