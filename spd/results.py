"""What is kept of the work: one record a point, caches that points share, one table a sweep.

    <output_dir>/points/<key>/config.yaml    written before anything is computed
    <output_dir>/points/<key>/result.json    the record, written once, at the end, atomically
    <output_dir>/cache/<kind>/<key>.json     sensitivities, plans, scores and latency sessions
    <output_dir>/cache/blocks/               treated blocks (spd.strategies.recovery)
    <output_dir>/sweeps/<sweep>/<job>/       which point a job of a sweep was, and its log

A key is a hash of what determines the value, so what is done is never done again and nothing else is ever taken
for it. Files appear whole or not at all: a run that is killed at any moment leaves finished points as they were.
"""

import errno
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from spd import __version__
from spd.paths import ROOT

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 4
"""Version of records and caches. Raised when a change of the code changes what a configuration gives."""

Record = dict[str, Any]


def digest(value: Any) -> str:
    """128 bits of the SHA-256 of a JSON-able value; the order of dictionary keys does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def file_digest(path: Path) -> str:
    """SHA-256 of a file, or of all files under a folder with their relative names."""
    total = hashlib.sha256()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        if "__pycache__" not in file.parts:
            with file.open("rb") as stream:
                total.update(str(file.relative_to(path)).encode() + hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all: what was there before stays until the new text is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).chmod(0o666 & ~_umask())  # mkstemp makes files that only their owner reads
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, value: Any) -> None:
    """`write_text` of a JSON-able value. Infinite and undefined numbers become null, as JSON has no word for them."""

    def finite(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: finite(inner) for key, inner in item.items()}
        if isinstance(item, list | tuple):
            return [finite(inner) for inner in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    write_text(path, json.dumps(finite(value), indent=1, allow_nan=False) + "\n")


@contextmanager
def held(path: Path, say: Callable[[str], None], what: str) -> Iterator[None]:
    """Holds a lock file. That it has to be waited for is said: another process `what`."""
    lock = FileLock(path, mode=0o666)  # whoever may use the folder may wait
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"Waiting for another process that {what}.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def describe(error: OSError) -> str:
    """What a file or folder could not be used for, to a user."""
    return f"{error.filename} cannot be used ({error.strerror}); if it is to hold results, give another output_dir."


def is_disk_full(error: BaseException) -> bool:
    """Whether an error means that no more can be written: no space, quota, or file size limit."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Results:
    """The records and caches under one output folder.

    Args:
        output_dir: made when first written to.
        say: takes one sentence for the user at a time (a cached value is used, a damaged file is replaced).
    """

    def __init__(self, output_dir: Path, say: Callable[[str], None] = print) -> None:
        self.output_dir = output_dir
        self.say = say
        self.computed: dict[str, dict[str, Any]] = {}
        """Kind -> the environment in which the value that `cached` last gave was computed, maybe by another run."""

    def folder(self, key: str) -> Path:
        """The folder of a point."""
        return self.output_dir / "points" / key

    def find(self, key: str) -> Record | None:
        """The record of a finished point; None if it is missing, failed, or damaged (which is said)."""
        path = self.folder(key) / "result.json"
        try:
            record = read_record(path)
        except FileNotFoundError:
            return None
        except ValueError as error:
            self.say(f"Warning: {path} is damaged ({error}); the point is computed again.")
            return None
        if record["key"] != key or record["format"] != FORMAT:
            self.say(f"Warning: {path} is the record of something else; the point is computed again.")
            return None
        return record if record["status"] == "done" else None

    def begin(self, key: str, config_yaml: str) -> None:
        """Keeps the configuration of a point that is about to be computed."""
        write_text(self.folder(key) / "config.yaml", config_yaml)

    def finish(self, record: Record) -> Path:
        """Keeps a record, done or failed; returns its file. A failed one never takes the place of a finished one."""
        path = self.folder(record["key"]) / "result.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if record["status"] == "done" or self.find(record["key"]) is None:
                write_json(path, record)
        return path

    def cached(self, kind: str, parts: dict[str, Any], compute: Callable[[], Any]) -> Any:
        """What `compute()` returns (JSON-able), computed once for the given parts, also across processes and nodes.

        Other processes that want the same value wait for the first one. A damaged file is computed again. Beside the
        value stands where it was computed, which `computed` then says.
        """
        parts = {**made_by(), **parts}
        path = self.output_dir / "cache" / kind / f"{digest(parts)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with held(path.with_suffix(".lock"), self.say, f"computes the same {kind}"):
            stored = self._read_cache(path, kind)
            if stored is None:
                here, started = environment(), time.monotonic()
                # Through JSON once, so that a fresh value and one read back are the same.
                value = json.loads(json.dumps(compute()))
                here["seconds"] = round(time.monotonic() - started, 3)
                stored = {"checksum": digest([value, here]), "parts": parts, "computed": here, "value": value}
                write_text(path, json.dumps(stored))
            self.computed[kind] = stored["computed"]
            return stored["value"]

    def _read_cache(self, path: Path, kind: str) -> dict[str, Any] | None:
        try:
            stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if stored["checksum"] != digest([stored["value"], stored["computed"]]):
                raise ValueError("its checksum does not match")
            return stored
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            self.say(f"Warning: {path} is damaged ({error}); the {kind} is computed again.")
            return None


def read_record(path: Path) -> Record:
    """A record from its file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not a whole record.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    missing = {"format", "key", "status", "config"} - set(record) if isinstance(record, dict) else {"format"}
    if missing:
        raise ValueError(f"without {', '.join(sorted(missing))}")
    return record


def texts_digest(folder: Path) -> str:
    """Of what a checkpoint's folder has beside its weights: tokenizer, config, generation settings."""
    texts = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".txt", ".model", ".jinja"))
    return digest([file_digest(file) for file in texts])


