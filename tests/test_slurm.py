"""A sweep through a real Slurm, as users type it. Start one with tests/slurm/start.sh, and export what it says."""

import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from conftest import WORDS

from spd.paths import ROOT


def _slurm_answers() -> bool:
    try:
        return subprocess.run(["sinfo"], capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


pytestmark = pytest.mark.slurm


@pytest.fixture(autouse=True)
def running_slurm() -> None:
    if not _slurm_answers():
        pytest.skip("no Slurm runs here; tests/slurm/start.sh DIR starts one, then export SLURM_CONF=DIR/slurm.conf")


@pytest.fixture
def settings(tiny_llama: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "text.txt").write_text(" ".join(WORDS * 5))
    return [
        "hydra/launcher=slurm",
        "hydra.launcher.timeout_min=5",
        "parallel=tp2",
        "model=custom",
        f"model.path={tiny_llama}",
        f"data.path={tmp_path / 'text.txt'}",
        f"data.heldout_path={tmp_path / 'text.txt'}",
        "data.sequence_length=16",
        "eval=none",
        "tracker=none",
        "sweep=cluster",
        f"output_dir={tmp_path / 'runs'}",
    ]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "run.py"), "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_a_sweep_runs_as_slurm_jobs_with_torchrun_ranks_inside(settings: list[str], tmp_path: Path) -> None:
    fast = ["latency=cpu", "latency.prompt_length=8", "latency.new_tokens=2", "latency.repeats=1", "latency.launches=1"]
    done = run(*settings, "drop=0,1", *fast, "latency.drops=[0,1]")
    assert done.returncode == 0, done.stderr
    assert "2 of 2 points are done" in done.stdout
    sweep = tmp_path / "runs" / "sweeps" / "cluster"
    frame = pd.read_csv(sweep / "points.csv")
    assert frame["status"].tolist() == ["done", "done"]
    assert (frame["ttft_ms"] > 0).all()
    assert (sweep / "curve.png").exists()
    # The jobs ran at the same time and shared what they have in common.
    assert len(list((tmp_path / "runs" / "cache" / "sensitivity").glob("*.json"))) == 1
    assert len(list((tmp_path / "runs" / "cache" / "latency").glob("*.json"))) == 1
    assert len(list(sweep.glob("slurm/*/*_submitted.pkl"))) == 2

    again = run(*settings, "drop=0,1", *fast, "latency.drops=[0,1]")
    assert again.returncode == 0, again.stderr
    logs = "".join(file.read_text() for file in sweep.glob("slurm/*/*_log.err"))
    assert logs.count("done before, not computed again") == 2


def test_a_wrong_point_is_refused_before_anything_is_submitted(settings: list[str], tmp_path: Path) -> None:
    done = run(*settings, "drop=0,1.7")
    assert done.returncode == 1
    assert "drop=1.7" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_point_that_fails_in_its_job_is_a_row_beside_the_others(settings: list[str], tmp_path: Path) -> None:
    # What a job's machine has is not known where the sweep is checked.
    done = run(*settings, "model.device=cuda,cpu", "drop=1")
    assert done.returncode == 1
    frame = pd.read_csv(tmp_path / "runs" / "sweeps" / "cluster" / "points.csv")
    assert frame["status"].tolist() == ["failed", "done"]
    assert "cuda" in frame["error"][0]


def test_a_job_that_is_killed_is_a_row_beside_the_others(settings: list[str], tmp_path: Path) -> None:
    if subprocess.run(["sacct"], capture_output=True, check=False).returncode != 0:
        pytest.skip("needs accounting: without it submitit waits for a killed job for ever (start.sh DIR accounting)")
    command = [sys.executable, str(ROOT / "run.py"), "-m", *settings, "drop=0,1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    job = ""
    while not job and process.poll() is None:
        time.sleep(0.2)
        shown = subprocess.run(
            ["squeue", "--noheader", "--format=%i", "--state=RUNNING"], capture_output=True, text=True
        )
        job = next((name for name in shown.stdout.split() if name.endswith("_0")), "")
    subprocess.run(["scancel", "--signal=KILL", job], check=True)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1, err
    assert "the launcher gave up" in err
    assert "1 of 2 points are done" in out
    frame = pd.read_csv(tmp_path / "runs" / "sweeps" / "cluster" / "points.csv")
    assert frame["status"].tolist() == ["failed", "done"]
    assert "left no record" in frame["error"][0]
