"""The picture of the model card, from the committed records: loss while training, and accuracy as blocks are dropped.

python -m experiments.reference.card      # writes curve.png
"""

import json
import math

import matplotlib.pyplot as plt

from .check import ZERO_SHOT
from .items import ITEMS
from .train import MODELS
from .write import HERE


def standard_error(point: dict[str, float]) -> float:
    """Standard error of the zero-shot mean: the tasks' items are independent draws."""
    return math.sqrt(sum(point[task] * (1 - point[task]) / ITEMS for task in ZERO_SHOT)) / len(ZERO_SHOT)


def draw() -> None:
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name in MODELS:
        training = json.loads((HERE / "records" / f"{name}.train.json").read_text())
        dropping = json.loads((HERE / "records" / f"{name}.drop.json").read_text())
        curve, points = training["curve"][1:], dropping["points"]
        left.plot([at["step"] for at in curve], [at["loss"] for at in curve], label=name, linewidth=1.2)
        right.errorbar(
            [at["dropped"] for at in points],
            [100 * at["mean"] for at in points],
            [100 * standard_error(at) for at in points],
            label=name,
            marker="o",
            markersize=3.5,
            linewidth=1.2,
            capsize=2,
        )
    left.set(xlabel="step (24,576 tokens)", ylabel="training loss (nats a token)", ylim=(0.5, 1.6))
    right.set(xlabel="dropped blocks of 12, least sensitive first, tp 8", ylabel="zero-shot mean (%)", ylim=(45, 100))
    left.legend(frameon=False)
    figure.savefig(HERE / "curve.png", dpi=150)


if __name__ == "__main__":
    draw()
