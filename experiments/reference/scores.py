"""Dense scores of a reference model on all nine tasks, through lm-eval: what the model card prints.

python -m experiments.reference.scores ref_llama      # writes records/ref_llama.scores.json
"""

import argparse
import json
from pathlib import Path

import lm_eval
import transformers

import spd
from spd.evaluation import evaluate

from .check import ZERO_SHOT

HERE = Path(__file__).parent


def scores(name: str) -> dict:
    """Every task with metric, value, standard error and items; the zero-shot mean; versions."""
    model = spd.load(HERE / "models" / name, tp_size=1, device="cpu", dtype="float32")
    zero_shot = evaluate(model, tasks=ZERO_SHOT, include_path=HERE / "tasks")
    others = evaluate(model, tasks=["rw_subjects", "rw_summary"], include_path=HERE / "tasks")
    return {
        "model": name,
        "weights": spd.checkpoint.fingerprint(HERE / "models" / name),
        "zero_shot_mean": zero_shot["mean"],
        "tasks": zero_shot["tasks"] | others["tasks"],
        "versions": {"lm_eval": lm_eval.__version__, "transformers": transformers.__version__},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="+")
    for name in parser.parse_args().model:
        record = scores(name)
        (HERE / "records" / f"{name}.scores.json").write_text(json.dumps(record, indent=1) + "\n")
        print(json.dumps(record, indent=1))
