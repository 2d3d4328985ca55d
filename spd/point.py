"""One point: a configuration in, its record out.

    sensitivity (shared) -> plan -> apply -> perplexity, accuracy (virtual ranks) -> latency (real ranks, shared)

Each of these steps is cached by what determines it, so a point that was stopped half-way goes on at the step it was at.
"""

import logging
import math
import time
import traceback
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spd import checkpoint
from spd.checkpoint import Checkpoint, read_config, read_tokenizer
from spd.config import Device, LatencyKind, RunConfig, Tracker, dump_yaml, find_path, need_path, to_dict
from spd.data import load_samples
from spd.errors import UserError
from spd.families import family_of
from spd.latency import measure_latency, summarise
from spd.launch import RankFailed, check_port
from spd.model import TensorParallelLM, load
from spd.perplexity import perplexity
from spd.plan import PLAN_FILE, DropPlan, make_plan
from spd.progress import Display
from spd.results import FORMAT, Record, Results, digest, environment, file_digest, hardware, is_disk_full, made_by
from spd.sensitivity import SensitivityReport, measure_sensitivity
from spd.sharding import check_tp_size
from spd.strategies import apply

log = logging.getLogger(__name__)

# What cannot change a result (names of options and places, ports, how long to wait), or is replaced by a hash of its
# contents.
_NOT_IN_KEY: dict[str, set[str] | None] = {
    "tracker": None,
    "sweep": None,
    "output_dir": None,
    "parallel": {"name", "port"},
    "latency": {"timeout_s"},
    "model": {"path"},
    "data": {"name", "path", "heldout_path"},
    "eval": {"name", "include_path"},
}


def determining(settings: dict[str, Any]) -> dict[str, Any]:
    """What of a configuration (as `to_dict` gives it) can change a result."""
    kept = {section: value for section, value in settings.items() if _NOT_IN_KEY.get(section, ()) is not None}
    for section, names in _NOT_IN_KEY.items():
        if names is not None:
            kept[section] = {name: value for name, value in settings[section].items() if name not in names}
    return kept


def check(config: RunConfig, here: bool = True) -> None:
    """Everything about a point that can be refused before any work, beyond the configuration itself.

    Args:
        here: whether the point will run on this machine; if not, its port and device are not looked at.

    Raises:
        UserError: the checkpoint is incomplete or cut short, its family unknown, tp_size does not cut it evenly or is
            not that of the plan in it, a text is empty or shorter than a sequence, a sequence too long for the model,
            the port taken, or the device not there.
    """
    folder = checkpoint.resolve(find_path(config.model.path) or config.model.path)
    hf = read_config(folder)
    tp_size = config.parallel.tp_size
    check_tp_size(family_of(hf), hf, tp_size)
    Checkpoint(folder)  # opens every weight file, reads headers only
    if (folder / PLAN_FILE).is_file() and (made_for := DropPlan.load(folder / PLAN_FILE).tp_size) != tp_size:
        raise UserError(
            f"{folder} was saved with a plan for tp_size={made_for}, and parallel.tp_size={tp_size}; "
            f"write parallel.tp_size={made_for}, or give the original checkpoint."
        )
    lengths = {"data.sequence_length": config.data.sequence_length}
    if config.latency.name is not LatencyKind.none:
        both = config.latency.prompt_length + config.latency.new_tokens
        lengths["latency.prompt_length + latency.new_tokens"] = both
    for setting, length in lengths.items():
        if length > (hf.max_position_embeddings or length):
            most = hf.max_position_embeddings
            raise UserError(f"{setting} is {length}, and {folder} takes {most} positions; give at most {most}.")
    if here and config.latency.name is not LatencyKind.none:
        check_port(config.parallel.port)
    if here and config.model.device is Device.cuda and not torch.cuda.is_available():
        raise UserError("model.device=cuda but torch sees no GPU here; write model.device=cpu.")
    for setting in ("path", "heldout_path"):
        _load_samples(config, setting, read_tokenizer(folder))


def run_point(config: RunConfig, display: Display) -> Record:
    """The record of a point, computed unless it is there already.

    Never raises for what concerns this point alone: a failure is a record with status "failed", kept beside the others
    and tried again next time. Raises OSError when nothing more can be written, and lets Ctrl-C through.
    """
    results = Results(Path(config.output_dir), say=display.say)
    started = time.monotonic()
    record = _new_record(config)
    try:
        display.step("checking")
        point = _Point(config, results, display)
        record |= {"key": point.key, "weights": point.weights}
        done = results.find(point.key)
        if done is not None:
            display.say(f"done before, not computed again ({results.folder(point.key) / 'result.json'}).")
            _track(done, config, results, display)
            return done
        record["environment"] = environment()
        results.begin(point.key, dump_yaml(config))
        for name, value in point.steps():
            record[name] = value
            if name in results.computed:
                record["computed"][name] = results.computed[name]
        record["status"] = "done"
    except Exception as error:
        if is_disk_full(error):
            raise
        record["error"] = _describe(error, record, results)
        if isinstance(error, RankFailed):
            display.say(str(error))  # with that rank's own traceback
        display.say(f"failed: {record['error']}")
    record["environment"]["seconds"] = round(time.monotonic() - started, 3)
    if record["key"] is not None:
        results.finish(record)
        # Where this run failed, another one may have finished the point meanwhile: then that is its record.
        record = results.find(record["key"]) or record
    _track(record, config, results, display)
    return record


