"""One point: a configuration in, its record out.

Its steps (`spd.steps`) are cached one by one, so a point that was stopped half-way goes on at the step it was at.
"""

import logging
import time
import traceback
from pathlib import Path
from typing import Any

from spd.config import RunConfig, Tracker, Weights, dump_yaml, to_dict
from spd.errors import UserError
from spd.launch import RankFailed
from spd.progress import Display
from spd.results import FORMAT, Record, Results, digest, environment, is_disk_full
from spd.steps import RandomSteps, Steps

log = logging.getLogger(__name__)

_HYDRA = "hydra:\n  run:\n    dir: ${output_dir}/sweeps/${sweep}/alone\n"
"""Where Hydra shall put its own files when a point's config.yaml is run again; by default it makes ./outputs."""


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
        point = (RandomSteps if config.weights is Weights.random else Steps)(config, results, display)
        record |= {"key": point.key, "weights": point.weights}
        done = results.find(point.key)
        if done is not None:
            if isinstance(point, Steps):
                point.keep_model()
            display.say(f"done before, not computed again ({results.folder(point.key) / 'result.json'}).")
            _track(done, config, results, display)
            return done
        record["environment"] = environment()
        results.begin(point.key, dump_yaml(config) + _HYDRA)
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
        done = results.find(record["key"])
        if done is not None and record["status"] == "failed" and config.save_model:
            record["key"] = None  # the numbers are there and stay, but not the model: this job's own record says why
        else:
            # Where this run failed, another one may have finished the point meanwhile: then that is its record.
            record = done or record
    _track(record, config, results, display)
    return record


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
    """Mirrors a record to W&B, a finished one once for each sweep: also one computed before there was a tracker."""
    if config.tracker.name is Tracker.none or record["key"] is None:
        return
    tracked = results.folder(record["key"]) / f"tracked-{digest(config.sweep)[:12]}"
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
