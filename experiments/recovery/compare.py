"""Each strategy against zero-shot on the same items: how much its mean accuracy differs, and the error of that.

    python -m experiments.recovery.compare runs/sweeps/recovery/points.csv --record experiments/recovery/paired.csv

Both models answered the same questions, so the error is that of the paired differences, which is smaller than that of
two evaluations apart.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd

from spd.figures import read_points

LINE = ["model", "tp_size", "seed", "drop"]


def difference(scores: dict[str, str], reference: dict[str, str]) -> tuple[float, float]:
    """Mean over the tasks of the difference in their mean scores, and its standard error; scores as records have them.

    >>> difference({"a": "1 1 0 1"}, {"a": "1 0 0 1"})
    (0.25, 0.25)
    """
    means, errors = [], []
    for task, text in scores.items():
        items = np.array(text.split(), dtype=float) - np.array(reference[task].split(), dtype=float)
        means.append(items.mean())
        errors.append(items.std(ddof=1) / math.sqrt(len(items)))
    return float(math.fsum(means) / len(means)), float(math.hypot(*errors) / len(errors))


def compare(points: pd.DataFrame, records: Path) -> pd.DataFrame:
    """A row for each point of another strategy than zs: its difference to zs at the same number of dropped blocks.

    Args:
        points: of a sweep.
        records: folder that holds <key>/result.json of every point.
    """

    def scores(key: str) -> dict[str, str]:
        tasks = json.loads((records / key / "result.json").read_text())["accuracy"]["tasks"]
        return {name: task["scores"] for name, task in tasks.items()}

    rows = []
    for group, part in points.groupby(LINE):
        zero_shot = scores(part.loc[part["strategy"] == "zs", "key"].item())
        for point in part[part["strategy"] != "zs"].itertuples():
            mean, stderr = difference(scores(str(point.key)), zero_shot)
            named = dict(zip(LINE, group, strict=True)) | {"strategy": point.strategy}
            rows.append(named | {"difference": round(mean, 6), "stderr": round(stderr, 6)})
    return pd.DataFrame(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("points", type=Path, help="points.csv in the folder of a sweep under an output_dir")
    parser.add_argument("--record", type=Path, help="a CSV file")
    options = parser.parse_args()
    table = compare(read_points(options.points), options.points.resolve().parents[2] / "points")
    if options.record:
        table.to_csv(options.record, index=False)
    print(table.to_string(index=False))
