"""A sweep, seen as a whole: every point is checked before the first one starts, and the records become one table.

Hydra calls `SweepCallback` (conf/config.yaml) before a multirun; run.py calls `Sweep.finish` after it, also when the
launcher gave up on a job. Jobs may run here or on a Slurm cluster: what they share is the sweep's folder, where each
job leaves the place of its record.

    <output_dir>/sweeps/<sweep>/points.json       the overrides of every point, written before any work
    <output_dir>/sweeps/<sweep>/<job>/point.json  where the job's record is
    <output_dir>/sweeps/<sweep>/points.csv, curve.png
"""

import json
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from spd.compose import HydraError, explain, from_hydra
from spd.config import LatencyKind, RunConfig, dump_yaml, to_dict
from spd.errors import UserError
from spd.results import Record, describe, is_disk_full, line_columns, read_record, to_frame, write_json, write_text
from spd.tables import print_table

POINTS_FILE = "points.json"
POINTER_FILE = "point.json"
CSV_FILE = "points.csv"
PNG_FILE = "curve.png"


class Sweep:
    """The points of one multirun, and their records."""

    current: "Sweep | None" = None
    """The sweep of this process. Hydra makes the callback, so this is where run.py finds it."""

    def __init__(self, folder: Path, overrides: list[list[str]], configs: list[RunConfig]) -> None:
        self.folder, self.overrides, self.configs = folder, overrides, configs
        self._lock = FileLock(folder / "running.lock")

    def begin(self) -> None:
        """Takes the folder until `finish` and writes down which points there are.

        Which points an earlier sweep of this name had is forgotten there, and its table and figure are put aside, as
        `points.previous.csv` and so on. The records are kept elsewhere.

        Raises:
            UserError: another process runs a sweep of this name.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            name = self.configs[0].sweep
            raise UserError(f"sweep {name} is running (in {self.folder}); give sweep=<another name>.") from error
        for file in self.folder.glob(f"*/{POINTER_FILE}"):
            file.unlink(missing_ok=True)
        for name in (CSV_FILE, PNG_FILE):
            if (file := self.folder / name).exists():
                file.replace(file.with_stem(f"{file.stem}.previous"))
        points = [
            {"overrides": overrides, "config": to_dict(config)}
            for overrides, config in zip(self.overrides, self.configs, strict=True)
        ]
        write_json(self.folder / POINTS_FILE, points)

    def started(self) -> bool:
        """Whether a job of it has a folder."""
        return any((self.folder / str(number)).exists() for number in range(len(self.configs)))

    def records(self) -> list[Record]:
        """One record a point, in the order of the sweep; a point without one counts as failed and says why."""
        return [self._record(number, config) for number, config in enumerate(self.configs)]

    def _record(self, number: int, config: RunConfig) -> Record:
        from spd.keys import determining
        from spd.point import failed_record

        job, settings = self.folder / str(number), to_dict(config)
        try:
            path = Path(json.loads((job / POINTER_FILE).read_text(encoding="utf-8"))["record"])
            record = read_record(path)
            if determining(record["config"]) == determining(settings):
                # What was found before may have been found under other names and places.
                return {**record, "config": settings}
            why = f"its job left the record of another configuration, {path}"
        except (FileNotFoundError, ValueError, KeyError):
            why = f"its job left no record: it was killed, or still runs; see {job} and the launcher's logs"
        return failed_record(settings, config.sweep, why)

    def finish(self) -> bool:
        """Writes points.csv and the curve, prints the table, mirrors all to W&B. True if every point is done."""
        from spd import figures, tracking

        console = Console(stderr=True, highlight=False, soft_wrap=True)
        records = self.records()
        csv, png = self.folder / CSV_FILE, self.folder / PNG_FILE
        write_text(csv, to_frame(records).to_csv(index=False))
        done = [record for record in records if record["status"] == "done"]
        of_quality = any(record.get("accuracy") or record.get("perplexity") for record in done)
        print_table(records, f"Sweep {self.configs[0].sweep}")
        for what, make in (
            ("the curve", lambda: figures.plot_curve(to_frame(done), png) if of_quality else None),
            ("W&B", lambda: tracking.log_sweep(records, csv, png, self.configs[0])),
        ):
            try:
                if done:
                    make()
            except Exception as error:  # the numbers are safe in the CSV; a picture must not lose them
                if is_disk_full(error):
                    raise
                console.print(f"Warning: {what} failed ({type(error).__name__}: {error}).", markup=False)
        frame = to_frame(records)
        which = [name for name in line_columns(frame) if frame[name].nunique() > 1] + ["drop"]
        for _, row in frame[frame["status"] != "done"].iterrows():
            point = ", ".join(f"{name} {row[name]}" for name in which)
            console.print(f"Failed: {point}: {row['error']}", markup=False)
        curve = f"  Curve: {png}" if png.exists() else ""
        print(f"{len(done)} of {len(records)} points are done. Table: {csv}{curve}")
        self._lock.release(force=True)
        return len(done) == len(records)


class SweepCallback(Callback):
    """Checks a multirun before any job starts."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Composes and checks the points. Hydra swallows a callback's exceptions, so all that stops is a SystemExit."""
        try:
            sweep = compose(config)
            sweep.begin()
        except UserError as error:
            raise SystemExit(f"Error: {error}") from error
        except HydraError as error:
            raise SystemExit(f"Error: {explain(error)}") from error
        except Exception as error:
            if is_disk_full(error):
                raise SystemExit(f"Error: nothing more can be written ({error}). Make room.") from error
            if isinstance(error, OSError) and error.filename:
                raise SystemExit(f"Error: {describe(error)}") from error
            raise SystemExit(traceback.format_exc()) from error
        Sweep.current = sweep
        note = lone_sessions(sweep.configs)
        if note:
            sys.stderr.write(f"Note: {note}\n")
        here = "" if _runs_here(config) else ", as jobs of the launcher; their folders below it say how far they are"
        sys.stderr.write(f"Sweep {sweep.configs[0].sweep}: {len(sweep.configs)} points, in {sweep.folder}{here}\n")


