"""Preparing models as plans say: what is recorded, saved, kept for later, and refused."""

import dataclasses
import hashlib
import itertools
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_checkpoint
from safetensors import safe_open
from test_exactness import dense_logits
from transformers import AutoModelForCausalLM
from treated import (
    CALIBRATION,
    CLASSES,
    QUICK,
    assert_same,
    block_inputs,
    empty,
    plan_in,
    plan_of,
    prepare,
    same,
    teacher,
    tokens,
    truncate,
    weights,
)

import spd
from spd.config import DistillationConfig
from spd.model import TensorParallelLM
from spd.plan import STRATEGIES, DropPlan
from spd.strategies import b2b, correction
from spd.strategies.block_cache import BlockCache

STRATEGY_NAMES = list(STRATEGIES)


@pytest.fixture
def model(tiny_llama: Path) -> TensorParallelLM:
    return spd.load(tiny_llama, tp_size=2)


@pytest.mark.parametrize("strategy", STRATEGY_NAMES)
def test_every_class_of_dropped_blocks_gets_the_steps_of_the_strategy(model: TensorParallelLM, strategy: str) -> None:
    steps = {
        "zs": ["zs", "zs", "zs"],
        "zs_b2b": ["zs", "b2b", "b2b"],
        "zs_b2b_hg": ["zs", "b2b", "hg+b2b"],
        "zs_hg": ["zs", "zs", "hg"],
        "zs_correction": ["zs", "correction", "correction"],
        "zs_correction_b2b": ["zs", "correction+b2b", "correction+b2b"],
    }[strategy]
    plan = plan_of(model, strategy)
    assert plan.classes == dict(enumerate(CLASSES))
    assert plan.treatment == dict(enumerate(steps))
    assert plan_of(model, strategy, drop=0.34).treatment == {0: steps[0]}
    original = [weights(model, i) for i in range(3)]
    prepare(model, strategy)
    assert set(plan_in(model).outcomes) == {i for i in range(3) if steps[i] != "zs"}
    assert [same(weights(model, i), original[i]) for i in range(3)] == [step == "zs" for step in steps]
    for i, outcome in plan_in(model).outcomes.items():
        assert list(outcome["loss"]) == ["zs", *steps[i].split("+")]


@pytest.mark.parametrize("strategy", STRATEGY_NAMES)
def test_calibration_is_asked_for_in_words_where_it_is_needed(model: TensorParallelLM, strategy: str) -> None:
    plan = plan_of(model, strategy)
    if strategy == "zs":
        assert spd.apply(model, plan).dropped == (0, 1, 2)
        return
    with pytest.raises(spd.UserError, match=f"strategy={strategy} needs calibration samples"):
        spd.apply(model, plan)
    for few in (tokens(7, 10), tokens(16, 1), tokens(16, 10)[0]):
        with pytest.raises(spd.UserError, match="too little to treat blocks with"):
            spd.apply(model, plan, few)
    assert model.dropped == ()
    assert model.plan is None
    only_isb = spd.apply(model, plan_of(model, strategy, drop=0.34))
    assert only_isb.dropped == (0,)


def test_other_weights_another_tp_size_and_real_ranks_are_refused(
    tiny_llama: Path, model: TensorParallelLM, tmp_path: Path
) -> None:
    plan = plan_of(model, "zs_b2b")
    with pytest.raises(spd.UserError, match="other weights of the same shape"):
        spd.apply(spd.load(make_checkpoint(tmp_path / "other", "llama", seed=1), tp_size=2), plan, CALIBRATION)
    with pytest.raises(spd.UserError, match=r"made for tp_size=2 and the model is loaded with tp_size=4"):
        spd.apply(spd.load(tiny_llama, tp_size=4), plan, CALIBRATION)
    real: Any = types.SimpleNamespace(size=2, local=[0])
    model.ranks = real
    with pytest.raises(spd.UserError, match="load it with ranks='virtual'"):
        spd.apply(model, plan, CALIBRATION)


