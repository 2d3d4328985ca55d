"""One point or a sweep of points.

python run.py drop=0.5                  one point
python run.py -m drop=0,0.25,0.5        a sweep
python run.py experiment=quickstart     the README's first command
"""

import os
import signal
import sys
from pathlib import Path
from traceback import extract_tb
from types import FrameType
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from spd.compose import HydraError, explain, from_hydra
from spd.errors import UserError
from spd.progress import Display, quiet
from spd.results import describe, is_disk_full
from spd.sweep import Sweep, leave_pointer, position
from spd.tables import print_blocks, print_table

_GO_ON = "Finished points are kept, and the same command goes on with the rest."


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(composed: DictConfig) -> None:
    """Runs one point, here or as a job of a sweep."""
    quiet()
    alone = HydraConfig.get().mode == RunMode.RUN
    if not alone and not HydraConfig.get().callbacks:
        raise SystemExit("Error: a point's own config.yaml is of one point; for a sweep leave --config-path out.")
    job_folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        if alone and HydraConfig.get().runtime.choices["hydra/launcher"] != "basic":
            raise UserError("hydra/launcher starts the points of a sweep; put -m first, as in python run.py -m ...")
        config = from_hydra(composed)
        # Imported late: a refused configuration should not wait for torch. A Slurm job gets this function by value.
        from spd import inputs, point

        if alone:  # the points of a sweep are checked together, before the first one starts
            inputs.check(config)
    except UserError as error:
        if alone:
            raise SystemExit(f"Error: {error}") from error  # Hydra would print more than the sentence
        from spd import point

        # What was fine when the sweep began, as a text that has gone since. The other jobs go on.
        settings: Any = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
        leave_pointer(job_folder, point.failed_record(settings, settings["sweep"], str(error)), job_folder)
        sys.stderr.write(f"point {position(job_folder)} failed: {error}\n")
        return
    which = "point" if alone else f"point {position(job_folder)}"
    with Display(f"{which}, drop {config.drop:g}") as display:
        record = point.run_point(config, display)
    file = leave_pointer(job_folder, record, Path(config.output_dir))
    if alone:
        print_blocks(record)
        print_table([record])
        print(f"Record: {file}")
        if record["status"] != "done":
            raise SystemExit(1)


def cli() -> int | str:
    """Runs `main`, sums up a sweep, and turns what a user can mend into one sentence; returns the exit status."""
    explain_errors = os.environ.get("HYDRA_FULL_ERROR") != "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing them
    quiet()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        try:
            main()
        except HydraError as error:
            if not explain_errors:
                raise
            return f"Error: {explain(error)}"
        except Exception as error:
            if isinstance(error, ValueError) and "hydra" in Path(extract_tb(error.__traceback__)[-1].filename).parts:
                return f"Error: {explain(error)}"  # an override that Hydra refuses, but not in its own terms
            if Sweep.current is None or is_disk_full(error):
                raise
            if not Sweep.current.started():
                return f"Error: the launcher could not start a job ({type(error).__name__}: {error})."
            # A launcher that lost a job: what the other jobs found is summed up all the same.
            sys.stderr.write(f"Warning: the launcher gave up ({type(error).__name__}: {error}).\n")
        return 0 if Sweep.current is None or Sweep.current.finish() else 1
    except KeyboardInterrupt:
        sys.stderr.write(f"\nStopped. {_GO_ON}\n")
        return 130
    except OSError as error:
        if is_disk_full(error):
            return f"Error: nothing more can be written ({error}). Make room. {_GO_ON}"
        if {"mkdir", "makedirs"} & {frame.name for frame in extract_tb(error.__traceback__)}:
            return f"Error: {describe(error)}"
        raise


def _terminate(number: int, frame: FrameType | None) -> None:
    sys.stderr.write(f"\nStopped. {_GO_ON}\n")
    raise SystemExit(128 + number)  # an ordinary exception, so that ranks are ended and locks released on the way out


if __name__ == "__main__":
    sys.exit(cli())