def compose(config: DictConfig) -> Sweep:
    """Composes and checks every point of a multirun.

    Raises:
        UserError: one of them is wrong; none has been started.
    """
    from spd import inputs

    # ${now:...} is the time at which it is first resolved. Resolved here, it is one time for all: the points composed
    # below and by Hydra inherit what this configuration has resolved.
    folder = Path(str(config.hydra.sweep.dir))
    arguments = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    arguments += list(config.hydra.overrides.task)
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    loader = hydra.config_loader
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(arguments)
    sweeper: Any = get_class(config.hydra.sweeper._target_)
    if not hasattr(sweeper, "split_arguments"):
        raise UserError("Only Hydra's basic sweeper is supported; leave hydra/sweeper out.")
    overrides = [points for batch in sweeper.split_arguments(parsed, None) for points in batch]
    sys.stderr.write(f"Checking {len(overrides)} points\n")  # which takes half a minute for hundreds
    configs = []
    for one in overrides:
        composed = loader.load_sweep_config(config, one)
        without_hydra = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
        OmegaConf.copy_cache(from_config=composed, to_config=without_hydra)
        try:
            configs.append(from_hydra(without_hydra))
        except UserError as error:
            which = f"The point {' '.join(one)}; none of the {len(overrides)} points was started."
            raise UserError(f"{error}\n({which})") from error
    _check_cores(config, configs)
    # Of those that differ in nothing but the drop the largest, which needs the most.
    by_drop = sorted(configs, key=lambda one: one.drop)
    for distinct in {dump_yaml(replace(config, drop=0.0)): config for config in by_drop}.values():
        inputs.check(distinct, here=_runs_here(config))
    return Sweep(folder, overrides, configs)


def _check_cores(config: DictConfig, configs: list[RunConfig]) -> None:
    """Raises UserError when a job of the launcher has fewer cores than ranks to time.

    A launcher's settings are one for all jobs: `${parallel.tp_size}` there is not each point's own.
    """
    cores = config.hydra.launcher.get("cpus_per_task")
    ranks = max((one.parallel.tp_size for one in configs if one.latency.name is LatencyKind.cpu), default=0)
    if cores is not None and cores < ranks:
        raise UserError(
            f"hydra.launcher.cpus_per_task={cores} is less than the {ranks} ranks whose latency the sweep measures, "
            f"and it is one number for all jobs; write hydra.launcher.cpus_per_task={ranks}."
        )


def lone_sessions(configs: list[RunConfig]) -> str | None:
    """What to say where points time latency in sessions of their own, because `latency.drops` leaves their drop out."""
    timed = [config for config in configs if config.latency.name is not LatencyKind.none]
    drops = {drop for config in timed for drop in config.latency.drops}
    lone = sorted({config.drop for config in timed if config.drop not in {0.0, *config.latency.drops}})
    if not lone:
        return None
    together = sorted({0.0, *drops, *lone})
    its, asked = (",".join(str(drop).removesuffix(".0") for drop in some) for some in (lone, together))
    return (
        f"drop {its} is not in latency.drops, and each such point times all arms in a session of its own. "
        f"To time them once, beside each other: latency.drops=[{asked}]"
    )


def _runs_here(config: DictConfig) -> bool:
    return str(config.hydra.launcher._target_).endswith(".BasicLauncher")


def position(job_folder: Path) -> str:
    """ "3/7" for the third of seven jobs; "" outside a sweep."""
    try:
        points = json.loads((job_folder.parent / POINTS_FILE).read_text(encoding="utf-8"))
        return f"{int(job_folder.name) + 1}/{len(points)}"
    except (FileNotFoundError, ValueError):
        return ""


def leave_pointer(job_folder: Path, record: Record, output_dir: Path) -> Path:
    """Tells the sweep, and returns, where this job's record is.

    One without a key (nothing was read yet, or the model of a finished point was not saved) is kept with the job.
    """
    path = output_dir / "points" / record["key"] / "result.json" if record["key"] else job_folder / "result.json"
    if not record["key"]:
        write_json(path, record)
    write_json(job_folder / POINTER_FILE, {"record": str(path.resolve()), "status": record["status"]})
    return path
