"""One rank a process, started by torchrun over gloo, against virtual ranks."""

from pathlib import Path

import pytest
from torch import Tensor

import spd
from spd.launch import run_ranks

REFERENCE_MODELS = sorted((Path(__file__).parent.parent / "experiments/reference/models").glob("ref_*"))


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_real_ranks_equal_virtual_ranks(
    tiny_llama: Path, tiny_opt: Path, tiny_qwen2: Path, input_ids: Tensor, tp_size: int
) -> None:
    folders = {folder.name: str(folder) for folder in (tiny_llama, tiny_opt, tiny_qwen2, *REFERENCE_MODELS)}
    arguments = {"folders": folders, "tp_size": tp_size, "input_ids": input_ids.tolist()}
    differences = run_ranks("tests.rank_checks:compare_with_virtual_ranks", arguments, tp_size=tp_size, timeout_s=240)
    assert len(differences) == 3 * 4 + 3 * len(REFERENCE_MODELS)
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
