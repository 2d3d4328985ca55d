"""lm-eval's own command with one model more: `lm_eval --model spd`, `torchrun ... -m spd.lm_eval_cli --model spd`."""

import argparse
import contextlib
import io
import os
import sys

import lm_eval.models  # noqa: F401  registers lm-eval's own, which it does only while it knows of none
from lm_eval._cli import HarnessCLI
from lm_eval.api.registry import model_registry
from lm_eval.utils import setup_logging

from spd.errors import UserError
from spd.launch import end_rank


def main() -> None:
    """Runs lm-eval's command line."""
    if "spd" not in model_registry:  # spd.harness, where it was imported, has registered it
        model_registry.register("spd", target="spd.harness:SpdLM")  # imported when asked for
    setup_logging()
    command = HarnessCLI()
    asked = command.parse_args()
    try:
        if asked.command == "run":
            _look_at_tasks(asked)
        command.execute(asked)
    except UserError as error:
        sys.exit(f"spd: {error}")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_rank()


def _look_at_tasks(asked: argparse.Namespace) -> None:
    """Raises UserError for tasks of `--model spd` that do not exist or whose data are missing, which lm-eval finds out
    with a model loaded."""
    from lm_eval.config.evaluate_config import EvaluatorConfig

    from spd.tasks import Tasks, load_for_command

    with contextlib.redirect_stdout(io.StringIO()):  # lm-eval shows a --config file, and will once more
        config = EvaluatorConfig.from_cli(asked)
    if config.model != "spd":
        return
    if config.include_path:  # whose tasks are enough, most often: lm-eval's own are thousands of files
        own = Tasks(str(config.include_path), False)
        if all(name in own.all_tasks for name in config.tasks):
            load_for_command(own, config.tasks)
            return
    try:
        manager = config.process_tasks(config.metadata)
    except ValueError as error:  # lm-eval's, of names
        raise UserError(f"{error}; lm_eval ls tasks shows all.") from error
    load_for_command(manager, config.tasks)


if __name__ == "__main__":
    main()
