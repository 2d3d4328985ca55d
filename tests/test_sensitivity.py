"""Sensitivities against the definition, evaluated the slow way."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import spd
from spd.perplexity import perplexity
from spd.plan import DropPlan, ModelIdentity
from spd.sensitivity import SensitivityReport


@pytest.fixture
def samples() -> Tensor:
    """Random calibration samples [5, 12]."""
    return torch.randint(4, 64, (5, 12), generator=torch.Generator().manual_seed(3))


def report(sensitivities: list[float], dense: float = 10.0) -> SensitivityReport:
    identity = ModelIdentity("llama", len(sensitivities), 32, "0" * 64)
    return SensitivityReport("suffix", 4, sensitivities, dense, 100, identity)


def test_perplexity_equals_the_loss_of_transformers(tiny_llama: Path, samples: Tensor) -> None:
    with torch.inference_mode():
        loss = AutoModelForCausalLM.from_pretrained(tiny_llama)(samples, labels=samples).loss.item()
    assert perplexity(spd.load(tiny_llama, tp_size=2), samples, batch_size=2) == pytest.approx(math.exp(loss), rel=1e-5)


@pytest.mark.parametrize("order", ["suffix", "alone", "front"])
def test_reusing_the_prefix_gives_the_definition(tiny_opt: Path, samples: Tensor, order: str) -> None:
    model = spd.load(tiny_opt, tp_size=4)
    model.drop([1])

    def ppl(dropped: Any) -> float:
        other = spd.load(tiny_opt, tp_size=4)
        other.drop(list(dropped))
        return perplexity(other, samples)

    expected = {
        "suffix": [ppl(range(i, 3)) - ppl(range(i + 1, 3)) for i in range(3)],
        "alone": [ppl([i]) - ppl([]) for i in range(3)],
        "front": [ppl(range(i + 1)) - ppl(range(i)) for i in range(3)],
    }[order]
    measured = spd.measure_sensitivity(model, samples, order=order, batch_size=2)
    assert measured.sensitivities == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert measured.dense_perplexity == pytest.approx(ppl([]), rel=1e-5)
    assert measured.tokens == 5 * 11
    assert model.dropped == (1,)


@pytest.mark.parametrize("order", ["suffix", "alone", "front"])
def test_a_measurement_costs_half_the_forwards(tiny_llama: Path, samples: Tensor, order: str) -> None:
    model, progress = spd.load(tiny_llama, tp_size=2), []
    calls: dict[str, int] = {"attention": 0, "tp": 0, "spd": 0}

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **inputs: Any) -> Any:
            calls[name] += 1
            return original(*args, **inputs)

        return call

    for block in model.blocks:
        for name in calls:
            setattr(block, name, counted(name, getattr(block, name)))
    spd.measure_sensitivity(model, samples, order, batch_size=5, on_progress=lambda *step: progress.append(step))
    blocks = model.num_blocks
    assert calls["attention"] / blocks == (blocks + 1) / 2
    assert (calls["tp"] + calls["spd"]) / blocks == blocks / 2 + 1.5
    assert progress == [(i, blocks + 1) for i in range(1, blocks + 2)]


@pytest.mark.parametrize(
    ("samples", "message"),
    [(torch.zeros(0, 8).long(), "S >= 1"), (torch.zeros(2, 1).long(), "T >= 2"), (torch.zeros(8).long(), r"\[8\]")],
)
def test_samples_that_predict_nothing_are_refused(tiny_llama: Path, samples: Tensor, message: str) -> None:
    with pytest.raises(spd.UserError, match=message):
        spd.measure_sensitivity(spd.load(tiny_llama), samples)


def test_a_loss_that_is_no_number_is_refused_and_nothing_is_ranked_by_it(tiny_llama: Path, samples: Tensor) -> None:
    model = spd.load(tiny_llama, tp_size=2)
    model.blocks[1].norm2.weight.fill_(torch.nan)
    with pytest.raises(spd.UserError, match="loss is not finite; float16 overflows"):
        spd.measure_sensitivity(model, samples)
    with pytest.raises(spd.UserError, match="loss is not finite"):
        perplexity(model, samples)


def test_an_unknown_order_is_refused(tiny_llama: Path, samples: Tensor) -> None:
    with pytest.raises(spd.UserError, match="order='back' is not known; write one of suffix, alone, front"):
        spd.measure_sensitivity(spd.load(tiny_llama), samples, order="back")


def test_classes_are_parted_by_the_thresholds() -> None:
    r = report([0.05, 0.051, 10.0, 10.1, -3.0])
    assert r.classes(0.05, 10) == ["ISB", "SB", "SB", "ESB", "ISB"]
    with pytest.raises(spd.UserError, match="swap them"):
        r.classes(10, 0.05)


def test_jumps_part_what_a_person_would_part() -> None:
    r = report([0.02, 0.011, 0.03, 30.0, 0.5, -0.2, 0.7, 45.0, 0.015])
    tau1, tau2 = r.jumps()
    assert r.classes(tau1, tau2) == ["ISB", "ISB", "ISB", "ESB", "SB", "ISB", "SB", "ESB", "ISB"]


@pytest.mark.parametrize(
    ("values", "classes"),
    [([0.1], {"ISB"}), ([0.0, -1.0], {"ISB"}), ([0.0, 5.0], {"ISB", "ESB"}), ([0.3] * 4, {"ISB"})],
)
def test_jumps_of_few_or_equal_sensitivities(values: list[float], classes: set[str]) -> None:
    assert set(report(values).classes(*report(values).jumps())) == classes


def test_a_report_comes_back_from_json(tmp_path: Path) -> None:
    r = report([0.1, 0.2, -0.1])
    r.save(tmp_path / "report.json")
    assert SensitivityReport.load(tmp_path / "report.json") == r
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(spd.UserError, match="measure it again"):
        SensitivityReport.load(tmp_path / "report.json")


def test_a_report_draws_itself(tmp_path: Path) -> None:
    report([0.01, 0.2, 20.0]).plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("drop", "dropped"), [(0, []), (0.25, [2]), (0.5, [0, 2]), (0.625, [0, 1, 2]), (1, [0, 1, 2, 3])]
)
def test_the_least_sensitive_blocks_are_dropped_first(drop: float, dropped: list[int]) -> None:
    plan = spd.make_plan(report([0.1, 0.2, -0.1, 30.0]), drop=drop)
    assert plan.dropped == dropped
    assert plan.treatment == dict.fromkeys(dropped, "zs")
    assert plan.classes == {0: "SB", 1: "SB", 2: "ISB", 3: "ESB"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop": 1.1}, "drop=1.1 is outside 0..1"),
        ({"drop": -0.1}, "outside 0..1"),
        ({"drop": 0.5, "strategy": "zs_distil"}, "strategy='zs_distil' is not known; write one of zs, zs_b2b, "),
        ({"drop": 0.5, "tau1": 2, "tau2": 1}, "swap them"),
        ({"drop": 0.5, "thresholds": "knee"}, "write 'tau' or 'jumps'"),
    ],
)
def test_an_impossible_plan_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(spd.UserError, match=message):
        spd.make_plan(report([0.1, 0.2]), **changes)


def test_a_plan_comes_back_from_json(tmp_path: Path) -> None:
    plan = spd.make_plan(report([0.1, 0.2, -0.1]), drop=0.6, thresholds="jumps")
    plan.save(tmp_path / "plan.json")
    assert DropPlan.load(tmp_path / "plan.json") == plan
    (tmp_path / "plan.json").write_text('{"format": 9}')
    with pytest.raises(spd.UserError, match="not a usable plan"):
        DropPlan.load(tmp_path / "plan.json")


def test_a_plan_for_another_model_weights_or_tp_size_is_refused(
    tiny_llama: Path, tiny_opt: Path, tmp_path_factory: pytest.TempPathFactory, samples: Tensor
) -> None:
    from conftest import make_checkpoint

    plan = spd.make_plan(spd.measure_sensitivity(spd.load(tiny_llama, tp_size=4), samples), drop=0.5)
    with pytest.raises(spd.UserError, match=r"made for a llama of 3 blocks .*this model is a opt"):
        spd.apply(spd.load(tiny_opt, tp_size=4), plan)
    with pytest.raises(spd.UserError, match=r"made for tp_size=4 .*loaded with tp_size=2"):
        spd.apply(spd.load(tiny_llama, tp_size=2), plan)
    other = make_checkpoint(tmp_path_factory.mktemp("other") / "model", "llama", seed=1)
    with pytest.raises(spd.UserError, match="other weights of the same shape"):
        spd.apply(spd.load(other, tp_size=4), plan)