@pytest.mark.parametrize("strategy", STRATEGY_NAMES[1:])
def test_the_plan_records_what_was_done_and_survives_a_file(
    model: TensorParallelLM, strategy: str, tmp_path: Path
) -> None:
    plan = plan_in(prepare(model, strategy, seed=7))
    plan.save(tmp_path / "plan.json")
    again = DropPlan.load(tmp_path / "plan.json")
    assert again.outcomes.keys() == plan.outcomes.keys()
    assert again.treatment == plan.treatment
    recovery = again.recovery
    assert recovery is not None
    assert (recovery["seed"], recovery["samples"], recovery["heldout_samples"]) == (7, [32, 12], 4)
    assert recovery["calibration"] == hashlib.sha256(CALIBRATION.numpy().tobytes()).hexdigest()
    assert recovery.get("distillation") == (dataclasses.asdict(QUICK) if "b2b" in strategy else None)
    if "correction" in strategy:
        assert recovery["correction"] == {"kind": "shift", "rank": 8, "ridge": 1e-2}
    for outcome in again.outcomes.values():
        best = outcome["loss"][outcome["kept"].split("+")[-1]]
        assert outcome["kept"] != "zs"
        assert best < outcome["loss"]["zs"] or strategy == "zs_hg"
        assert isinstance(outcome["notes"], list)


@pytest.mark.parametrize("strategy", STRATEGY_NAMES[1:])
def test_a_plan_that_was_applied_gives_the_same_model_again_or_says_that_the_samples_are_others(
    tiny_llama: Path, strategy: str, tmp_path: Path
) -> None:
    first = prepare(spd.load(tiny_llama, tp_size=4), strategy, seed=7)
    plan_in(first).save(tmp_path / "plan.json")
    plan, ids = DropPlan.load(tmp_path / "plan.json"), tokens(2, 9)
    again = spd.apply(spd.load(tiny_llama, tp_size=4), plan, CALIBRATION)
    assert plan_in(again).recovery == plan_in(first).recovery
    assert_same(again(ids), first(ids))
    with pytest.raises(spd.UserError, match=r"applied before with other calibration samples, \[32, 12\] token ids"):
        spd.apply(spd.load(tiny_llama, tp_size=4), plan, tokens(32, 12, seed=8))
    faster = spd.apply(spd.load(tiny_llama, tp_size=4), plan, CALIBRATION, distillation=DistillationConfig(epochs=1))
    recovery = plan_in(faster).recovery
    assert recovery is not None
    assert recovery.get("distillation", {}).get("epochs") == (1 if "b2b" in strategy else None)


def test_published_learning_rates_are_the_defaults(checkpoint: Callable[..., Path], family: str) -> None:
    model = spd.load(checkpoint(family), tp_size=2)
    prepare(model, "zs_b2b", 0.67, distillation=DistillationConfig(epochs=1))
    recovery = plan_in(model).recovery
    assert recovery is not None
    assert recovery["distillation"]["learning_rate"] == (1e-6 if family == "opt" else 5e-5)


@pytest.mark.parametrize("strategy", ["zs_b2b_hg", "zs_correction_b2b"])
def test_recorded_losses_are_those_of_the_blocks_on_samples_held_out(
    checkpoint: Callable[..., Path], family: str, strategy: str
) -> None:
    model, original = (spd.load(checkpoint(family), tp_size=2) for _ in range(2))
    prepare(model, strategy)
    for i, outcome in plan_in(model).outcomes.items():
        x, inputs = block_inputs(original, i, CALIBRATION[-4:])
        wanted = teacher(original.blocks[i], x, inputs)
        with torch.no_grad():
            losses = [
                (block.spd(x, block.attention(x, **inputs)) - wanted).square().mean().item()
                for block in (original.blocks[i], model.blocks[i])
            ]
        last = outcome["loss"][outcome["kept"].split("+")[-1]]
        assert losses == [pytest.approx(outcome["loss"]["zs"], rel=1e-4), pytest.approx(last, rel=1e-4)]
        assert last < outcome["loss"]["zs"]


