"""Accuracy through lm-eval: its tasks, its scoring, its standard errors; the model is ours.

Legend: B batch, T tokens, V vocabulary.
"""

import difflib
import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor

from spd.errors import UserError
from spd.model import TensorParallelLM
from spd.ranks import VirtualRanks

MAIN_METRICS = ("acc", "exact_match", "rougeL", "rouge_score")
"""The metric that stands for a task, the first of these it reports; a task's other metrics are kept beside it."""


class SpdLM(HFLM):
    """A TensorParallelLM as an lm-eval model: lm-eval's own Hugging Face class over our forward.

    Given a model object, that class sees rank 0 of 1 on every process, so that all ranks get the same requests: what
    tensor parallelism needs.
    """

    def __init__(
        self, model: TensorParallelLM, batch_size: int, on_progress: Callable[[int, int], None] | None
    ) -> None:
        super().__init__(pretrained=model.hf, tokenizer=model.tokenizer, batch_size=batch_size)
        self.tensor_parallel = model
        self.cache_hook = _Answers(on_progress)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] of right-padded ids [B, T]; attention is causal, so padding changes nothing before it."""
        return self.tensor_parallel(inps)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self.cache_hook.expect(len(requests))
        return super().loglikelihood(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        self.cache_hook.expect(len(requests))
        return super().generate_until(requests, disable_tqdm=True)


class _Answers:
    """Stands where lm-eval's request cache would and counts the answers given, for the progress display."""

    def __init__(self, on_progress: Callable[[int, int], None] | None) -> None:
        self.on_progress, self.done, self.total = on_progress, 0, 0

    def expect(self, requests: int) -> None:
        self.total += requests

    def add_partial(self, method: str, request: Any, answer: Any) -> None:
        self.done += 1
        if self.on_progress:
            self.on_progress(self.done, self.total)


def task_manager(tasks: Sequence[str], include_path: str | Path | None = None) -> TaskManager:
    """lm-eval's task index, made sure to know the tasks: those of a folder alone if they suffice, else its own too.

    Raises:
        UserError: the folder does not exist, or a task is in neither; names the nearest ones.
    """
    if include_path is not None:
        if not Path(include_path).is_dir():
            raise UserError(f"The task folder {include_path} (eval.include_path) does not exist.")
        local = TaskManager(include_path=str(include_path), include_defaults=False)
        if all(task in local.all_tasks for task in tasks):
            return local
    manager = TaskManager(include_path=str(include_path) if include_path else None)
    for task in tasks:
        if task not in manager.all_tasks:
            near = difflib.get_close_matches(task, manager.all_tasks, n=3)
            raise UserError(f"There is no lm-eval task {task!r}{'; nearest: ' + ', '.join(near) if near else ''}.")
    return manager


def evaluate(
    model: TensorParallelLM,
    tasks: Sequence[str],
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    num_fewshot: int | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Scores the model, with the blocks it has dropped, on lm-eval tasks.

    Args:
        model: with virtual ranks.
        tasks: names of tasks or groups.
        include_path: folder of task YAMLs beside lm-eval's own.
        limit: the first so many items of each task; None is all.
        batch_size: sequences at a time, formed by length.
        num_fewshot: examples before each item; None is what the task says.
        seed: of the few-shot choice.
        on_progress: called with (requests answered, requests known of).

    Returns:
        `{"mean": {"value", "stderr"}, "tasks": {name: {"metric", "value", "stderr", "items", "metrics"}}}`: `value` is
        the first of `MAIN_METRICS` the task has, `stderr` lm-eval's (None where it has none). The mean weighs tasks
        equally and takes their errors as independent.

    Raises:
        UserError: an unknown task, one that reports none of the main metrics, or a model of real ranks.
    """
    if not isinstance(model.ranks, VirtualRanks):
        raise UserError("lm-eval gives results to local rank 0 alone; evaluate with ranks='virtual'.")
    manager = task_manager(tasks, include_path)
    # lm-eval would bootstrap some errors in forked processes, and a fork of one that has computed with threads can wait
    # for ever.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    results = simple_evaluate(
        model=SpdLM(model, batch_size, on_progress),
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        num_fewshot=num_fewshot,
        fewshot_random_seed=seed,
        bootstrap_iters=1000,
        log_samples=False,
    )
    scores = {task: _score(task, results) for task in tasks}
    errors = [score["stderr"] for score in scores.values()]
    return {
        "mean": {
            "value": math.fsum(score["value"] for score in scores.values()) / len(scores),
            "stderr": None if None in errors else math.hypot(*errors) / len(scores),
        },
        "tasks": scores,
    }


def _score(task: str, results: dict[str, Any]) -> dict[str, Any]:
    # lm-eval names a number "metric,filter" and its error "metric_stderr,filter".
    raw = results["results"].get(task, {}) | results.get("groups", {}).get(task, {})
    metrics = {key.removesuffix(",none"): value for key, value in raw.items() if isinstance(value, float)}
    main = next((key for name in MAIN_METRICS for key in metrics if key.partition(",")[0] == name), None)
    if main is None:
        raise UserError(
            f"The task {task!r} reports none of {', '.join(MAIN_METRICS)}, but {', '.join(sorted(metrics))}."
        )
    name, *filters = main.split(",")
    members = results.get("group_subtasks", {}).get(task) or [task]
    return {
        "metric": main,
        "value": metrics[main],
        "stderr": metrics.get(",".join([f"{name}_stderr", *filters])),
        "items": sum(results["n-samples"][member]["effective"] for member in members),
        "metrics": metrics,
    }
