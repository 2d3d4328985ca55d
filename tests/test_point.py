"""One point: what is computed, what is shared, what is kept when something goes wrong."""

import dataclasses
import errno
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS, with_drop
from rich.console import Console
from safetensors.torch import load_file, save_file

from spd import point, results, steps, tracking
from spd.config import DType, LatencyKind, Order, RunConfig, Strategy, Tracker
from spd.launch import RankFailed
from spd.plan import DropPlan
from spd.progress import Display
from spd.strategies.correction import Correction

TASK = """task: tiny_words
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/words.jsonl
output_type: multiple_choice
test_split: test
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often sensitivities, perplexities and latency sessions are really measured (latency by a stand-in)."""
    counts = dict.fromkeys(("measure_sensitivity", "perplexity", "measure_latency"), 0)

    def count(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return real(*args, **kwargs)

        return counting

    def session(checkpoint: Path, tp_size: int, arms: dict[str, list[int]], **asked: Any) -> dict[str, Any]:
        return {"arms": arms, "tp_size": tp_size}

    monkeypatch.setattr(
        steps, "summarise", lambda session, arm, baseline: {**session, "arm": arm, "baseline": baseline}
    )
    for name in counts:
        real = session if name == "measure_latency" else getattr(steps, name)
        monkeypatch.setattr(steps, name, count(name, real))
    return counts


def test_a_record_holds_what_determined_it_and_what_it_found(config: RunConfig, run: Any, tmp_path: Path) -> None:
    record = run(config)
    assert (record["status"], record["error"], record["config"]["drop"]) == ("done", None, 0.5)
    assert len(record["sensitivity"]["sensitivities"]) == 3
    assert len(record["plan"]["dropped"]) == 2
    assert record["perplexity"]["value"] > 1
    assert record["perplexity"]["tokens"] == 3 * 15
    assert record["accuracy"] is None
    assert record["latency"] is None
    assert record["environment"]["seconds"] > 0
    assert record["environment"]["versions"]["torch"]
    folder = tmp_path / "runs" / "points" / record["key"]
    assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(record))
    assert DropPlan.load(folder / "result.json").dropped == record["plan"]["dropped"]
    assert "drop: 0.5" in (folder / "config.yaml").read_text()


def test_a_finished_point_is_not_computed_again(
    config: RunConfig, run: Any, counted: dict[str, int], output: io.StringIO
) -> None:
    first = run(config)
    assert json.loads(json.dumps(run(config))) == json.loads(json.dumps(first))
    assert counted["measure_sensitivity"] == counted["perplexity"] == 1
    assert output.getvalue().count("done before") == 1


def test_a_record_says_which_code_found_each_of_its_numbers(
    config: RunConfig, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config)
    commit = "c" * 40
    here = results.environment()
    for module in (point, results):
        monkeypatch.setattr(module, "environment", lambda: {**here, "git_commit": commit})
    record = run(with_drop(config, 1.0))
    assert record["environment"]["git_commit"] == record["computed"]["perplexity"]["git_commit"] == commit
    assert record["computed"]["sensitivity"]["git_commit"] == here["git_commit"] != commit
    assert set(record["computed"]) == {"sensitivity", "perplexity"}


