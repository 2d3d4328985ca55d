"""Corrections against least squares by numpy, and in every way a model is run."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache
from treated import assert_same, block_inputs, correct, teacher, tokens

import spd
from spd.block import Block
from spd.config import CorrectionConfig, CorrectionKind
from spd.model import TensorParallelLM
from spd.strategies.correction import Correction, fit

KINDS = list(CorrectionKind)
LINEAR = [CorrectionKind.linear_x, CorrectionKind.linear_p, CorrectionKind.linear, CorrectionKind.shift]
SHIFT = CorrectionConfig(CorrectionKind.shift, rank=8)


@torch.no_grad()
def features(block: Block, x: Tensor, inputs: dict[str, Any], rank: int) -> tuple[dict[str, Tensor], Tensor]:
    """`norm1(X)`, `P_i` and `norm1(X)` of the token before, and what rank `i` lacks, all [B, T, D]."""
    partials, normed = block.partials(block.attention(x, **inputs)), block.norm1(x)
    before = F.pad(normed, (0, 0, 1, 0))[:, :-1]
    missing = torch.stack([p for j, p in enumerate(partials) if j != rank]).sum(0)
    return {"x": normed, "p": partials[rank], "b": before}, missing


def predicted(fix: Correction, rank: int, z: dict[str, Tensor]) -> Tensor:
    return fix(rank, z["x"], z["p"], z["b"])


def ridge_by_numpy(z: Tensor, m: Tensor, ridge: float, rank: int) -> np.ndarray:
    """Predictions of ridge regression with a free intercept, on the first principal directions of its predictions."""
    features, wanted = z.flatten(0, 1).double().numpy(), m.flatten(0, 1).double().numpy()
    centred, mean = features - features.mean(0), wanted.mean(0)
    size = m.shape[-1]  # of each kind of feature, which is penalised by its own variance
    variances = centred.var(0).reshape(-1, size).mean(1).repeat(size)
    augmented = np.vstack([centred, np.diag(np.sqrt(len(centred) * ridge * variances))])
    target = np.vstack([wanted - mean, np.zeros((centred.shape[1], wanted.shape[1]))])
    fitted = centred @ np.linalg.lstsq(augmented, target, rcond=None)[0]
    directions = np.linalg.svd(fitted, full_matrices=False)[2][:rank]
    return (fitted @ directions.T @ directions + mean).reshape(m.shape)


@pytest.fixture
def model(tiny_opt: Path) -> TensorParallelLM:
    return spd.load(tiny_opt, tp_size=4)


@pytest.mark.parametrize("rank", [32, 3])
@pytest.mark.parametrize("kind", LINEAR)
def test_linear_kinds_are_ridge_regressions_of_low_rank(
    checkpoint: Callable[..., Path], family: str, kind: CorrectionKind, rank: int
) -> None:
    model = spd.load(checkpoint(family), tp_size=2)
    x, inputs = block_inputs(model, 1, tokens(20, 12))
    fix = fit(model.blocks[1], x, inputs, CorrectionConfig(kind, rank, ridge=0.1), batch_size=7)
    for i in range(2):
        z, missing = features(model.blocks[1], x, inputs, i)
        joined = {"linear_x": "x", "linear_p": "p", "linear": "xp", "shift": "xpb"}[kind.name]
        expected = ridge_by_numpy(torch.cat([z[name] for name in joined], dim=-1), missing, 0.1, rank)
        assert np.abs(predicted(fix, i, z).numpy() - expected).max() < 1e-3 * np.abs(expected).max()


def test_with_products_in_bfloat16_the_normal_equations_are_float32_still(tiny_llama: Path) -> None:
    model = spd.load(tiny_llama, tp_size=2)
    x, inputs = block_inputs(model, 1, tokens(20, 12))
    x = x + 30.0  # far from zero, as some units of large models are
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        fix = fit(model.blocks[1], x, inputs, CorrectionConfig(CorrectionKind.shift, rank=32, ridge=1e-3), batch_size=7)
        z, missing = features(model.blocks[1], x, inputs, 0)
    z = {name: values.float() for name, values in z.items()}
    expected = ridge_by_numpy(torch.cat([z[name] for name in "xpb"], dim=-1), missing.float(), 1e-3, 32)
    assert np.abs(predicted(fix, 0, z).numpy() - expected).max() < 5e-3 * np.abs(expected).max()


@pytest.mark.parametrize("kind", [CorrectionKind.linear_x, CorrectionKind.shift])
def test_without_a_ridge_full_rank_is_plain_least_squares(tiny_llama: Path, kind: CorrectionKind) -> None:
    model = spd.load(tiny_llama, tp_size=2)
    block = model.read_block(1, dtype=torch.float64)
    x, inputs = block_inputs(model, 0, tokens(30, 12))
    x, inputs = x.double(), inputs | {"position_embeddings": tuple(t.double() for t in inputs["position_embeddings"])}
    fix = fit(block, x, inputs, CorrectionConfig(kind, rank=32, ridge=1e-12))
    z, missing = features(block, x, inputs, 1)
    joined = [z["x"]] if kind is CorrectionKind.linear_x else list(z.values())
    design = torch.cat([*joined, torch.ones_like(x[..., :1])], dim=-1).flatten(0, 1)
    wanted = missing.flatten(0, 1)
    solution = torch.linalg.lstsq(design, wanted, driver="gelsd").solution  # P_i has half the rank of its columns
    assert_same(predicted(fix.double(), 1, z).flatten(0, 1), design @ solution, 1e-3)


def test_constant_is_the_mean_of_what_a_rank_lacks(model: TensorParallelLM) -> None:
    x, inputs = block_inputs(model, 1, tokens(10, 12))
    fix = fit(model.blocks[1], x, inputs, CorrectionConfig(CorrectionKind.constant), batch_size=3)
    assert fix.constant.shape == (4, 32)
    for i in range(4):
        assert_same(fix.constant[i], features(model.blocks[1], x, inputs, i)[1].mean((0, 1)))


def test_scale_is_one_slope_for_all_units_and_an_intercept_for_each(model: TensorParallelLM) -> None:
    x, inputs = block_inputs(model, 1, tokens(10, 12))
    fix = fit(model.blocks[1], x, inputs, CorrectionConfig(CorrectionKind.scale))
    for i in range(4):
        z, missing = features(model.blocks[1], x, inputs, i)
        p, wanted = (t.flatten(0, 1).double() for t in (z["p"], missing))
        # One regression of all S T D numbers on P_i and D indicators.
        design = torch.cat([p.reshape(-1, 1), torch.eye(32).repeat(len(p), 1).double()], dim=1)
        solution = torch.linalg.lstsq(design, wanted.reshape(-1, 1)).solution[:, 0]
        assert fix.scale is not None
        assert fix.scale[i].item() == pytest.approx(solution[0].item(), abs=1e-4)
        assert_same(fix.constant[i].double(), solution[1:], 1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("tp_size", [2, 8])
def test_the_missing_attention_itself_makes_the_dropped_block_the_tp_block(
    checkpoint: Callable[..., Path], family: str, tp_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = spd.load(checkpoint(family), tp_size=tp_size)
    x, inputs = block_inputs(model, 1, tokens(2, 9))
    fix = Correction({"constant": torch.zeros(tp_size, 32)})
    block = model.read_block(1, correction=fix)
    total = block.partials(block.attention(x, **inputs)).sum(0)
    monkeypatch.setattr(fix, "forward", lambda rank, normed, partial, before: total.view_as(partial) - partial)
    block.dropped = True
    assert_same(block(x, **inputs), teacher(model.blocks[1], x, inputs))


@torch.inference_mode()
@pytest.mark.parametrize(
    ("kind", "seen", "exact"),
    [
        (CorrectionKind.shift, "xb", True),
        (CorrectionKind.linear, "xb", False),
        (CorrectionKind.linear, "x", True),
        (CorrectionKind.linear_x, "x", True),
        (CorrectionKind.linear_p, "x", False),
        (CorrectionKind.constant, "x", False),
    ],
)
def test_full_rank_is_exact_where_attention_is_linear_in_the_features(
    model: TensorParallelLM, monkeypatch: pytest.MonkeyPatch, kind: CorrectionKind, seen: str, exact: bool
) -> None:
    x, inputs = block_inputs(model, 1, tokens(20, 12))
    maps = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(1)) / 6
    for i in range(4):  # P_i tells of 8 of norm1(X)'s 32 numbers
        maps[:, i, :, : 8 * i] = maps[:, i, :, 8 * i + 8 :] = 0

    def linear_attention(x: Tensor, **_: Any) -> Tensor:
        normed = model.blocks[1].norm1(x)
        before = F.pad(normed, (0, 0, 1, 0))[:, :-1] if "b" in seen else torch.zeros_like(normed)
        shifted = before.flip(-1)
        return torch.cat([F.linear(normed, a) + F.linear(shifted, b) for a, b in zip(*maps, strict=True)], dim=-1)

    def block(fix: Correction | None = None) -> Block:
        made = model.read_block(1, correction=fix)
        monkeypatch.setattr(made, "attention", linear_attention)
        made.attention_output.weight.data = torch.eye(32).repeat(1, 4)  # each rank's heads are its P_i
        return made

    fix = fit(block(), x, inputs, CorrectionConfig(kind, rank=32, ridge=1e-9))
    x, inputs = block_inputs(model, 1, tokens(3, 12, seed=8))
    wanted, got = block().tp(x, linear_attention(x)), block(fix).spd(x, linear_attention(x), **inputs)
    error = ((got - wanted).abs().max() / wanted.abs().max()).item()
    assert error < 1e-3 if exact else error > 1e-2


@pytest.mark.parametrize("kind", LINEAR)
def test_more_rank_never_fits_its_own_data_worse(
    checkpoint: Callable[..., Path], family: str, kind: CorrectionKind
) -> None:
    model = spd.load(checkpoint(family), tp_size=4)
    x, inputs = block_inputs(model, 2, tokens(16, 12))
    losses = []
    for rank in (1, 2, 4, 8, 16, 32, 64):
        fix = fit(model.blocks[2], x, inputs, CorrectionConfig(kind, rank))
        errors = []
        for i in range(4):
            z, missing = features(model.blocks[2], x, inputs, i)
            errors.append((predicted(fix, i, z) - missing).square().mean().item())
        losses.append(sum(errors))
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(losses))
    assert losses[0] > 1.05 * losses[-1]


def test_richer_kinds_fit_their_own_data_better(tiny_llama: Path) -> None:
    model = spd.load(tiny_llama, tp_size=4)
    x, inputs = block_inputs(model, 1, tokens(16, 12))
    z, missing = features(model.blocks[1], x, inputs, 2)
    fixes = {kind: fit(model.blocks[1], x, inputs, CorrectionConfig(kind, rank=32, ridge=1e-8)) for kind in KINDS}
    loss = {kind.name: (predicted(fix, 2, z) - missing).square().mean().item() for kind, fix in fixes.items()}
    assert missing.square().mean() > loss["constant"] > loss["scale"] > loss["linear_p"] > loss["linear"]
    assert loss["constant"] > loss["linear_x"] > loss["linear"] > loss["shift"]


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [("constant", 32), ("scale", 33), ("linear_x", 32 + 5 * 64), ("linear_p", 352), ("linear", 512), ("shift", 672)],
)
def test_cost_counts_the_numbers_of_one_rank(model: TensorParallelLM, kind: str, numbers: int) -> None:
    x, inputs = block_inputs(model, 0, tokens(4, 12))
    fix = fit(model.blocks[0], x, inputs, CorrectionConfig(CorrectionKind[kind], rank=5))
    assert fix.cost() == numbers
    assert sum(t.numel() for t in fix.tensors().values()) == 4 * numbers


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_loads_its_slice_only(model: TensorParallelLM, kind: CorrectionKind, tmp_path: Path) -> None:
    fixes = correct(model, CorrectionConfig(kind, rank=5), dropped=[0, 2])
    model.save_corrections(tmp_path / "all")
    x, inputs = block_inputs(model, 2, tokens(2, 9))
    here = torch.float32, torch.device("cpu")
    assert Correction.load(tmp_path / "all", 1, [0], *here) is None
    for i in range(4):
        mine = Correction.load(tmp_path / "all", 2, [i], *here)
        assert mine is not None
        whole = fixes[2].tensors()
        assert mine.tensors().keys() == whole.keys()
        assert all(torch.equal(t, whole[name][i : i + 1]) for name, t in mine.tensors().items())
        z, _ = features(model.read_block(2), x, inputs, i)
        assert torch.equal(predicted(mine, 0, z), predicted(fixes[2], i, z))
    every = Correction.load(tmp_path / "all", 2, [0, 1, 2, 3], torch.bfloat16, here[1])
    assert every is not None
    assert all(torch.equal(t, whole[name].bfloat16()) for name, t in every.tensors().items())


def test_corrections_loaded_from_a_file_are_those_that_were_saved(tiny_opt: Path, tmp_path: Path) -> None:
    model, ids = spd.load(tiny_opt, tp_size=4), tokens(2, 9)
    correct(model, SHIFT, dropped=[0, 2])
    model.save_corrections(tmp_path / "file")
    again = spd.load(tiny_opt, tp_size=4)
    again.load_corrections(tmp_path / "file")
    again.drop([0, 2])
    assert torch.equal(again(ids), model(ids))


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
def test_an_undropped_block_ignores_its_correction(tiny_llama: Path, kind: CorrectionKind) -> None:
    plain, ids = spd.load(tiny_llama, tp_size=4), tokens(2, 9)
    dense = plain(ids)
    corrected = spd.load(tiny_llama, tp_size=4)
    correct(corrected, CorrectionConfig(kind), dropped=[0, 1, 2])
    for block in corrected.blocks:
        block.dropped = False
    assert torch.equal(corrected(ids), dense)
    for block, original in zip(corrected.blocks, plain.blocks, strict=True):
        block.dropped = original.dropped = True
    assert (corrected(ids) - plain(ids)).abs().max() > 1e-2 * dense.abs().max()


@torch.inference_mode()
@pytest.mark.parametrize(("tp_size", "dropped"), [(2, [0, 1, 2]), (8, [1]), (8, [0, 1, 2])])
def test_cached_generation_equals_uncached(
    checkpoint: Callable[..., Path], family: str, tp_size: int, dropped: list[int]
) -> None:
    model, ids = spd.load(checkpoint(family), tp_size=tp_size), tokens(2, 7)
    correct(model, SHIFT, dropped)
    made: Any = model.generate(
        ids, max_new_tokens=10, min_new_tokens=10, output_logits=True, return_dict_in_generate=True
    )
    logits = model(made.sequences)
    for step, decoded in enumerate(made.logits):
        assert_same(decoded, logits[:, 6 + step])
    assert torch.equal(made.sequences, model.generate(ids, max_new_tokens=10, min_new_tokens=10, use_cache=False))


@torch.inference_mode()
@pytest.mark.parametrize("kind", [CorrectionKind.shift, CorrectionKind.scale])
@pytest.mark.parametrize("empty", [DynamicCache, lambda: None], ids=["of the user", "of transformers"])
def test_a_cache_made_without_the_models_configuration_is_filled_as_well(
    tiny_llama: Path, kind: CorrectionKind, empty: Callable[[], Any]
) -> None:
    model, ids = spd.load(tiny_llama, tp_size=4), tokens(2, 9)
    correct(model, CorrectionConfig(kind, rank=4), [0, 1, 2])
    output = model.hf(ids[:, :8], past_key_values=empty(), use_cache=True)
    assert_same(model.hf(ids[:, 8:], past_key_values=output.past_key_values).logits, model(ids)[:, 8:])


@torch.inference_mode()
def test_a_prompt_taken_in_pieces_is_the_same_prompt(checkpoint: Callable[..., Path], family: str) -> None:
    model, ids = spd.load(checkpoint(family), tp_size=4), tokens(2, 11)
    correct(model, SHIFT, dropped=[0, 2])
    past, pieces = None, []
    for piece in ids.split([4, 1, 5, 1], dim=1):
        output = model.hf(piece, past_key_values=past, use_cache=True)
        past = output.past_key_values
        pieces.append(output.logits)
    assert_same(torch.cat(pieces, dim=1), model(ids))


@torch.inference_mode()
@pytest.mark.parametrize("tp_size", [2, 8])
def test_a_padded_batch_equals_single_prompts(checkpoint: Callable[..., Path], family: str, tp_size: int) -> None:
    model, ids = spd.load(checkpoint(family), tp_size=tp_size), tokens(2, 11)
    correct(model, SHIFT, dropped=[0, 1, 2])
    short, long = ids[:1, :4], ids[1:]
    padding = torch.zeros(1, 7, dtype=torch.long)
    batch = torch.cat([torch.cat([padding, short], dim=1), long])
    mask = torch.cat([torch.cat([padding, torch.ones_like(short)], dim=1), torch.ones_like(long)])
    logits = model(batch, attention_mask=mask)
    assert_same(logits[0, -4:], model(short)[0])
    assert_same(logits[1], model(long)[0])
    six: dict[str, Any] = dict(max_new_tokens=6, min_new_tokens=6)
    generated = model.generate(batch, attention_mask=mask, **six)
    assert torch.equal(generated[0, -6:], model.generate(short, **six)[0, -6:])
    assert torch.equal(generated[1, -6:], model.generate(long, **six)[0, -6:])


@torch.inference_mode()
@pytest.mark.parametrize("dropped", [[0, 1, 2], [1]])
def test_beams_keep_their_own_token_before(checkpoint: Callable[..., Path], family: str, dropped: list[int]) -> None:
    model, ids = spd.load(checkpoint(family), tp_size=4), tokens(2, 7)
    correct(model, SHIFT, dropped)
    beams: dict[str, Any] = dict(num_beams=3, max_new_tokens=8, min_new_tokens=8, num_return_sequences=3)
    beams |= dict(return_dict_in_generate=True, output_scores=True)
    cached: Any = model.generate(ids, **beams)
    uncached: Any = model.generate(ids, use_cache=False, **beams)
    assert torch.equal(cached.sequences, uncached.sequences)
    assert_same(cached.sequences_scores, uncached.sequences_scores)
    assert cached.beam_indices.unique().numel() > 2  # beams were exchanged


def test_taking_tokens_back_is_refused_in_words(model: TensorParallelLM) -> None:
    correct(model, SHIFT, dropped=[1])
    with pytest.raises(spd.UserError, match="takes tokens back"):
        model.generate(torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]]), max_new_tokens=8, prompt_lookup_num_tokens=3)


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_lacks_nothing_and_is_given_nothing(tiny_llama: Path, kind: CorrectionKind) -> None:
    model, ids = spd.load(tiny_llama, tp_size=1), tokens(2, 9)
    dense = model(ids)
    correct(model, CorrectionConfig(kind), dropped=[0, 1, 2])
    assert_same(model(ids), dense)
