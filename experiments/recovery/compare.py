"""Each point against the dense model and against zero-shot, item by item: differences of mean accuracy, their errors.

    python -m experiments.recovery.compare runs/sweeps/recovery/points.csv

writes paired.csv here. All answered the same questions, so the error is that of paired differences, which is smaller
than that of two evaluations apart.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd

from spd.figures import read_points

HERE = Path(__file__).parent


def difference(scores: dict[str, str], reference: dict[str, str]) -> tuple[float, float]:
    """Difference of the mean over tasks, and its standard error; scores as records have them."""
    means, errors = [], []
    for task, text in scores.items():
        items = np.array(text.split(), dtype=float) - np.array(reference[task].split(), dtype=float)
        means.append(items.mean())
        errors.append(items.std(ddof=1) / math.sqrt(len(items)))
    return float(math.fsum(means) / len(means)), float(math.hypot(*errors) / len(errors))


def compare(points: pd.DataFrame, records: Path) -> pd.DataFrame:
    """A row for each point with dropped blocks: its difference to nothing dropped and to zs with as many dropped.

    Args:
        points: of a sweep.
        records: folder that holds <key>/result.json of every point.
    """

    def scores(found: pd.DataFrame) -> dict[str, str]:
        tasks = json.loads((records / found["key"].iloc[0] / "result.json").read_text())["accuracy"]["tasks"]
        return {name: task["scores"] for name, task in tasks.items()}

    rows = []
    for (model, tp_size, seed), part in points.groupby(["model", "tp_size", "seed"]):
        dense = scores(part[part["drop"] == 0])
        for (drop, strategy), point in part[part["drop"] > 0].groupby(["drop", "strategy"]):
            own = scores(point)
            zero_shot = scores(part[(part["drop"] == drop) & (part["strategy"] == "zs")])
            row = {"model": model, "tp_size": tp_size, "strategy": strategy, "seed": seed, "drop": drop}
            for name, other in {"dense": dense, "zs": zero_shot}.items():
                row[f"to_{name}"], row[f"to_{name}_stderr"] = (round(x, 6) for x in difference(own, other))
            rows.append(row)
    return pd.DataFrame(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("points", type=Path, help="points.csv in the folder of a sweep under an output_dir")
    given = parser.parse_args().points
    table = compare(read_points(given), given.resolve().parents[2] / "points")
    table.to_csv(HERE / "paired.csv", index=False)
    print(table.to_string(index=False))