def test_losses_are_those_of_the_weights_as_rounded_to_the_models_type(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "half", "llama", dtype=torch.bfloat16)
    model = prepare(spd.load(folder, tp_size=2), "zs_b2b", 0.67)
    wide = spd.load(folder, tp_size=2, dtype="float32")
    x, inputs = model.embed(CALIBRATION[-4:])  # rotations are those of the short type
    x = teacher(wide.blocks[0], x.float(), inputs)
    treated = wide.read_block(1, {name: t.float() for name, t in model.layer_tensors(model.blocks[1]).items()})
    with torch.no_grad():
        error = treated.spd(x, treated.attention(x, **inputs)) - teacher(wide.blocks[1], x, inputs)
    assert plan_in(model).outcomes[1]["loss"]["b2b"] == pytest.approx(error.square().mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("losses", "kept"), [((1.0, 2.0, 0.5), "hg+b2b"), ((1.0, 2.0, 1.5), "zs"), ((1.0, 0.7, 0.9), "hg")]
)
def test_grouping_is_kept_if_what_comes_of_it_is_better_than_zero_shot(
    model: TensorParallelLM, monkeypatch: pytest.MonkeyPatch, losses: tuple[float, ...], kept: str
) -> None:
    plan = dataclasses.replace(plan_of(model, "zs_b2b_hg"), treatment={0: "zs", 1: "zs", 2: "hg+b2b"})
    given = iter(losses)
    monkeypatch.setattr(b2b, "distill", lambda *_: {"stopped": None})
    monkeypatch.setattr(b2b, "block_loss", lambda *_: next(given))
    original = weights(model, 2)
    spd.apply(model, plan, CALIBRATION, say=lambda _: None)
    outcome = plan_in(model).outcomes[2]
    assert (outcome["kept"], tuple(outcome["loss"].values())) == (kept, losses)
    assert same(weights(model, 2), original) == (kept == "zs")
    assert any(note.startswith("Kept zero-shot") for note in outcome["notes"]) == (kept == "zs")


