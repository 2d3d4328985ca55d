"""A point whose dropped blocks are treated: what it says, shares and keeps."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import with_drop

from spd import inputs, results, steps
from spd.config import RunConfig, Strategy
from spd.loading import load
from spd.perplexity import perplexity


@pytest.mark.parametrize("strategy", list(Strategy))
def test_a_strategy_that_treats_no_block_of_a_plan_says_so(
    config: RunConfig, run: Any, output: io.StringIO, strategy: Strategy
) -> None:
    config.strategy.name, config.strategy.tau1, config.strategy.tau2 = strategy, 1e6, 1e9
    assert run(config)["status"] == "done"
    said = f"{strategy.name} is zs here: no dropped block is sensitive enough to be treated otherwise (strategy.tau1=1e"
    assert (said in output.getvalue()) == (strategy is not Strategy.zs)


def test_grouping_heads_of_no_block_is_said_to_be_distillation_alone(
    config: RunConfig, run: Any, output: io.StringIO
) -> None:
    config.strategy.tau1, config.strategy.tau2, config.data.recovery_samples = -1e9, 1e9, 16
    config.model.distillation.epochs = 1
    for strategy in (Strategy.zs_b2b, Strategy.zs_b2b_hg):
        config.strategy.name = strategy
        assert run(config)["status"] == "done"
    assert output.getvalue().count("is zs_b2b here") == 1
    assert "zs_b2b_hg is zs_b2b here: no dropped block is sensitive enough" in output.getvalue()


def test_treated_blocks_are_in_the_record_and_serve_other_fractions(
    config: RunConfig, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.strategy.name, config.strategy.tau1 = Strategy.zs_correction_b2b, -1e9
    config.model.distillation.learning_rate, config.model.distillation.epochs = 1e-3, 1
    config.data.recovery_samples, config.drop = 16, 1.0
    record = run(config)
    assert record["status"] == "done", record["error"]
    outcomes = record["plan"]["outcomes"]
    assert set(outcomes) == {"0", "1", "2"}
    assert all(outcome["loss"].keys() == {"zs", "correction", "b2b"} for outcome in outcomes.values())
    assert record["plan"]["recovery"]["seed"] == config.seed
    assert run(with_drop(config, 0.0))["perplexity"]["value"] != record["perplexity"]["value"]
    monkeypatch.setattr("spd.strategies.b2b.distill", None)  # not called again
    half = run(with_drop(config, 0.67))
    assert half["status"] == "done", half["error"]
    assert len(half["plan"]["outcomes"]) == 2
    assert all(outcomes[block] == outcome for block, outcome in half["plan"]["outcomes"].items())


def test_the_prepared_model_is_kept_where_it_is_asked_for_also_of_a_point_that_was_done(
    config: RunConfig, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.strategy.name, config.strategy.tau1 = Strategy.zs_correction_b2b, -1e9
    config.model.distillation.learning_rate, config.model.distillation.epochs = 1e-3, 1
    config.data.recovery_samples, config.drop = 16, 0.67
    first = run(config)
    folder = tmp_path / "runs" / "points" / first["key"] / "model"
    assert not folder.exists()
    config.save_model = True
    monkeypatch.setattr("spd.strategies.b2b.distill", None)  # not called again
    again = run(config)
    assert again == json.loads(json.dumps(first))
    model = load(folder, tp_size=config.parallel.tp_size)
    assert list(model.dropped) == first["plan"]["dropped"]
    samples = inputs.samples_of(config, "heldout_path", Path(config.model.path))
    assert perplexity(model, samples) == pytest.approx(first["perplexity"]["value"], rel=1e-5)
    monkeypatch.setattr(steps, "load", None)  # and what is there is not made again
    assert run(config) == again


def test_a_model_that_cannot_be_saved_fails_the_point_and_leaves_its_numbers(
    config: RunConfig, run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refused(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    first = run(config)
    config.save_model = True
    with monkeypatch.context() as patch:
        patch.setattr("spd.model.TensorParallelLM.save_pretrained", refused)
        again = run(config)
    assert (again["status"], again["key"]) == ("failed", None)
    assert "Permission denied" in again["error"]
    assert results.read_record(tmp_path / "runs" / "points" / first["key"] / "result.json")["status"] == "done"
    assert run(config)["status"] == "done"


def test_blocks_treated_with_longer_samples_are_other_ones(config: RunConfig, run: Any) -> None:
    config.strategy.name, config.strategy.tau1 = Strategy.zs_correction, -1e9
    config.data.recovery_samples = 16
    lengths = []
    for length in (16, 8):
        config.data.sequence_length = length
        record = run(config)
        assert record["status"] == "done", record["error"]
        lengths.append(record["plan"]["recovery"]["samples"])
    assert lengths == [[16, 16], [16, 8]]