def made_by() -> dict[str, Any]:
    """Versions that change results for an unchanged configuration: of the records' format, and of libraries."""
    return {"format": FORMAT, "versions": {name: _version(name) for name in ("torch", "transformers", "lm_eval")}}


def gpu_engine() -> str:
    """Of the code that is timed on GPUs, and not of what is reported of it: a session of another engine is another."""
    files = sorted(path for path in (ROOT / "spd/gpu").glob("*.py") if path.name != "summary.py")
    sources = b"".join(path.read_bytes() for path in files)
    return hashlib.sha256(sources).hexdigest()[:8]


def environment() -> dict[str, Any]:
    """Versions, commit and hardware that something is computed with, and the time it starts; None for its seconds."""
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "versions": {
            "python": platform.python_version(),
            "spd": __version__,
            **{name: _version(name) for name in ("torch", "transformers", "lm_eval", "datasets")},
        },
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "hardware": hardware(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": None,
    }


def hardware() -> dict[str, Any]:
    """CPU model, cores this process may use, memory in GiB, and GPU names."""
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = (line.partition(":")[2].strip() for line in info.open() if line.startswith("model name"))
        cpu = next(names, cpu)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"cpu": cpu, "cores": cores, "memory_gib": round(memory, 1), "gpus": gpus}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*command: str) -> str | None:
    try:
        git = ["git", "-C", str(ROOT), *command]
        done = subprocess.run(git, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def to_frame(records: list[Record]) -> "pd.DataFrame":
    """points.csv as a table: one row a record; what was not measured is missing, never 0.

    Columns: model, tp_size, strategy, what else of the configuration tells the records apart (under its setting's name,
    as strategy.order; usually nothing; see `line_columns`), drop (as asked for), num_dropped, fraction_dropped (of all
    blocks, 0..1), dropped_blocks (space-separated), perplexity, accuracy_mean, accuracy_mean_stderr, <task>,
    <task>_stderr, ..., ttft_ms, ttft_ms_low, ttft_ms_high, and likewise tpot_ms, ttft_speedup_percent,
    tpot_speedup_percent, then latency_confidence (of these intervals, 0..1), status, error, key.
    """
    import pandas as pd  # slow to import, and a refused configuration should not wait for it

    tasks = list(dict.fromkeys(task for record in records for task in (record.get("accuracy") or {}).get("tasks", {})))
    frame = pd.DataFrame([_row(record, tasks) for record in records])
    for name, values in _other_settings(records, frame[["model", "tp_size", "strategy"]]).items():
        frame.insert(frame.columns.get_loc("drop"), name, values)
    return frame


def line_columns(points: "pd.DataFrame") -> list[str]:
    """The columns of `to_frame` whose values make a line of its own: its points differ in their drop fraction only."""
    return list(points.columns[: list(points.columns).index("drop")])


# What does not change a number, and what has a column of its own.
_NO_COLUMN = ("drop", "sweep", "output_dir", "save_model", "parallel.port", "latency.timeout_s", "tracker.")


def _other_settings(records: list[Record], known: "pd.DataFrame") -> dict[str, list[Any]]:
    """The settings that vary over the records beyond what the known columns, and those found before, say already.

    So a model's path is no column where its name tells as much. Values are all numbers, or else texts as an override
    has them, so that they come back from the CSV as they were.
    """
    settings = [_flat(record["config"]) for record in records]
    found: dict[str, list[Any]] = {}
    said = list(known.itertuples(index=False, name=None))
    for name in dict.fromkeys(name for one in settings for name in one if not name.startswith(_NO_COLUMN)):
        values = [one.get(name) for one in settings]
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            values = [_as_override(value) for value in values]
        more = [(*before, value) for before, value in zip(said, values, strict=True)]
        if len(set(more)) > len(set(said)):
            found[name], said = values, more
    return found


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their full names."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _as_override(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_as_override, value))}]"
    # Not "null", which a reader of the CSV would take for a gap.
    return "none" if value is None else str(value)


def _row(record: Record, tasks: list[str]) -> dict[str, Any]:
    config, plan = record["config"], record.get("plan") or {}
    accuracy, latency = record.get("accuracy") or {}, record.get("latency") or {}
    dropped = plan.get("dropped")
    row: dict[str, Any] = {
        "model": config["model"]["name"],
        "tp_size": config["parallel"]["tp_size"],
        "strategy": config["strategy"]["name"],
        "drop": config["drop"],
        "num_dropped": None if dropped is None else len(dropped),
        "fraction_dropped": None if dropped is None else len(dropped) / plan["source"]["num_blocks"],
        "dropped_blocks": None if dropped is None else " ".join(map(str, sorted(dropped))),
        "perplexity": (record.get("perplexity") or {}).get("value"),
        "accuracy_mean": (accuracy.get("mean") or {}).get("value"),
        "accuracy_mean_stderr": (accuracy.get("mean") or {}).get("stderr"),
    }
    for task in tasks:
        found = accuracy.get("tasks", {}).get(task) or {}
        row[task], row[f"{task}_stderr"] = found.get("value"), found.get("stderr")
    for name in ("ttft_ms", "tpot_ms", "ttft_speedup_percent", "tpot_speedup_percent"):
        interval = latency.get(name) or {}
        row[name] = interval.get("median")
        row[f"{name}_low"], row[f"{name}_high"] = interval.get("low"), interval.get("high")
    row["latency_confidence"] = latency.get("confidence")
    return row | {"status": record["status"], "error": record.get("error"), "key": record["key"]}
