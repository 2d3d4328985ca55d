"""The numbers in the documents of experiments/ are those of the records beside them."""

import json
from pathlib import Path

import pytest

from spd.figures import read_points

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
SWEEPS = sorted(path.parent for path in EXPERIMENTS.glob("*/points.csv"))


@pytest.mark.parametrize("folder", SWEEPS, ids=lambda folder: folder.name)
def test_a_sweeps_table_is_its_points(folder: Path) -> None:
    readme, points = (folder / "README.md").read_text(), read_points(folder / "points.csv")
    assert (points["status"] == "done").all()
    assert (folder / "curve.png").is_file()
    for point in points.itertuples():
        accuracy = f"{point.accuracy_mean:.3f} ± {point.accuracy_mean_stderr:.3f}"
        row = f"| {point.drop:g} | {point.num_dropped} | {accuracy} | {point.perplexity:.3f} |"
        assert row in readme


def test_the_engines_numbers_are_its_records_and_within_what_was_asked() -> None:
    readme = (EXPERIMENTS / "engine/README.md").read_text()
    speed = json.loads((EXPERIMENTS / "engine/speed.json").read_text())
    for name, row in speed["models"].items():
        forward = row["forward_over_dense_hf"]
        sensitivity = row["suffix_sensitivity_over_evaluation"]["median"]
        ratios = [forward[arm]["median"] for arm in ("virtual_nothing_dropped", "virtual_all_dropped")]
        assert f"| {name} | {ratios[0]:.2f} | {ratios[1]:.2f} | {sensitivity:.1f} |" in readme
        assert max(ratios) <= 1.5
        assert sensitivity <= row["suffix_sensitivity_allowed"]
    for row in json.loads((EXPERIMENTS / "engine/loading.json").read_text())["rows"]:
        assert row["peak_over_shard"] <= 1.10
        assert f"{row['peak_over_shard']:.3f}" in readme
