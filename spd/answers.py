"""A model's answers to lm-eval requests, kept as they come: an evaluation that was stopped goes on where it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.utils import normalize_gen_kwargs

from spd.errors import UserError
from spd.model import TensorParallelLM
from spd.results import digest, made_by, texts_digest


class Answers:
    """Known answers of models, by task, the task's version, kind of request and arguments.

    Sampled texts are not kept: each time they are others.

    Args:
        folder: has a file for all that determines a model's answers (`identity`), one JSON object a line. Lines that
            are none, as a last one that was cut off, are passed over.
        versions: gives task -> version, once the tasks are loaded; by default there are none in the key.

    Raises:
        UserError: the folder is a file, or cannot be made.
    """

    def __init__(self, folder: str | Path, versions: Callable[[], dict[str, Any]] = dict) -> None:
        self.folder, self.versions = Path(folder), versions
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"answers={folder} is a file; give a folder, which may be new.")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"answers={folder} cannot be made ({error.strerror}); give another folder.") from error
        self._file: Path | None = None

    def open(self, model: TensorParallelLM, **reading: Any) -> None:
        """What follows is of the model as it is now; `reading` is what else answers depend on: how texts are read."""
        file = self.folder / f"{digest([identity(model), reading])}.jsonl"
        if file == self._file:
            return
        self._file = file
        self._known: dict[str, Any] = {}
        self._asked: dict[str, set[str]] = {}
        text = file.read_text("utf-8", errors="replace") if file.exists() else ""
        self._whole = not text or text.endswith("\n")  # whether the file ends where a line does
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                self._known[entry["request"]] = entry["answer"]
            except (ValueError, KeyError, TypeError):
                continue

    def find(self, request: Instance) -> Any | None:
        """The answer, in JSON's types; None if it is not known."""
        if request.request_type == "generate_until" and normalize_gen_kwargs(request.args[1])["do_sample"]:
            return None
        asked = _digest(request.request_type, request.args)
        key = digest([request.task_name, self.versions().get(str(request.task_name)), asked])
        answer = self._known.get(key)
        if answer is None:
            self._asked.setdefault(asked, set()).add(key)
        return answer

    def add(self, kind: str, args: Any, answer: Any) -> None:
        """Keeps the answer to what was asked for and not known, under every task that asked for it."""
        assert self._file is not None
        fresh = dict.fromkeys(self._asked.pop(_digest(kind, args), ()), answer)
        if not fresh:
            return
        self._known |= fresh
        lines = [json.dumps({"request": key, "answer": value}) + "\n" for key, value in fresh.items()]
        with self._file.open("a", encoding="utf-8") as file:  # of several writers, each adds whole lines
            file.write(("" if self._whole else "\n") + "".join(lines))
        self._whole = True


def _digest(kind: str, args: Any) -> str:
    return digest([kind, json.dumps(list(args), default=str)])  # arguments may hold what JSON does not know


def identity(model: TensorParallelLM) -> dict[str, Any]:
    """What determines a model's answers: weights, tokenizer, generation settings, plan, tp size, type, and what
    computes."""
    told = ("seconds", "notes")  # of how a block was treated, not of what became of it
    outcomes = {
        i: {name: value for name, value in model.outcomes[i].items() if name not in told}
        for i in model.dropped
        if i in model.outcomes
    }
    return {
        **made_by(),
        "weights": model.fingerprint,
        "texts": texts_digest(model.folder),
        "tp_size": model.tp_size,
        "dtype": str(model.dtype),
        "device": model.device.type,
        "dropped": model.dropped,
        "treated": outcomes and [outcomes, model.plan and model.plan.recovery],
    }
