"""lm-eval's own command with one model more: `lm_eval --model spd`, `torchrun ... -m spd.lm_eval_cli --model spd`."""

import os
import sys

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import model_registry

from spd.errors import UserError
from spd.launch import end_rank


def main() -> None:
    """Runs lm-eval's command line."""
    if "spd" not in model_registry:  # spd.harness, where it was imported, has registered it
        model_registry.register("spd", target="spd.harness:SpdLM")  # imported when asked for
    try:
        cli_evaluate()
    except UserError as error:
        sys.exit(f"spd: {error}")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_rank()


if __name__ == "__main__":
    main()
