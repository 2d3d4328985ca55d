"""lm-eval's tasks: which there are, where their data lie, and whether all they need is here.

The tasks are lm-eval's own YAML, unmodified, or that of a folder. Only where their data are looked for can change.
"""

import copy
import difflib
import functools
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lm_eval.api.task import Task
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._yaml_loader import load_yaml

from spd.errors import UserError
from spd.hub import is_hub_name, locate, remedy
from spd.results import digest

MAIN_METRICS = ("acc", "exact_match", "rougeL", "rouge_score", "score")
"""The metric that stands for a task, the first of these it reports; a task's other metrics are kept beside it."""

_SETTING = "eval.data_root"
_LONGBENCH = {"rouge", "jieba", "fuzzywuzzy"}


class _Factory(TaskFactory):
    """lm-eval's factory, with data sets looked for under data_root, and what is missing said in one sentence."""

    def __init__(
        self, data_root: Path | None, setting: str | None = _SETTING, meta: dict[str, Any] | None = None
    ) -> None:
        super().__init__(meta=meta)
        self.data_root, self.setting = data_root, setting
        self.caches: set[str] = set()
        """Those of the folders that data sets were found in."""

    def _load_full_config(self, entry: Any, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            config: dict[str, Any] = super()._load_full_config(entry, overrides)
        except ImportError as error:
            raise UserError(f"The task {entry.name} {_missing_package(error)}") from error
        return self._located(config)

    def _located(self, config: dict[str, Any]) -> dict[str, Any]:
        if isinstance(config.get("dataset_path"), str):
            where = locate(config["dataset_path"], self.data_root, _SETTING)
            config = config | {"dataset_path": where.pop("path")}
            if where:
                self.caches.add(where["cache_dir"])
                config["dataset_kwargs"] = where | (config.get("dataset_kwargs") or {})
        members = config.get("task")
        if isinstance(members, list):  # of a group, which may define tasks in place
            config = config | {"task": [self._located(one) if isinstance(one, dict) else one for one in members]}
        return config

    def _build_task(self, entry: Any, overrides: dict[str, Any] | None) -> Task:
        try:
            task = super()._build_task(entry, overrides)
            _check_splits(task)
            return task
        except UserError:
            raise
        except Exception as error:  # of `datasets`, or of a template that meets rows it was not made for
            if isinstance(error, ImportError) and error.name:
                raise UserError(f"The task {entry.name} {_missing_package(error)}") from error
            named = {**(load_yaml(entry.yaml_path, resolve_func=False) if entry.yaml_path else {}), **(overrides or {})}
            name, config = named.get("dataset_path"), named.get("dataset_name")
            if isinstance(name, str) and is_hub_name(name, self.data_root):
                which = f"The task {entry.name}{f' ({config})' if config else ''}"
                raise UserError(f"{which}: {remedy(name, self.data_root, self.setting, error)}") from error
            raise UserError(f"The task {entry.name} cannot be loaded ({type(error).__name__}: {error}).") from error


class Tasks(TaskManager):
    """lm-eval's task index, which also knows the versions of what it loaded."""

    def __init__(self, include_path: str | None, include_defaults: bool) -> None:
        super().__init__(include_path=include_path, include_defaults=include_defaults)
        self.versions: dict[str, Any] = {}

    def load(self, *args: Any, **options: Any) -> Any:
        try:
            loaded = super().load(*args, **options)
        except UserError:  # which is a ValueError too
            raise
        except ValueError as error:  # a task beside a group that it is in
            raise UserError(f"These tasks cannot be evaluated together: {error}.") from error
        self.versions |= {name: task.VERSION for name, task in loaded["tasks"].items()}
        return loaded


def _missing_package(error: ImportError) -> str:
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, ImportError) and cause.name):
        cause = cause.__cause__ or cause.__context__
    name = cause.name if isinstance(cause, ImportError) else None
    if name in _LONGBENCH:
        return f"needs Python packages that are missing ({name}); write pip install -e '.[longbench]'."
    if name:
        return f"needs the Python package {name}, which is missing; write pip install {name}."
    return f"needs Python code that cannot be imported ({error})."


def _check_splits(task: Task) -> None:
    """lm-eval itself misses a split only when it draws an example from it."""
    config = task.config
    wanted = (config.training_split, config.validation_split, config.test_split, config.fewshot_split)
    there = getattr(task, "dataset", None)
    if there is not None and (missing := [split for split in wanted if split and split not in there]):
        raise LookupError(f"there is no split {', '.join(missing)}, only {', '.join(there)}")


