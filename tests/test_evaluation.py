"""Accuracy through lm-eval, against lm-eval's own Hugging Face model."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import spd
from spd.evaluation import evaluate


@pytest.mark.parametrize("family", ["llama", "opt"])  # a Qwen2 folder cannot carry the tests' tokenizer
def test_with_nothing_dropped_scores_equal_lm_evals_own_model(
    checkpoint: Callable[..., Path], family: str, tasks: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    folder = checkpoint(family)
    names = ["toy_choice", "toy_last", "toy_summary"]
    ours = evaluate(spd.load(folder, tp_size=4), names, include_path=tasks, batch_size=8)
    assert capsys.readouterr().out == "", "standard output is for results"
    own = simple_evaluate(
        model=HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=8),
        tasks=names,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=1000,
    )
    for name, metric in {"toy_choice": "acc", "toy_last": "acc", "toy_summary": "exact_match"}.items():
        score = ours["tasks"][name]
        assert score["metric"] == metric
        assert score["value"] == pytest.approx(next(v for k, v in own["results"][name].items() if k.startswith(metric)))
        assert score["items"] == 24
        stderr = next(v for k, v in own["results"][name].items() if k.startswith(f"{metric}_stderr"))
        assert score["stderr"] == pytest.approx(stderr)
        items = [sample[metric] for sample in own["samples"][name]]
        assert [float(item) for item in score["scores"].split()] == items
    # Perplexity of the last words shows agreement where few items are right.
    assert ours["tasks"]["toy_last"]["metrics"]["perplexity"] == pytest.approx(
        own["results"]["toy_last"]["perplexity,none"], rel=1e-4
    )


def test_a_groups_parts_have_lm_evals_scores_in_the_order_of_its_items(
    checkpoint: Callable[..., Path], tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    mean = [{"metric": "acc", "weight_by_size": True}]
    inner = {"group": "toy_inner", "task": ["toy_last"], "aggregate_metric_list": mean}
    group = {"group": "toy_group", "task": [inner, "toy_choice"], "aggregate_metric_list": mean}
    shutil.copytree(tasks, tmp_path / "tasks")
    (tmp_path / "tasks/toy_group.yaml").write_text(yaml.safe_dump(group))
    folder = checkpoint("llama")
    ours = evaluate(spd.load(folder, tp_size=2), ["toy_group"], include_path=tmp_path / "tasks", batch_size=8, limit=9)
    own = simple_evaluate(
        model=HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=8),
        tasks=["toy_group"], limit=9, bootstrap_iters=1000,
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
    )["results"]  # fmt: skip
    score = ours["tasks"]["toy_group"]
    parts, items = score["parts"], [float(item) for item in score["scores"].split()]
    assert list(parts) == ["toy_group::toy_inner", "toy_last", "toy_choice"]  # lm-eval's name of one defined in place
    assert {part["items"] for part in parts.values()} == {9}
    for name, part in parts.items():
        assert (part["value"], part["stderr"]) == (own[name]["acc,none"], own[name]["acc_stderr,none"])
    assert [sum(of) / 9 for of in (items[:9], items[9:])] == pytest.approx(
        [parts[name]["value"] for name in ("toy_last", "toy_choice")]
    )


def test_the_mean_weighs_tasks_equally_and_adds_their_errors(tiny_llama: Path, tasks: Path) -> None:
    scores = evaluate(spd.load(tiny_llama, tp_size=2), ["toy_choice", "toy_last"], include_path=tasks)
    single = [scores["tasks"][name] for name in ("toy_choice", "toy_last")]
    assert scores["mean"]["value"] == pytest.approx(sum(s["value"] for s in single) / 2)
    assert scores["mean"]["stderr"] == pytest.approx(math.hypot(*(s["stderr"] for s in single)) / 2)


def test_dropping_blocks_changes_what_is_scored_and_progress_is_told(tiny_llama: Path, tasks: Path) -> None:
    model, progress = spd.load(tiny_llama, tp_size=8), []
    dense = evaluate(model, ["toy_last"], include_path=tasks, limit=10)
    model.drop([0, 1, 2])
    dropped = evaluate(
        model, ["toy_last"], include_path=tasks, limit=10, on_progress=lambda *step: progress.append(step)
    )
    assert dropped["tasks"]["toy_last"]["items"] == 10
    assert dense["tasks"]["toy_last"]["metrics"]["perplexity"] != dropped["tasks"]["toy_last"]["metrics"]["perplexity"]
    assert progress == [(i, 10) for i in range(1, 11)]


def test_errors_are_bootstrapped_without_forking(
    tiny_llama: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forks(*_: object) -> None:
        raise AssertionError("a fork of a process with threads can wait for ever")

    monkeypatch.setattr("multiprocessing.Pool", forks)
    scores = evaluate(spd.load(tiny_llama, tp_size=2), ["toy_last"], include_path=tasks)
    assert scores["tasks"]["toy_last"]["metrics"]["perplexity_stderr"] > 0


def test_an_unknown_task_is_refused_with_the_nearest_names(tiny_llama: Path, tasks: Path) -> None:
    with pytest.raises(spd.UserError, match="no lm-eval task 'toy_choise'; nearest: toy_choice"):
        evaluate(spd.load(tiny_llama), ["toy_choise"], include_path=tasks)


def test_a_task_folder_that_does_not_exist_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(spd.UserError, match=r"nowhere .*does not exist"):
        evaluate(spd.load(tiny_llama), ["toy_choice"], include_path=tmp_path / "nowhere")
