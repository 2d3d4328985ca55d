"""What recovery refuses before any work, and what an interruption or a failed training leaves behind."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from treated import CALIBRATION, QUICK, plan_in, plan_of, prepare, tokens

import spd
from spd.config import CorrectionConfig, DistillationConfig
from spd.model import TensorParallelLM
from spd.strategies import b2b


@pytest.fixture
def model(tiny_llama: Path) -> TensorParallelLM:
    return spd.load(tiny_llama, tp_size=2)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"corrections": CorrectionConfig(rank=0)}, "rank=0 leaves no map"),
        ({"corrections": CorrectionConfig(ridge=-1.0)}, "ridge=-1.0 cannot be"),
        ({"distillation": DistillationConfig(epochs=0)}, "epochs=0 is too small"),
        ({"distillation": DistillationConfig(batch_size=0)}, "batch_size=0 is too small"),
        ({"distillation": DistillationConfig(learning_rate=float("nan"))}, "learning_rate=nan moves nothing"),
        ({"device": "gpu"}, "device='gpu' is not known"),
    ],
)
def test_settings_that_cannot_work_are_refused(model: TensorParallelLM, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(spd.UserError, match=said):
        prepare(model, "zs_correction_b2b", **settings)
    assert model.outcomes == {}


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        (CALIBRATION.float(), "must be token ids from 0 to 63"),
        (CALIBRATION + 60, "must be token ids from 0 to 63"),
        (CALIBRATION - 10, "must be token ids from 0 to 63"),
        (tokens(8, 10_000), "have 10000 tokens and the model takes"),
        (CALIBRATION[:4].repeat(8, 1), "are also among the others"),
    ],
)
def test_samples_that_cannot_treat_or_judge_are_refused(model: TensorParallelLM, samples: Tensor, said: str) -> None:
    with pytest.raises(spd.UserError, match=said):
        spd.apply(model, plan_of(model, "zs_b2b"), samples, distillation=QUICK)


def test_an_interrupted_model_is_the_original_again_and_can_be_prepared(model: TensorParallelLM) -> None:
    def stop(done: int, steps: int) -> None:
        if done == 3:  # within the second block
            raise KeyboardInterrupt

    ids = tokens(2, 11)
    dense = model(ids)
    with pytest.raises(KeyboardInterrupt):
        prepare(model, "zs_b2b", on_progress=stop)
    assert torch.equal(model(ids), dense)
    assert plan_in(prepare(model, "zs_b2b")).outcomes


def test_while_a_model_is_prepared_it_is_not_in_memory_twice(model: TensorParallelLM) -> None:
    def held() -> int:
        blocks = [*model.blocks, *model._recovered.values()]
        return sum({id(p): p.numel() for block in blocks for p in block.parameters()}.values())

    whole, seen = held(), []
    prepare(model, "zs_b2b", on_progress=lambda *_: seen.append(held()))
    assert set(seen) == {whole}


def test_a_training_whose_loss_becomes_no_number_leaves_the_block_zero_shot(
    model: TensorParallelLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    distill, said = b2b.distill, []

    def breaks(*args: Any) -> dict[str, Any]:
        found = distill(*args)  # the weights of a good epoch
        return found | {"loss": [*found["loss"], float("nan")], "stopped": "the loss was no number in epoch 3"}

    monkeypatch.setattr(b2b, "distill", breaks)
    prepare(model, "zs_b2b", say=said.append)
    assert {outcome["kept"] for outcome in plan_in(model).outcomes.values()} == {"zs"}
    assert "no number" in said[0]
    assert "was not kept" in said[1]
    model.save_pretrained(tmp_path / "out")
    strict = json.loads((tmp_path / "out/spd_plan.json").read_text(), parse_constant=pytest.fail)
    assert strict["outcomes"]["1"]["b2b"]["loss"][-1] is None