def test_other_libraries_make_another_point(config: RunConfig, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(config)["key"]
    monkeypatch.setattr(results, "_version", lambda name: f"next {name}")
    assert run(config)["key"] != first


def test_nothing_dropped_gives_the_dense_perplexity(config: RunConfig, run: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from spd.data import load_samples

    record = run(with_drop(config, 0.0))
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    samples = load_samples(config.data.heldout_path, tokenizer, 3, 16, 0)
    dense = AutoModelForCausalLM.from_pretrained(config.model.path)
    with torch.inference_mode():
        loss = dense(samples, labels=samples).loss
    assert record["perplexity"]["value"] == pytest.approx(loss.exp().item(), rel=1e-4)


def test_points_share_their_sensitivities_and_their_latency_session(
    config: RunConfig, run: Any, counted: dict[str, int]
) -> None:
    config.latency.name = LatencyKind.cpu
    config.latency.prompt_length, config.latency.drops = 16, [0.5, 1.0]
    records = [run(with_drop(config, drop)) for drop in (0.0, 0.5, 1.0)]
    assert counted == {"measure_sensitivity": 1, "perplexity": 3, "measure_latency": 1}
    assert [record["latency"]["arm"] for record in records] == ["0", "2", "3"]
    assert {record["latency"]["baseline"] for record in records} == {"0"}
    assert list(records[0]["latency"]["arms"]) == ["0", "2", "3"]
    assert records[1]["latency"]["arms"]["2"] == records[1]["plan"]["dropped"]
    extra = run(with_drop(config, 0.25))
    assert list(extra["latency"]["arms"]) == ["0", "1", "2", "3"]
    assert counted["measure_latency"] == 2


def test_fractions_that_come_to_the_same_blocks_are_timed_once_and_together(
    config: RunConfig, run: Any, counted: dict[str, int]
) -> None:
    config.latency.name = LatencyKind.cpu
    config.latency.prompt_length, config.latency.drops = 16, [-0.0, 0.33333333, 0.33333334, 0.4]
    records = [run(with_drop(config, drop)) for drop in (0.0, -0.0, 1 / 3, 0.35)]
    assert counted["measure_latency"] == 1
    assert [record["latency"]["arm"] for record in records] == ["0", "0", "1", "1"]
    assert list(records[0]["latency"]["arms"]) == ["0", "1"]


@pytest.mark.parametrize(
    "change",
    [
        lambda c: setattr(c, "drop", 0.6),
        lambda c: setattr(c, "seed", 1),
        lambda c: setattr(c.parallel, "tp_size", 2),
        lambda c: setattr(c.model, "dtype", DType.bfloat16),
        lambda c: setattr(c.strategy, "order", Order.alone),
        lambda c: setattr(c.data, "samples", 2),
        lambda c: Path(c.data.path).write_text("word1 word2 " * 40),
        lambda c: Path(c.data.heldout_path).write_text("word1 word2 " * 40),
    ],
)
def test_a_point_s_key_changes_with_what_determines_it(config: RunConfig, run: Any, change: Any) -> None:
    first = run(config)["key"]
    change(config)
    assert run(config)["key"] != first


def test_the_same_text_read_as_jsonl_is_another_point(config: RunConfig, run: Any, tmp_path: Path) -> None:
    lines = [json.dumps({"text": " ".join(WORDS[i:] + WORDS[:i])}) for i in range(5)]
    keys, perplexities = set(), set()
    for suffix in (".txt", ".jsonl"):
        file = tmp_path / f"same{suffix}"
        file.write_text("\n".join(lines))
        config.data.path = config.data.heldout_path = str(file)
        record = run(config)
        assert record["status"] == "done"
        keys.add(record["key"])
        perplexities.add(record["perplexity"]["value"])
    assert len(keys) == len(perplexities) == 2


def test_a_point_s_key_does_not_change_with_what_does_not_matter(config: RunConfig, run: Any, tmp_path: Path) -> None:
    first = run(config)["key"]
    for name in ("calibration", "heldout"):
        shutil.move(tmp_path / f"{name}.txt", tmp_path / f"{name}_moved.txt")
    shutil.copytree(config.model.path, tmp_path / "copied_model")
    config.model.path = str(tmp_path / "copied_model")
    config.data.path, config.data.heldout_path = (
        str(tmp_path / "calibration_moved.txt"),
        str(tmp_path / "heldout_moved.txt"),
    )
    config.sweep, config.parallel.port, config.latency.timeout_s = "other", 29501, 10.0
    config.eval.name = "nothing"
    config.model.name = "renamed"
    assert run(config)["key"] == first


def test_other_weights_of_the_same_shape_are_another_point(config: RunConfig, run: Any, tmp_path: Path) -> None:
    from conftest import make_checkpoint

    first = run(config)
    config.model.path = str(make_checkpoint(tmp_path / "other", "llama", seed=1))
    second = run(config)
    assert second["key"] != first["key"]
    assert second["perplexity"] != first["perplexity"]


@pytest.mark.parametrize(("dtype", "said"), [(DType.float32, 1), (DType.bfloat16, 0)])
def test_timing_gpus_in_the_type_that_nobody_serves_with_is_said(
    config: RunConfig, run: Any, output: io.StringIO, monkeypatch: pytest.MonkeyPatch, dtype: DType, said: int
) -> None:
    monkeypatch.setattr(steps, "check_gpus", lambda tp_size: None)
    monkeypatch.setattr(steps, "gpu_latency", lambda *_, **__: {"ttft_ms": None})
    config.latency.name, config.model.dtype = LatencyKind.gpu, dtype
    record = run(config)
    assert record["status"] == "done", record["error"]
    assert output.getvalue().count("latency=gpu in float32; what serves a model takes model.dtype=bfloat16") == said


def test_latency_pays_for_the_corrections(config: RunConfig, run: Any, counted: Any, monkeypatch: Any) -> None:
    asked: list[Path | None] = []
    session = steps.measure_latency
    monkeypatch.setattr(
        steps, "measure_latency", lambda *args, **named: asked.append(named["corrections"]) or session(*args, **named)
    )
    config.latency.name, config.latency.prompt_length, config.latency.new_tokens = LatencyKind.cpu, 8, 4
    config.data.recovery_samples, config.strategy.tau1 = 16, -1e9
    for strategy in (Strategy.zs_hg, Strategy.zs_correction):
        config.strategy.name = strategy
        assert run(config)["status"] == "done"
    assert asked[0] is None
    assert asked[1] is not None
    assert asked[1].name == "spd_correction.safetensors"


def test_latency_is_measured_where_no_correction_was_kept(config: RunConfig, run: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("spd.strategies.correction.fit", lambda block, x, *_: useless(block, x))
    config.latency.name, config.latency.prompt_length, config.latency.new_tokens = LatencyKind.cpu, 8, 4
    config.latency.launches, config.latency.repeats, config.latency.drops = 1, 1, [0.0]
    config.data.recovery_samples, config.strategy.tau1, config.strategy.name = 16, -1e9, Strategy.zs_correction
    record = run(config)
    assert record["status"] == "done", record["error"]
    assert {outcome["kept"] for outcome in record["plan"]["outcomes"].values()} == {"zs"}
    assert record["latency"]["ttft_ms"] is not None


def useless(block: Any, x: torch.Tensor) -> Correction:
    return Correction({"constant": torch.full((len(block.ranks.local), x.shape[-1]), 1e3)})


@pytest.mark.parametrize("batch_size", [32, "auto"])
def test_accuracy_comes_from_the_tasks_of_the_folder(
    config: RunConfig, run: Any, tmp_path: Path, batch_size: int | str
) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    items = [{"question": f"word{i}", "choices": ["word1", "word2"], "answer": i % 2} for i in range(12)]
    (folder / "words.jsonl").write_text("\n".join(map(json.dumps, items)))
    (folder / "tiny_words.yaml").write_text(TASK.format(folder=folder))
    config.eval.tasks, config.eval.include_path = ["tiny_words"], str(folder)
    config.eval.batch_size = batch_size
    accuracy = run(config)["accuracy"]
    assert accuracy["tasks"]["tiny_words"]["items"] == 12
    assert 0 <= accuracy["mean"]["value"] <= 1
    assert accuracy["mean"]["stderr"] > 0


def test_a_failure_says_why_and_is_tried_again(
    config: RunConfig, run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: Any, **__: Any) -> float:
        raise RuntimeError("the sum is off\nby one")

    with monkeypatch.context() as patch:
        patch.setattr(steps, "perplexity", broken)
        record = run(config)
    assert record["status"] == "failed"
    assert record["error"].startswith("RuntimeError: the sum is off (traceback in ")
    assert record["plan"] is not None
    assert record["perplexity"] is None
    folder = tmp_path / "runs" / "points" / record["key"]
    assert "in broken" in (folder / "traceback.txt").read_text()
    assert json.loads((folder / "result.json").read_text())["status"] == "failed"
    assert run(config)["status"] == "done"


def test_a_dead_rank_s_error_is_in_the_record_and_its_traceback_on_the_terminal(
    config: RunConfig, run: Any, monkeypatch: pytest.MonkeyPatch, output: io.StringIO
) -> None:
    def dies(*_: Any, **__: Any) -> None:
        raise RankFailed("rank 1 of 2 failed: ValueError: no such block\nTraceback ...\n  in forward", rank=1)

    monkeypatch.setattr(steps, "measure_latency", dies)
    config.latency.name, config.latency.prompt_length = LatencyKind.cpu, 16
    record = run(config)
    assert record["error"].startswith("RankFailed: rank 1 of 2 failed: ValueError: no such block (traceback in ")
    assert "  in forward\n" in output.getvalue()


def test_a_point_that_another_process_finished_meanwhile_is_done(
    config: RunConfig, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*_: Any, **__: Any) -> float:
        with monkeypatch.context() as patch:
            patch.setattr(steps, "perplexity", perplexity)
            with Display("the other", Console(file=io.StringIO())) as display:
                other = dataclasses.replace(config, sweep="other")
                folder = Path(config.output_dir) / "cache"
                folder.rename(folder.with_name("cache of this process"))  # else they would wait for each other
                assert point.run_point(other, display)["status"] == "done"
        raise RuntimeError("too late")

    perplexity = steps.perplexity
    monkeypatch.setattr(steps, "perplexity", late)
    record = run(config)
    assert (record["status"], record["sweep"]) == ("done", "other")


def test_what_the_user_can_mend_is_one_sentence(config: RunConfig, run: Any, tmp_path: Path) -> None:
    shutil.copytree(config.model.path, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    config.model.path = str(tmp_path / "cut")
    record = run(config)
    assert record["status"] == "failed"
    assert "model.safetensors is damaged or was cut short" in record["error"]
    assert not list((tmp_path / "runs" / "points").glob("*/traceback.txt"))


def test_a_model_whose_loss_is_not_a_number_is_a_failed_point(config: RunConfig, run: Any, own_model: Path) -> None:
    weights = load_file(own_model / "model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, own_model / "model.safetensors", metadata={"format": "pt"})
    config.strategy.order = Order.alone
    record = run(config)
    assert record["status"] == "failed"
    assert "not finite" in record["error"]
    assert record["perplexity"] is None
    assert not list(Path(config.output_dir).glob("cache/*/*.json"))


def test_ctrl_c_keeps_the_steps_that_are_done_and_nothing_half_written(
    config: RunConfig, run: Any, counted: dict[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*_: Any, **__: Any) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(steps, "perplexity", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    assert not list((tmp_path / "runs").rglob("result.json"))
    assert not list((tmp_path / "runs").rglob("*.part"))
    assert run(config)["status"] == "done"
    assert counted["measure_sensitivity"] == 1


def test_a_full_disk_stops_the_sweep_instead_of_failing_point_after_point(
    config: RunConfig, run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            run(config)
    assert not [file for file in (tmp_path / "runs").rglob("*") if file.suffix in (".json", ".part")]
    assert run(config)["status"] == "done"


def test_wandb_failing_does_not_fail_the_point(
    config: RunConfig, run: Any, monkeypatch: pytest.MonkeyPatch, output: io.StringIO
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no service")

    config.tracker.name = Tracker.wandb
    monkeypatch.setattr(tracking, "log_point", broken)
    assert run(config)["status"] == "done"
    assert "not logged to W&B (RuntimeError: no service)" in output.getvalue()


def test_a_point_is_mirrored_once_also_when_the_tracker_comes_later(
    config: RunConfig, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[str] = []
    monkeypatch.setattr(tracking, "log_point", lambda record, _: logged.append(record["key"]))
    run(config)
    assert not logged
    config.tracker.name = Tracker.wandb
    record = run(config)
    run(config)
    assert logged == [record["key"]]
