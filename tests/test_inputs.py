"""What a point reads is checked before any work."""

import json
from pathlib import Path
from typing import Any

import pytest

from spd import inputs
from spd.config import LatencyKind, RunConfig, Strategy
from spd.errors import UserError
from spd.plan import PLAN_FILE, ModelIdentity, make_plan
from spd.sensitivity import SensitivityReport


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: setattr(c.parallel, "tp_size", 3), "tp_size=3"),
        (lambda c: setattr(c.model, "path", "nowhere"), "nowhere"),
        (lambda c: Path(c.data.path).write_text(""), "no text"),
        (lambda c: Path(c.data.heldout_path).write_text("word1"), "fewer than one sequence"),
        (lambda c: setattr(c.data, "sequence_length", 65), "give at most 64"),
        (lambda c: setattr(c.data, "samples", 100_000_000), ", fewer than data.samples=100000000"),
        (lambda c: setattr(c.latency, "name", LatencyKind.cpu), "latency.prompt_length"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(config: RunConfig, change: Any, said: str, tmp_path: Path) -> None:
    inputs.check(config)
    change(config)
    with pytest.raises(UserError, match=said):
        inputs.check(config)
    assert not (tmp_path / "runs").exists()


def test_weights_that_are_cut_short_or_missing_are_refused_before_any_work(config: RunConfig, own_model: Path) -> None:
    inputs.check(config)
    weights = own_model / "model.safetensors"
    index = {"weight_map": {"a": weights.name, "b": "model-2.safetensors"}}
    (own_model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model-2\.safetensors is named by the weight index but missing"):
        inputs.check(config)
    (own_model / "model.safetensors.index.json").unlink()
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged or was cut short"):
        inputs.check(config)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"intermediate_size": 96}, "tensors do not fit config.json; 'model.layers.0.mlp.down_proj.weight' is"),
        ({"num_hidden_layers": 5}, "tensors of the model are not in its weights, 'model.layers.3"),
    ],
)
def test_weights_of_another_model_than_the_config_s_are_refused_before_any_work(
    config: RunConfig, own_model: Path, changes: dict[str, int], said: str
) -> None:
    inputs.check(config)
    file = own_model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=said):
        inputs.check(config)


def test_a_damaged_tokenizer_is_refused_before_any_work(config: RunConfig, own_model: Path) -> None:
    (own_model / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer"):
        inputs.check(config)


def test_a_checkpoint_with_a_plan_for_another_tp_size_is_refused_before_any_work(
    config: RunConfig, own_model: Path
) -> None:
    report = SensitivityReport("suffix", 2, [0.1, 0.2, 0.3], 3.0, 10, ModelIdentity("llama", 3, 32, "cafe"))
    make_plan(report, drop=0.5).save(own_model / PLAN_FILE)
    with pytest.raises(UserError, match=r"plan for tp_size=2.*write parallel\.tp_size=2"):
        inputs.check(config)
    config.parallel.tp_size = 2
    inputs.check(config)


def test_a_checkpoint_of_treated_blocks_is_refused_before_any_work(config: RunConfig, own_model: Path) -> None:
    size = config.parallel.tp_size
    report = SensitivityReport("suffix", size, [0.1, 0.2, 0.3], 3.0, 10, ModelIdentity("llama", 3, 32, "cafe"))
    plan = make_plan(report, drop=1.0, strategy="zs_b2b")
    plan.outcomes[1] = {"kept": "b2b"}
    plan.save(own_model / PLAN_FILE)
    with pytest.raises(UserError, match=r"Block 1 of .* was treated already \(b2b\); give the original"):
        inputs.check(config)


def test_a_text_too_short_to_hold_some_of_it_out_is_refused_before_any_work(config: RunConfig) -> None:
    config.strategy.name, config.drop, config.data.recovery_samples = Strategy.zs_b2b, 0.5, 8
    inputs.check(config)
    config.data.recovery_samples = 10_000
    with pytest.raises(UserError, match=r"tokens, too few for data\.recovery_samples=10000 of data\.sequence_length"):
        inputs.check(config)
    config.strategy.name = Strategy.zs  # needs no such samples
    inputs.check(config)
    config.strategy.name, config.drop = Strategy.zs_correction, 0.0
    inputs.check(config)
    config.latency.name, config.latency.drops, config.latency.prompt_length = LatencyKind.cpu, [0.0, 0.5], 16
    with pytest.raises(UserError, match="too few for"):  # corrected blocks are timed
        inputs.check(config)


def test_tasks_are_known_however_their_files_write_the_name(config: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "items.jsonl").write_text('{"text": "word1", "choices": ["word2", "word3"]}\n')
    (folder / "own.yaml").write_text(
        f"task: 'own_task'  # why\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/items.jsonl}}}}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: text\ndoc_to_choice: choices\ndoc_to_target: 0\n"
    )
    (folder / "group.yaml").write_text(
        'group: "all_of_them"\ntask:\n  - own_task\naggregate_metric_list:\n  - metric: acc\n'
    )
    config.eval.include_path, config.eval.tasks = str(folder), ["all_of_them"]
    inputs.check(config)
    config.eval.tasks = ["all_of_them", "own_task"]
    with pytest.raises(UserError, match=r"cannot be evaluated together: Duplicate task 'own_task'"):
        inputs.check(config)
    config.eval.tasks = ["another"]
    (folder / "broken.yaml").write_text("task: [")
    with pytest.raises(UserError, match=r"broken\.yaml is no YAML"):
        inputs.check(config)
