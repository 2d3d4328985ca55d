"""Accuracy through lm-eval: its tasks, its scoring, its standard errors; the model is ours."""

import contextlib
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate

from spd.answers import Answers
from spd.errors import UserError
from spd.harness import SpdLM
from spd.launch import Progress
from spd.model import TensorParallelLM
from spd.tasks import MAIN_METRICS, task_manager


def evaluate(
    model: TensorParallelLM,
    tasks: Sequence[str],
    include_path: str | Path | None = None,
    data_root: str | Path | None = None,
    limit: int | None = None,
    batch_size: int | str = 32,
    num_fewshot: int | None = None,
    seed: int = 0,
    answers: str | Path | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Scores the model, with the blocks it has dropped, on lm-eval tasks.

    Args:
        model: of virtual ranks, or of real ones, which all call this with the same arguments.
        tasks: names of tasks or groups.
        include_path: folder of task YAMLs beside lm-eval's own.
        data_root: folder laid out like the hub in which the tasks' data sets are; None takes them from the hub.
        limit: the first so many items of each task; None is all.
        batch_size: sequences at a time, formed by length; "auto" is the largest that fits (virtual ranks).
        num_fewshot: examples before each item; None is what the task says.
        seed: of the few-shot choice.
        answers: folder in which answers are kept as they come, under what determines them, and looked for.
        on_progress: called with (requests answered, requests known of).

    Returns:
        `{"mean": {"value", "stderr"}, "tasks": {name: {"metric", "value", "stderr", "items", "scores", "metrics",
        "parts"}}}`:
        `value` is the first of `MAIN_METRICS` the task has, `stderr` lm-eval's (None where it has none), `scores` that
        metric of each item in order, as text with a space between: two models that answered the same items are compared
        item by item. `parts` are "value", "stderr" and "items" of the groups and tasks in a group (MMLU's subjects), in
        the order of `scores`. The mean weighs tasks equally and takes their errors as independent.

    Raises:
        UserError: an unknown task, one whose data are missing or that reports none of the main metrics,
            batch_size="auto" with real ranks.
    """
    manager = task_manager(tasks, include_path, data_root)
    # lm-eval would bootstrap some errors in forked processes, and a fork of one that has computed with threads can wait
    # for ever.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    with contextlib.redirect_stdout(io.StringIO()):  # standard output is for results, and lm-eval prints what it does
        results = simple_evaluate(
            model=SpdLM(
                model,
                batch_size=batch_size,
                answers=Answers(answers, lambda: manager.versions) if answers else None,
                on_progress=on_progress or (lambda done, total: None),
            ),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            fewshot_random_seed=seed,
            bootstrap_iters=1000,
        )
    # lm-eval gives results to local rank 0 alone.
    scores = model.ranks.of_first({task: _score(task, results) for task in tasks} if results else {})
    errors = [score["stderr"] for score in scores.values()]
    return {
        "mean": {
            "value": math.fsum(score["value"] for score in scores.values()) / len(scores),
            "stderr": None if None in errors else math.hypot(*errors) / len(scores),
        },
        "tasks": scores,
    }


def _score(task: str, results: dict[str, Any]) -> dict[str, Any]:
    metrics = _metrics(task, results)
    main = next((key for name in MAIN_METRICS for key in metrics if key.partition(",")[0] == name), None)
    if main is None:
        raise UserError(
            f"The task {task!r} reports none of {', '.join(MAIN_METRICS)}, but {', '.join(sorted(metrics))}."
        )
    name, *filters = main.split(",")
    error = ",".join([f"{name}_stderr", *filters])

    def part(member: str) -> dict[str, Any]:
        found = _metrics(member, results)
        items = sum(results["n-samples"][one]["effective"] for one in _members(member, results))
        return {"value": found.get(main), "stderr": found.get(error), "items": items}

    return {
        "metric": main,
        **part(task),
        "scores": " ".join(f"{score:g}" for score in _scores(task, name, ",".join(filters) or "none", results)),
        "metrics": metrics,
        "parts": {member: part(member) for member in _inside(task, results)},
    }


def _metrics(task: str, results: dict[str, Any]) -> dict[str, float]:
    # lm-eval names a number "metric,filter" and its error "metric_stderr,filter", which is a word where it has none.
    raw = results["results"].get(task, {}) | results.get("groups", {}).get(task, {})
    return {key.removesuffix(",none"): value for key, value in raw.items() if isinstance(value, float)}


def _scores(task: str, metric: str, filtered: str, results: dict[str, Any]) -> list[float]:
    samples = [sample for member in _members(task, results) for sample in results["samples"][member]]
    return [sample[metric] for sample in samples if sample["filter"] == filtered]


def _inside(task: str, results: dict[str, Any]) -> list[str]:
    """The groups and tasks in a group, each group before those in it; of a task none."""
    inside = results.get("group_subtasks", {}).get(task, [])
    return [each for one in inside for each in (one, *_inside(one, results))]


def _members(task: str, results: dict[str, Any]) -> list[str]:
    """The tasks of a group, through the groups in it; a task itself."""
    groups = results.get("group_subtasks", {})
    return [one for one in (task, *_inside(task, results)) if not groups.get(one)]