def task_manager(
    tasks: Sequence[str], include_path: str | Path | None = None, data_root: str | Path | None = None
) -> Tasks:
    """lm-eval's task index, made sure to know the tasks: those of a folder alone if they suffice, else its own too.

    Args:
        tasks: names of tasks or groups.
        include_path: folder of task YAMLs beside lm-eval's own.
        data_root: folder laid out like the hub (spd.hub) in which the tasks' data sets are; None is the hub.

    Raises:
        UserError: a folder does not exist, a file in it is no YAML, or a task is in neither; names the nearest ones.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    for folder, setting in ((include_path, "eval.include_path"), (data_root, _SETTING)):
        if folder is not None and not Path(folder).is_dir():
            raise UserError(f"The folder {folder} ({setting}) does not exist.")
    manager = Tasks(str(include_path), False) if include_path is not None else None
    if manager is None or any(task not in manager.all_tasks for task in tasks):
        _check_yaml(include_path)
        manager = Tasks(str(include_path), True) if include_path is not None else _own_index()
    for task in tasks:
        if task not in manager.all_tasks:
            near = difflib.get_close_matches(task, manager.all_tasks, n=3)
            raise UserError(f"There is no lm-eval task {task!r}{'; nearest: ' + ', '.join(near) if near else ''}.")
        if task in manager.all_tags:
            members = ",".join(sorted(manager.task_index[task].tags))
            raise UserError(f"{task!r} is a tag of lm-eval and has no score of its own; name its tasks: [{members}].")
    manager = copy.copy(manager)  # the index is shared, where its data lie is not
    manager.versions, manager._factory = {}, _Factory(Path(data_root).resolve() if data_root is not None else None)
    return manager


@functools.cache
def _own_index() -> Tasks:
    return Tasks(None, True)  # reads thousands of files, which do not change


def _check_yaml(folder: str | Path | None) -> None:
    """lm-eval passes over files that it cannot read; the task that is looked for may be in one."""
    for file in sorted(Path(folder).rglob("*.yaml")) if folder is not None else []:
        try:
            load_yaml(file, resolve_func=False)
        except Exception as error:
            raise UserError(f"{file} is no YAML: {error}") from error


def load_for_command(manager: TaskManager, tasks: Sequence[Any]) -> None:
    """Loads the tasks of lm-eval's own command once before it does, so that what is missing is told before a model is
    loaded; what it then reads of folders here is no longer what `datasets` has cached of others.

    Raises:
        UserError: a task's data or Python packages are missing; says what to do.
    """
    import datasets

    manager = copy.copy(manager)
    manager._factory = factory = _Factory(None, setting=None, meta=manager._factory._meta)
    manager.load(list(tasks))
    if factory.caches:
        root = Path(datasets.config.HF_DATASETS_CACHE)
        datasets.config.HF_DATASETS_CACHE = root / f"folders-{digest(sorted(factory.caches))}"


class Asked(NamedTuple):
    """What there is to know of tasks before they are evaluated."""

    digest: str
    """SHA-256 of the rows that an evaluation reads, the same wherever they lie."""
    longest: tuple[int, str]
    """Tokens of the longest text to be generated, and the task that wants it; (0, "") where none is."""


@functools.lru_cache(maxsize=64)  # the points of a sweep share their tasks
def look_at(
    tasks: tuple[str, ...], include_path: Path | None, data_root: Path | None, num_fewshot: int | None
) -> Asked:
    """Loads all rows, and so finds what is missing before a model is loaded.

    Raises:
        UserError: a task that does not exist, that has no score or too few examples to show, or whose data or Python
            packages are missing; says what to do.
    """
    manager = task_manager(tasks, include_path, data_root)
    found = manager.load(list(tasks))
    for name in tasks:
        _check_scored(name, found)
    total, longest = hashlib.sha256(), (0, "")
    for name, task in sorted(found["tasks"].items()):
        own = task.config.num_fewshot
        shots = own if num_fewshot is None or own == 0 else num_fewshot  # lm-eval leaves a 0 of the task's own as it is
        examples = list(task.fewshot_docs()) if shots else []
        if shots:
            _check_examples(name, task, shots, len(examples))
        if task.OUTPUT_TYPE == "generate_until":
            longest = max(longest, (normalize_gen_kwargs(task.config.generation_kwargs or {})["max_gen_toks"], name))
        for rows in (task.eval_docs, examples):
            total.update(f"\0{name}\0".encode())
            for row in rows:
                total.update(json.dumps(row, sort_keys=True, default=str).encode())
    return Asked(total.hexdigest(), longest)


def _check_scored(name: str, found: dict[str, Any]) -> None:
    if name in found["groups"]:
        group = found["groups"][name]
        of_tasks = {metric for task in group.get_all_tasks() for metric in task.aggregation()}
        metrics = [one.metric for one in group.aggregate_metric_list or [] if one.metric in of_tasks]
        instead = f"name its tasks (with their own settings): [{','.join(found['group_map'][name])}]"
    else:
        metrics, instead = list(found["tasks"][name].aggregation()), "leave it out"
    if not set(metrics) & set(MAIN_METRICS):
        reported = ", ".join(metrics) or "nothing"
        raise UserError(f"{name!r} reports none of {', '.join(MAIN_METRICS)}, but {reported}; {instead}.")


def _check_examples(name: str, task: Task, shots: int, there: int) -> None:
    # As lm-eval: an item of the split that examples are of is none of its own examples.
    item = next(iter(task.eval_docs), None) if task.fewshot_cfg.split == task.config.test_split else None
    try:
        task.sampler.sample(shots, eval_doc=item)
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"The task {name} shows {shots} examples before each item, and has {there}; "
            f"write eval.num_fewshot={max(0, there - 1)} or less."
        ) from error