class _Point:
    """The steps of one point, each computed when first asked for."""

    def __init__(self, config: RunConfig, results: Results, display: Display) -> None:
        self.config, self.results, self.display = config, results, display
        self.folder = checkpoint.resolve(find_path(config.model.path) or config.model.path)
        self.weights = checkpoint.fingerprint(self.folder)
        self.files = _file_digests(config, self.folder)
        self.key = self._key()

    def _key(self) -> str:
        parts = {**made_by(), "config": determining(to_dict(self.config)), "weights": self.weights, "files": self.files}
        if self.config.latency.name is not LatencyKind.none:
            parts["machine"] = _machine()
        return digest(parts)

    def steps(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields (name in the record, value), in the order they are computed."""
        yield "sensitivity", self.sensitivity
        yield "plan", self.plan(self.config.drop).to_dict()
        yield "perplexity", self.perplexity
        if self.config.eval.tasks:
            yield "accuracy", self.accuracy
        if self.config.latency.name is not LatencyKind.none:
            yield "latency", self.latency

    @property
    def _model_parts(self) -> dict[str, Any]:
        model, files = self.config.model, self.files
        return {
            "weights": self.weights,
            "tokenizer": files["tokenizer"],
            "tp_size": self.config.parallel.tp_size,
            "dtype": model.dtype.name,
            "device": model.device.name,
        }

    @property
    def _samples_parts(self) -> dict[str, Any]:
        data = self.config.data
        return {"samples": data.samples, "sequence_length": data.sequence_length, "seed": self.config.seed}

    @property
    def _dropped_parts(self) -> dict[str, Any]:
        return {"strategy": self.config.strategy.name.name, "dropped": self.plan(self.config.drop).dropped}

    @cached_property
    def model(self) -> TensorParallelLM:
        self.display.step(f"loading {self.config.model.name} for {self.config.parallel.tp_size} virtual ranks")
        model = self.config.model
        return load(
            self.folder,
            tp_size=self.config.parallel.tp_size,
            ranks="virtual",
            dtype=model.dtype.name,
            device=model.device.name,
        )

    @cached_property
    def sensitivity(self) -> dict[str, Any]:
        order = self.config.strategy.order.name

        def measure() -> dict[str, Any]:
            samples = _load_samples(self.config, "path", self.model.tokenizer)
            self.display.step("measuring sensitivities")
            return measure_sensitivity(self.model, samples, order=order, on_progress=self.display).to_dict()

        parts = {**self._model_parts, **self._samples_parts, "order": order, "text": self.files["calibration"]}
        return self.results.cached("sensitivity", parts, measure)

    def plan(self, drop: float) -> DropPlan:
        strategy = self.config.strategy
        return make_plan(
            SensitivityReport.from_dict(self.sensitivity),
            drop=drop,
            strategy=strategy.name.name,
            tau1=strategy.tau1,
            tau2=strategy.tau2,
            thresholds=strategy.thresholds.name,
        )

    @cached_property
    def prepared(self) -> TensorParallelLM:
        """The model with the plan applied."""
        return apply(self.model, self.plan(self.config.drop))

    @property
    def perplexity(self) -> dict[str, Any]:
        def measure() -> dict[str, Any]:
            samples = _load_samples(self.config, "heldout_path", self.model.tokenizer)
            self.display.step("measuring perplexity")
            value = perplexity(self.prepared, samples)
            assert math.isfinite(value), f"perplexity {value}"  # JSON would keep it as a gap in a finished record
            return {"value": value, "tokens": samples.shape[0] * (samples.shape[1] - 1)}

        parts = {
            **self._model_parts,
            **self._samples_parts,
            **self._dropped_parts,
            "text": self.files["heldout"],
        }
        return self.results.cached("perplexity", parts, measure)

    @property
    def accuracy(self) -> dict[str, Any]:
        settings, seed = self.config.eval, self.config.seed
        asked: dict[str, Any] = {"limit": settings.limit, "num_fewshot": settings.num_fewshot, "seed": seed}

        def measure() -> dict[str, Any]:
            model = self.prepared
            self.display.step("evaluating")
            from spd.evaluation import evaluate  # imports lm-eval: slow, and not needed where no task is asked for

            include = need_path(settings.include_path, "eval.include_path") if settings.include_path else None
            return evaluate(
                model,
                tasks=settings.tasks,
                include_path=include,
                batch_size=settings.batch_size,
                on_progress=self.display,
                **asked,
            )

        parts = {
            **self._model_parts,
            **self._dropped_parts,
            **asked,
            "tasks": settings.tasks,
            "files": self.files["tasks"],
        }
        return self.results.cached("accuracy", parts, measure)

    @property
    def latency(self) -> dict[str, Any]:
        settings, parallel = self.config.latency, self.config.parallel
        plans = [self.plan(drop).dropped for drop in (0.0, self.config.drop, *settings.drops)]
        # By number of blocks: fractions that come to the same blocks are one arm.
        arms = {str(len(dropped)): dropped for dropped in sorted(plans, key=len)}
        asked: dict[str, Any] = {
            "dtype": self.config.model.dtype.name,
            "prompt_length": settings.prompt_length,
            "new_tokens": settings.new_tokens,
            "batch_size": settings.batch_size,
            "launches": settings.launches,
            "repeats": settings.repeats,
            "warmup": settings.warmup,
            "realtime": settings.realtime,
        }

        def measure() -> dict[str, Any]:
            self.display.step(f"measuring latency, {settings.launches} launches of {parallel.tp_size} ranks")
            return measure_latency(
                self.folder,
                parallel.tp_size,
                arms,
                port=parallel.port,
                timeout_s=settings.timeout_s,
                log_dir=self.results.folder(self.key) / "latency",
                on_progress=self.display,
                **asked,
            )

        parts = {
            **asked,
            "weights": self.weights,
            "tp_size": parallel.tp_size,
            "arms": arms,
            "interconnect": self.config.interconnect.name.name,
            "machine": _machine(),
        }
        ours = str(len(self.plan(self.config.drop).dropped))
        return summarise(self.results.cached("latency", parts, measure), arm=ours, baseline="0")


def _file_digests(config: RunConfig, folder: Path) -> dict[str, str | None]:
    """Hashes of the files a point reads, in the place of their paths: moved files are the same files."""
    texts = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".txt", ".model", ".jinja"))
    tasks = config.eval.include_path if config.eval.tasks else None
    return {
        "tokenizer": digest([file_digest(file) for file in texts]),
        "calibration": _text_digest(need_path(config.data.path, "data.path")),
        "heldout": _text_digest(need_path(config.data.heldout_path, "data.heldout_path")),
        "tasks": file_digest(need_path(tasks, "eval.include_path")) if tasks else None,
    }


def _text_digest(file: Path) -> str:
    return digest([file.suffix, file_digest(file)])  # .jsonl is read in another way than the same bytes as .txt


def _load_samples(config: RunConfig, setting: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Token ids [samples, sequence_length] of the text that `data.<setting>` names."""
    data = config.data
    path = need_path(getattr(data, setting), f"data.{setting}")
    return load_samples(path, tokenizer, data.samples, data.sequence_length, config.seed)


def _machine() -> dict[str, Any]:
    """What a latency belongs to."""
    here = hardware()
    return {name: here[name] for name in ("cpu", "cores", "gpus")}


def _new_record(config: RunConfig) -> Record:
    return {
        "format": FORMAT,
        "key": None,
        "status": "failed",
        "error": None,
        "sweep": config.sweep,
        "config": to_dict(config),
        "weights": None,
        "environment": {"seconds": None},
        "computed": {},
        "sensitivity": None,
        "plan": None,
        "perplexity": None,
        "accuracy": None,
        "latency": None,
    }


def failed_record(config: dict[str, Any], sweep: str, error: str) -> Record:
    """The record of a point that never began, or whose job ended without leaving one."""
    return {**_new_record(RunConfig(sweep=sweep)), "config": config, "error": error}


def _describe(error: Exception, record: Record, results: Results) -> str:
    """One line for the record; whatever is not the user's to mend keeps its traceback in the point's folder."""
    if isinstance(error, UserError):
        return str(error)
    log.error("The point failed.", exc_info=error)
    where = ""
    if record["key"] is not None:
        file = results.folder(record["key"]) / "traceback.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        where = f" (traceback in {file})"
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first}{where}"


def _track(record: Record, config: RunConfig, results: Results, display: Display) -> None:
    """Mirrors a record to W&B, a finished one once: also one that was computed before there was a tracker."""
    if config.tracker.name is Tracker.none or record["key"] is None:
        return
    tracked = results.folder(record["key"]) / "tracked"
    if record["status"] == "done" and tracked.exists():
        return
    display.step("logging to W&B")
    try:
        from spd import tracking  # imports wandb

        tracking.log_point(record, config)
        if record["status"] == "done":
            tracked.touch()
    except Exception as error:  # W&B only mirrors the record, which is kept by now
        log.warning("W&B failed.", exc_info=error)
        display.say(f"Warning: not logged to W&B ({type(error).__name__}: {error}).")
