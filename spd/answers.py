"""A model's answers to lm-eval requests, kept as they come: an evaluation that was stopped goes on where it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance

from spd.model import TensorParallelLM
from spd.results import digest, made_by


class Answers:
    """Known answers, by task, the task's version, kind of request and arguments.

    Args:
        file: where they are kept, one JSON object a line; None keeps them in memory only. A last line that was cut
            off in the middle is ignored.
        versions: gives task -> version, once the tasks are loaded.
    """

    def __init__(self, file: Path | None = None, versions: Callable[[], dict[str, Any]] = dict) -> None:
        self.file, self.versions = file, versions
        self._known: dict[str, Any] = {}
        self._asked: dict[str, set[str]] = {}
        self._whole = True  # whether the file ends where a line does
        if file is not None and file.exists():
            text = file.read_text()
            self._whole = not text or text.endswith("\n")
            for line in text.splitlines():
                try:
                    entry = json.loads(line)
                    self._known[entry["request"]] = entry["answer"]
                except (ValueError, KeyError, TypeError):
                    continue

    def find(self, request: Instance) -> Any | None:
        """The answer, in JSON's types; None if it is not known."""
        asked = _digest(request.request_type, request.args)
        key = digest([request.task_name, self.versions().get(str(request.task_name)), asked])
        answer = self._known.get(key)
        if answer is None:
            self._asked.setdefault(asked, set()).add(key)
        return answer

    def add(self, kind: str, args: Any, answer: Any) -> None:
        """Keeps the answer to what was asked for and not known, under every task that asked for it."""
        fresh = dict.fromkeys(self._asked.pop(_digest(kind, args), ()), answer)
        self._known |= fresh
        if self.file is None or not fresh:
            return
        lines = [json.dumps({"request": key, "answer": value}) + "\n" for key, value in fresh.items()]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:  # of several writers, each adds whole lines
            file.write(("" if self._whole else "\n") + "".join(lines))
        self._whole = True


def _digest(kind: str, args: Any) -> str:
    return digest([kind, json.dumps(list(args), default=str)])  # arguments may hold what JSON does not know


def identity(model: TensorParallelLM) -> dict[str, Any]:
    """What determines a model's answers: weights, plan, tp size, type, and what computes."""
    outcomes = {i: model.outcomes[i] for i in model.dropped if i in model.outcomes}
    return {
        **made_by(),
        "weights": model.fingerprint,
        "tp_size": model.tp_size,
        "dtype": str(model.dtype),
        "device": model.device.type,
        "dropped": model.dropped,
        "treated": outcomes and [outcomes, model.plan and model.plan.recovery],
    }
