"""One rank a process, started by torchrun over gloo, against virtual ranks."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_checkpoint
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_exactness import shapes
from torch import Tensor

import spd
from spd.launch import run_ranks

MODELS = Path(__file__).parent.parent / "experiments/reference/models"
# All where few processes share the cores; at tp 8 the one whose key/value heads are on several ranks each.
REFERENCE_MODELS = {2: ["ref_llama", "ref_opt", "ref_qwen2"], 8: ["ref_qwen2"]}


def _correct(folder: Path, tp_size: int, out: Path) -> None:
    """Saves the model with a correction in every block, looking one token back."""
    model = spd.load(folder, tp_size=tp_size)
    ids = torch.randint(4, 64, (64, 16), generator=torch.Generator().manual_seed(1))
    report = spd.measure_sensitivity(model, ids[:8])
    everything = spd.make_plan(report, drop=1, strategy="zs_correction", tau1=-1e9)
    spd.apply(model, everything, ids, say=lambda _: None).save_pretrained(out)
    if tp_size > 1:
        assert all(block.correction is not None for block in spd.load(out).blocks)


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_real_ranks_equal_virtual_ranks(
    tiny_llama: Path, tiny_opt: Path, tiny_qwen2: Path, input_ids: Tensor, tp_size: int, tmp_path: Path
) -> None:
    corrected = tmp_path / "corrected"
    _correct(tiny_opt, tp_size, corrected)
    reference = [MODELS / name for name in REFERENCE_MODELS.get(tp_size, [])]
    models = (tiny_llama, tiny_opt, tiny_qwen2, corrected, *reference)
    folders = {folder.name: str(folder) for folder in models}
    arguments = {"folders": folders, "tp_size": tp_size, "input_ids": input_ids.tolist()}
    differences = run_ranks("tests.rank_checks:compare_with_virtual_ranks", arguments, tp_size=tp_size, timeout_s=240)
    assert len(differences) == 4 * 4 + 3 * len(reference)
    for case, (difference, same_tokens) in differences.items():
        assert difference <= 2e-5, case
        assert same_tokens, case


@settings(
    max_examples=2,  # the first is the simplest there is
    deadline=None,
    derandomize=True,  # greedy tokens of a random model may tie: the same shapes in every run
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(drawn=st.lists(shapes(tp_sizes=[2]), min_size=6, max_size=6), seed=st.integers(0, 99))
def test_real_ranks_equal_virtual_ranks_at_any_shape(drawn: list[tuple[str, int, dict[str, Any]]], seed: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folders = {}
        for i, (family, _, changes) in enumerate(drawn):
            folders[f"{i} {family}"] = str(make_checkpoint(Path(scratch) / str(i), family, seed=seed, **changes))
        ids = torch.randint(4, 64, (2, 7), generator=torch.Generator().manual_seed(seed))
        arguments = {"folders": folders, "tp_size": 2, "input_ids": ids.tolist()}
        differences = run_ranks("tests.rank_checks:compare_with_virtual_ranks", arguments, tp_size=2, timeout_s=240)
        assert all(any(case.startswith(name) for case in differences) for name in folders)
        for case, (difference, same_tokens) in differences.items():
            assert difference <= 2e-5, (case, drawn)
            assert same_tokens, (case, drawn)


def test_processes_without_torchrun_are_refused(tiny_llama: Path) -> None:
    with pytest.raises(spd.UserError, match="torchrun --nproc-per-node 2"):
        spd.load(tiny_llama, tp_size=2, ranks="processes")


def test_another_number_of_processes_than_tp_size_is_refused(tiny_llama: Path, input_ids: Tensor) -> None:
    arguments = {"folders": {"llama": str(tiny_llama)}, "tp_size": 4, "input_ids": input_ids.tolist()}
    with pytest.raises(spd.UserError, match=r"started 2 processes.*--nproc-per-node 4"):
        run_ranks("tests.rank_checks:compare_with_virtual_ranks", arguments, tp_size=2, timeout_s=120)
