"""Block-to-block distillation of tiny blocks: what moves, what does not, and when it is given up."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_checkpoint
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from treated import block_inputs, plan_of, same, teacher, tokens

import spd
from spd.block import Block
from spd.config import CorrectionConfig, DistillationConfig
from spd.strategies import b2b, recovery
from spd.strategies.correction import fit

QUICK = DistillationConfig(learning_rate=3e-3, epochs=3)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


class Lesson:
    """Block 1 of a model, and what it is to learn."""

    def __init__(self, folder: Path, tp_size: int, samples: int = 16, heldout: int = 4) -> None:
        self.model = spd.load(folder, tp_size=tp_size)
        self.x, self.inputs = block_inputs(self.model, 1, tokens(samples, 10))
        self.targets = teacher(self.model.blocks[1], self.x, self.inputs)
        self.heldout = heldout
        self.student = self.model.read_block(1)

    def learn(self, rate: float = 3e-3, epochs: int = 3, seed: int = 0, **changes: Any) -> dict[str, Any]:
        given = dict(targets=self.targets, heldout=self.heldout) | changes
        settings = DistillationConfig(epochs=epochs, batch_size=4)
        return b2b.distill(
            self.student, self.x, inputs=self.inputs, settings=settings, learning_rate=rate, seed=seed, **given
        )

    def heldout_loss(self, block: Block) -> float:
        with torch.no_grad():
            output = block.spd(self.x, block.attention(self.x, **self.inputs))
        return (output - self.targets)[-self.heldout :].square().mean().item()


@pytest.mark.parametrize("tp_size", [2, 8])
def test_distilling_lowers_the_loss_on_samples_not_trained_on(
    checkpoint: Callable[..., Path], family: str, tp_size: int
) -> None:
    lesson = Lesson(checkpoint(family), tp_size, samples=32)
    seen = []
    before = lesson.heldout_loss(lesson.student)
    outcome = lesson.learn(epochs=4, on_epoch=lambda done, epochs: seen.append((done, epochs)))
    after = lesson.heldout_loss(lesson.student)
    assert after < 0.9 * before
    assert (outcome["loss"][0], min(outcome["loss"])) == (pytest.approx(before), pytest.approx(after))
    assert outcome["loss"].index(min(outcome["loss"])) == outcome["best_epoch"] > 0
    assert (len(outcome["loss"]), outcome["stopped"]) == (5, None)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_the_best_epoch_is_kept_and_not_the_last(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lesson = Lesson(tiny_llama, 4)
    losses = iter([1.0, 0.8, 0.5, 0.9, 0.6])
    monkeypatch.setattr(b2b, "block_loss", lambda *_: next(losses))
    states: list[dict[str, Tensor]] = []
    outcome = lesson.learn(epochs=4, on_epoch=lambda *_: states.append(state(lesson.student)))
    assert outcome["best_epoch"] == 2
    assert [same(state(lesson.student), other) for other in states] == [False, True, False, False]


@pytest.mark.parametrize(
    ("rate", "sentence"), [(1.0, "over 10 times the first in epoch 1 at learning rate 1"), (1e30, "no number in epoch")]
)
def test_a_rate_that_is_too_high_is_given_up_and_the_original_weights_are_kept_to_the_bit(
    tiny_opt: Path, rate: float, sentence: str
) -> None:
    lesson = Lesson(tiny_opt, 4)
    before = state(lesson.student)
    outcome = lesson.learn(rate, epochs=5)
    assert same(state(lesson.student), before)
    assert outcome["best_epoch"] == 0
    assert len(outcome["loss"]) < 6
    assert sentence in outcome["stopped"]


def test_no_number_among_the_targets_stops_it_after_an_epoch(tiny_llama: Path) -> None:
    lesson = Lesson(tiny_llama, 4)
    before = state(lesson.student)
    lesson.targets[3, 2, 1] = math.nan
    outcome = lesson.learn(epochs=5)
    assert len(outcome["loss"]) == 2
    assert "no number in epoch 1" in outcome["stopped"]
    assert same(state(lesson.student), before)


@pytest.mark.parametrize("tp_size", [2, 8])
def test_norms_stay_one_parameter_and_shapes_and_flags_as_they_were(
    checkpoint: Callable[..., Path], family: str, tp_size: int
) -> None:
    lesson = Lesson(checkpoint(family), tp_size)
    before = state(lesson.student)
    lesson.learn()
    after = state(lesson.student)
    assert {name: t.shape for name, t in before.items()} == {name: t.shape for name, t in after.items()}
    assert not any(torch.equal(before[name], after[name]) for name in before if not name.endswith("k_proj.bias"))
    assert not any(p.requires_grad or p.grad is not None for p in lesson.student.parameters())


def test_a_distilled_block_is_what_its_whole_tensors_say(checkpoint: Callable[..., Path], family: str) -> None:
    lesson = Lesson(checkpoint(family), 8)
    lesson.learn()
    merged = lesson.model.layer_tensors(lesson.student)
    assert same(state(lesson.model.read_block(1, merged)), state(lesson.student))


def test_nothing_of_the_model_moves_but_a_copy_of_the_block(tiny_opt: Path) -> None:
    lesson = Lesson(tiny_opt, 4)
    before = state(lesson.model)
    lesson.learn()
    assert same(state(lesson.model), before)


def test_one_rank_has_nothing_to_learn(checkpoint: Callable[..., Path], family: str) -> None:
    lesson = Lesson(checkpoint(family), 1)
    assert lesson.learn(epochs=1)["loss"][0] < 1e-9 * lesson.targets.square().mean().item()


def test_the_seed_decides_the_result(tiny_llama: Path) -> None:
    def learned(seed: int) -> dict[str, Tensor]:
        lesson = Lesson(tiny_llama, 4)
        lesson.learn(seed=seed)
        return state(lesson.student)

    first = learned(3)
    assert same(learned(3), first)
    assert not same(learned(4), first)


def test_the_rate_warms_up_and_falls_along_a_cosine_to_zero(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def spy(optimizer: torch.optim.AdamW, *args: Any) -> Any:
        (group,) = optimizer.param_groups
        assert (group["betas"], group["weight_decay"]) == ((0.9, 0.95), 0.0)
        rates.append(group["lr"])
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    Lesson(tiny_llama, 2).learn(rate=1e-4, epochs=20)  # of 3 batches
    warm = [1e-4 * (i + 1) / 3 for i in range(3)]
    assert rates == pytest.approx(warm + [0.5e-4 * (1 + math.cos(math.pi * i / 57)) for i in range(57)])


def test_the_samples_held_out_are_not_trained_on(tiny_llama: Path) -> None:
    def learned(noise: float) -> dict[str, Tensor]:
        lesson = Lesson(tiny_llama, 4)
        lesson.x[-4:] += noise
        lesson.targets = teacher(lesson.model.blocks[1], lesson.x, lesson.inputs)
        assert lesson.learn()["best_epoch"] == 3
        return state(lesson.student)

    assert same(learned(0.0), learned(0.01))


def test_with_products_in_bfloat16_the_losses_are_those_of_the_weights_as_they_are_then(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Autocast's own cache would go on using the weights as they were before the first step.
    monkeypatch.setattr(recovery, "SHORT_PRODUCTS_ON", ("cpu",))
    model = spd.load(checkpoint("llama"), tp_size=4, dtype="bfloat16")
    settings = DistillationConfig(learning_rate=3e-3, epochs=5, batch_size=4)
    spd.apply(model, plan_of(model, "zs_b2b"), tokens(16, 12), distillation=settings)
    for outcome in model.outcomes.values():
        learned, kept = outcome["b2b"]["loss"], outcome["loss"]["b2b"]
        assert learned[outcome["b2b"]["best_epoch"]] == pytest.approx(kept, rel=0.02), "judged as it is kept"


@pytest.mark.parametrize(
    ("kind", "dtype"), [("llama", torch.float16), ("opt", torch.float16), ("qwen2", torch.bfloat16)]
)
def test_half_precision_blocks_are_distilled_in_float32_and_kept_in_their_own_type(
    tmp_path: Path, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = spd.load(make_checkpoint(tmp_path / "half", kind, dtype=dtype), tp_size=4)
    types: set[torch.dtype] = set()
    distill = b2b.distill

    def spy(student: Block, *args: Any, **options: Any) -> dict[str, Any]:
        types.update(p.dtype for p in student.parameters())
        types.update(t.dtype for t in args[:2])
        return distill(student, *args, **options)

    monkeypatch.setattr(b2b, "distill", spy)
    spd.apply(model, plan_of(model, "zs_b2b"), tokens(16, 10), distillation=QUICK)
    assert types == {torch.float32}
    assert model.plan is not None
    assert model.plan.distilled
    for block in model.blocks:
        assert {p.dtype for p in block.parameters()} == {dtype}


class Calling(nn.Module):
    """A function of a layer, so that autograd can be given other weights for it."""

    def __init__(self, layer: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layer, self.function = layer, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer, x)


@pytest.mark.parametrize("tp_size", [1, 2, 8])
def test_gradients_are_those_of_the_papers_equation(checkpoint: Callable[..., Path], family: str, tp_size: int) -> None:
    # By autograd through transformers' own whole layer, with all but rank i's columns of the output layers masked.
    lesson = Lesson(checkpoint(family), tp_size)
    row, student = lesson.model.family, lesson.student
    for parameter in student.parameters():
        parameter.requires_grad_(True)
    output = student.spd(lesson.x, student.attention(lesson.x, **lesson.inputs))
    wanted = lesson.targets + 0.1 * output.detach()  # with one rank, too, there is a gradient
    F.mse_loss(output, wanted).backward()
    for parameter in student.parameters():
        assert parameter.grad is not None
        parameter.data = parameter.grad
    grads = lesson.model.layer_tensors(student)

    def attention(layer: Any, x: Tensor) -> Tensor:
        return layer.self_attn(hidden_states=layer.get_submodule(row.attention_norm)(x), **lesson.inputs)[0]

    def mlp(layer: Any, u: Tensor) -> Tensor:
        return row.mlp(layer, layer.get_submodule(row.mlp_norm)(u))

    decoder: Any = AutoModelForCausalLM.from_pretrained(checkpoint(family)).get_submodule(row.decoder)
    layer = decoder.layers[1]
    parameters = dict(layer.named_parameters())
    outputs = (row.attention_output, row.mlp_output)
    biases = [parameters.get(f"{name}.bias", torch.zeros(32)) for name in outputs]
    total = torch.zeros_like(lesson.x)
    for i in range(tp_size):
        given = {f"layer.{name}.bias": torch.zeros(32) for name in outputs if f"{name}.bias" in parameters}
        for name in outputs:
            weight = parameters[f"{name}.weight"]
            share = weight.shape[1] // tp_size
            given[f"layer.{name}.weight"] = weight * (torch.arange(weight.shape[1]) // share == i)
        p_i = functional_call(Calling(layer, attention), given, lesson.x)
        total = total + p_i + functional_call(Calling(layer, mlp), given, lesson.x + p_i + biases[0])
    F.mse_loss(lesson.x + biases[0] + total + biases[1], wanted).backward()
    assert grads.keys() == parameters.keys()
    scale = max(p.grad.abs().max().item() for p in parameters.values())
    for name, parameter in parameters.items():
        assert (grads[name] - parameter.grad).abs().max() <= 1e-4 * scale, name


def test_a_correction_takes_part_and_stays_as_it_is(tiny_llama: Path) -> None:
    lesson = Lesson(tiny_llama, 4)
    fix = fit(lesson.model.read_block(1), lesson.x[:-4], lesson.inputs, CorrectionConfig())
    plain, lesson.student = lesson.student, lesson.model.read_block(1, correction=fix)
    before = {name: t.clone() for name, t in fix.tensors().items()}
    assert lesson.heldout_loss(lesson.student) != lesson.heldout_loss(plain)
    outcome = lesson.learn()
    assert outcome["loss"][outcome["best_epoch"]] == pytest.approx(lesson.heldout_loss(lesson.student))
    assert same(fix.tensors(), before)


def test_only_the_distilled_block_of_a_model_changes(checkpoint: Callable[..., Path], family: str) -> None:
    model = spd.load(checkpoint(family), tp_size=4)
    before = state(model)
    spd.apply(model, plan_of(model, "zs_b2b", drop=0.67), tokens(16, 10), distillation=QUICK)
    changed = {name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])}
    assert model.dropped == (0, 1)
    assert model.plan is not None
    assert model.plan.distilled == {1}
    assert changed
    assert all(".layers.1." in name for name in changed)


def test_the_last_block_can_learn_what_the_head_sees(checkpoint: Callable[..., Path], family: str) -> None:
    samples = tokens(32, 10)
    prepared, outcomes = {}, {}
    for after in (False, True):
        model = spd.load(checkpoint(family), tp_size=2)
        plan = plan_of(model, "zs_b2b")
        spd.apply(model, plan, samples, distillation=dataclasses.replace(QUICK, after_final_norm=after))
        prepared[after], outcomes[after] = model, model.outcomes
    # Only the last block's loss is another one.
    assert outcomes[True][1]["loss"] == outcomes[False][1]["loss"]
    original = spd.load(checkpoint(family), tp_size=2)
    x, inputs = block_inputs(original, 2, samples)
    targets = original.final_norm(teacher(original.blocks[2], x, inputs))
    losses = {}
    for after, model in prepared.items():
        block = model.blocks[2]
        with torch.no_grad():
            seen = original.final_norm(block.spd(x, block.attention(x, **inputs)))
        losses[after] = (seen - targets)[-4:].square().mean().item()
    assert outcomes[True][2]["loss"]["b2b"] == pytest.approx(losses[True], rel=1e-4)
    assert outcomes[True][2]["loss"]["b2b"] < outcomes[True][2]["loss"]["zs"]
    assert losses[True] != losses[False]
    norms = [model.final_norm.weight for model in (prepared[True], original)]
    assert torch.equal(*norms)