@pytest.mark.parametrize("strategy", STRATEGY_NAMES)
@pytest.mark.parametrize(("kind", "tp_size"), [("llama", 4), ("opt", 4), ("qwen2", 4), ("qwen2", 8)])
def test_a_prepared_model_is_saved_and_loaded_to_the_bit(
    checkpoint: Callable[..., Path], kind: str, strategy: str, tp_size: int, tmp_path: Path
) -> None:
    model, ids = prepare(spd.load(checkpoint(kind), tp_size=tp_size), strategy), tokens(2, 11)
    model.save_pretrained(tmp_path / "out")
    again = spd.load(tmp_path / "out")
    assert torch.equal(again(ids), model(ids))
    assert (again.tp_size, again.dropped) == (tp_size, model.dropped)
    assert plan_in(again).outcomes.keys() == plan_in(model).outcomes.keys()
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loaded[1][problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_a_prepared_model_can_be_saved_again(model: TensorParallelLM, tmp_path: Path) -> None:
    ids = tokens(2, 11)
    prepare(model, "zs_correction_b2b")
    model.save_pretrained(tmp_path / "once")
    spd.load(tmp_path / "once").save_pretrained(tmp_path / "twice")
    again = spd.load(tmp_path / "twice")
    assert torch.equal(again(ids), model(ids))
    assert plan_in(again).distilled == plan_in(model).distilled != set()


@pytest.mark.parametrize("loaded", [False, True])
def test_distilled_blocks_dropped_by_hand_are_not_undropped_either(
    model: TensorParallelLM, loaded: bool, tmp_path: Path
) -> None:
    prepare(model, "zs_b2b", 0.67)
    if loaded:
        model.save_pretrained(tmp_path / "plan")
        model = spd.load(tmp_path / "plan")
    model.drop([0, 1, 2])
    model.save_pretrained(tmp_path / "by_hand")
    again = spd.load(tmp_path / "by_hand")
    with pytest.raises(spd.UserError, match="distilled"):
        again.drop([])


@pytest.mark.parametrize("harm", [None, truncate, empty])
def test_a_file_of_corrections_that_is_damaged_or_missing_is_refused_in_words(
    model: TensorParallelLM, harm: Callable[[bytes], bytes] | None, tmp_path: Path
) -> None:
    prepare(model, "zs_correction").save_pretrained(tmp_path / "out")
    file = tmp_path / "out" / correction.CORRECTION_FILE
    if harm is None:
        file.unlink()
    else:
        file.write_bytes(harm(file.read_bytes()))
    with pytest.raises(spd.UserError, match=correction.CORRECTION_FILE):
        spd.load(tmp_path / "out")


@pytest.mark.parametrize("strategy", STRATEGY_NAMES)
def test_undropping_gives_the_original_back_and_dropping_the_treated_blocks(tiny_qwen2: Path, strategy: str) -> None:
    model, ids = spd.load(tiny_qwen2, tp_size=4), tokens(2, 11)
    original = model(ids)
    prepare(model, strategy)
    treated, plan = model(ids), model.plan
    model.drop([])
    assert torch.equal(model(ids), original)
    assert (model.plan, plan) == (None, plan)
    model.drop([2])
    assert not torch.equal(model(ids), original)
    model.drop([0, 1, 2])
    assert torch.equal(model(ids), treated)


@pytest.mark.parametrize("strategy", ["zs_b2b", "zs_b2b_hg", "zs_correction_b2b"])
def test_a_loaded_model_refuses_to_undrop_distilled_blocks(
    model: TensorParallelLM, strategy: str, tmp_path: Path
) -> None:
    prepare(model, strategy).save_pretrained(tmp_path / "out")
    again, ids = spd.load(tmp_path / "out"), tokens(2, 11)
    assert plan_in(again).distilled == {1, 2}
    for blocks in ([], [0, 2], [1]):
        with pytest.raises(spd.UserError, match=r"was distilled to run dropped.* load the original model"):
            again.drop(blocks)
        assert again.dropped == (0, 1, 2)
    again.drop([1, 2])
    again.drop([0, 1, 2])
    assert torch.equal(again(ids), model(ids))


@pytest.mark.parametrize("strategy", ["zs_hg", "zs_correction"])
def test_a_loaded_model_may_undrop_grouped_and_corrected_blocks(
    checkpoint: Callable[..., Path], family: str, strategy: str, tmp_path: Path
) -> None:
    model, ids = prepare(spd.load(checkpoint(family), tp_size=2), strategy), tokens(2, 11)
    model.save_pretrained(tmp_path / "out")
    again = spd.load(tmp_path / "out")
    again.drop([])
    assert_same(again(ids), dense_logits(checkpoint(family), ids))
    again.drop([0, 1, 2])
    assert torch.equal(again(ids), model(ids))


def test_a_rate_that_is_too_high_leaves_blocks_zero_shot_and_says_why(model: TensorParallelLM, tmp_path: Path) -> None:
    original, said = [weights(model, i) for i in range(3)], list[str]()
    prepare(model, "zs_b2b", distillation=DistillationConfig(learning_rate=1e30), say=said.append)
    assert [same(weights(model, i), original[i]) for i in range(3)] == [True, True, True]
    assert {outcome["kept"] for outcome in plan_in(model).outcomes.values()} == {"zs"}
    for i in (1, 2):
        assert any(f"Block {i}: Distillation stopped: the loss was no number in epoch" in line for line in said)
        assert any(line.startswith(f"Block {i}: b2b was not kept: held-out loss") for line in said)
    model.save_pretrained(tmp_path / "out")
    spd.load(tmp_path / "out").drop([])  # nothing of the original is lost


def test_a_correction_that_makes_it_worse_is_not_kept(model: TensorParallelLM, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = correction.fit

    def spoilt(*args: Any) -> correction.Correction:
        fix = fit(*args)
        fix.constant += 100
        return fix

    monkeypatch.setattr(correction, "fit", spoilt)
    prepare(model, "zs_correction_b2b")
    for i, outcome in plan_in(model).outcomes.items():
        assert outcome["kept"] == "b2b"
        assert "correction was not kept" in outcome["notes"][0]
        assert model.blocks[i].correction is None


def test_blocks_are_treated_alone_so_that_they_are_the_same_at_every_drop_fraction(tiny_llama: Path) -> None:
    few, all_ = (prepare(spd.load(tiny_llama, tp_size=2), "zs_b2b", drop) for drop in (0.67, 1.0))
    assert few.dropped == (0, 1)
    assert same(weights(few, 1), weights(all_, 1))
    assert plan_in(few).outcomes[1]["loss"] == plan_in(all_).outcomes[1]["loss"]


def test_progress_counts_up_to_its_end(model: TensorParallelLM) -> None:
    seen: list[tuple[int, int]] = []
    prepare(model, "zs_b2b_hg", on_progress=lambda *step: seen.append(step))
    assert list(dict.fromkeys(seen)) == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("strategy", ["zs_b2b_hg", "zs_correction_b2b"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_are_prepared_saved_and_loaded(tmp_path: Path, strategy: str, dtype: torch.dtype) -> None:
    folder, ids = make_checkpoint(tmp_path / "half", "qwen2", dtype=dtype), tokens(2, 11)
    cache = BlockCache(tmp_path / "blocks")
    model = prepare(spd.load(folder, tp_size=2), strategy, cache=cache)
    model.save_pretrained(tmp_path / "out")
    again = spd.load(tmp_path / "out")
    assert again.dtype == dtype
    assert torch.equal(again(ids), model(ids))
    assert again(ids).isfinite().all()
    assert torch.equal(prepare(spd.load(folder, tp_size=2), strategy, cache=cache)(ids), model(ids))
    for file in itertools.chain(cache.folder.glob("*.safetensors"), (tmp_path / "out").glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            kinds = {stored.get_tensor(name).dtype for name in stored.keys() if "correction" not in name}  # noqa: SIM118
        assert kinds == {dtype}
    for block in again.blocks:
        assert block.correction is None or {t.dtype for t in block.correction.tensors().values()} == {dtype}


def test_a_second_plan_is_refused(model: TensorParallelLM) -> None:
    prepare(model, "zs_b2b")
    with pytest.raises(spd.UserError, match="was treated already; load the original"):
        prepare(model, "zs")


def test_a_folder_of_distilled_blocks_is_not_prepared_again(model: TensorParallelLM, tmp_path: Path) -> None:
    prepare(model, "zs_b2b").save_pretrained(tmp_path / "out")
    with pytest.raises(spd.UserError):
        prepare(spd.load(tmp_path / "out"), "zs_b2b")
    with pytest.raises(spd.UserError, match="distilled"):
        spd.measure_sensitivity(spd.load(tmp_path / "out"), CALIBRATION)


@torch.inference_mode()
def test_a_model_is_prepared_within_inference_mode_too(model: TensorParallelLM) -> None:
    assert plan_in(prepare(model, "zs_b2b")).outcomes


@pytest.mark.parametrize("strategy", ["zs_hg", "zs_correction", "zs_b2b"])
def test_progress_reaches_its_end_whatever_is_done(model: TensorParallelLM, strategy: str, tmp_path: Path) -> None:
    plan, cache = plan_of(model, strategy), BlockCache(tmp_path)
    spd.apply(model, plan, CALIBRATION, distillation=QUICK, cache=cache)
    seen: list[tuple[int, int]] = []
    again = spd.load(model.folder, tp_size=model.tp_size)
    spd.apply(again, plan, CALIBRATION, distillation=QUICK, cache=cache, on_progress=lambda *at: seen.append(at))
    assert seen[-1][0] == seen[-1][1]
    assert seen == sorted(seen)


def test_the_caller_keeps_its_model_and_plan(model: TensorParallelLM) -> None:
    plan = plan_of(model, "zs_b2b")
    assert spd.apply(model, plan, CALIBRATION, distillation=QUICK) is model
    assert (plan.recovery, plan.outcomes) == (None, {})
    assert plan_in(model) is not plan
