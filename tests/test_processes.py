"""One rank a process, started by torchrun over gloo, against virtual ranks."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import spd
from spd.launch import run_ranks

REFERENCE_MODELS = sorted((Path(__file__).parent.parent / "experiments/reference/models").glob("ref_*"))


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
    models = (tiny_llama, tiny_opt, tiny_qwen2, corrected, *REFERENCE_MODELS)
    folders = {folder.name: str(folder) for folder in models}
    arguments = {"folders": folders, "tp_size": tp_size, "input_ids": input_ids.tolist()}
    differences = run_ranks("tests.rank_checks:compare_with_virtual_ranks", arguments, tp_size=tp_size, timeout_s=240)
    assert len(differences) == 4 * 4 + 3 * len(REFERENCE_MODELS)
    for case, (difference, same_tokens) in differences.items():
        assert difference <= 2e-5, case
        assert same_tokens, case


def test_processes_without_torchrun_are_refused(tiny_llama: Path) -> None:
    with pytest.raises(spd.UserError, match="torchrun --nproc-per-node 2"):
        spd.load(tiny_llama, tp_size=2, ranks="processes")


def test_another_number_of_processes_than_tp_size_is_refused(tiny_llama: Path, input_ids: Tensor) -> None:
    arguments = {"folders": {"llama": str(tiny_llama)}, "tp_size": 4, "input_ids": input_ids.tolist()}
    with pytest.raises(spd.UserError, match=r"started 2 processes.*--nproc-per-node 4"):
        run_ranks("tests.rank_checks:compare_with_virtual_ranks", arguments, tp_size=2, timeout_s=120)
