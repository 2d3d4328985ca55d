"""run.py as it is typed: real processes, real signals, a real full disk."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from conftest import WORDS
from hydra import compose, initialize_config_dir
from hydra.types import RunMode
from safetensors.torch import load_file, save_file

import run
from spd.compose import from_hydra
from spd.config import RunConfig
from spd.paths import ROOT
from spd.sweep import Sweep

PATIENCE_S = 240


class Runner:
    """`python run.py` on a tiny model, with everything it writes in one folder."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.folder, self.runs = folder, folder / "runs"
        words = random.Random(0)
        (folder / "text.txt").write_text(" ".join(words.choice(WORDS) for _ in range(400)))
        self.settings = [
            "model=custom",
            f"model.path={model}",
            f"data.path={folder / 'text.txt'}",
            f"data.heldout_path={folder / 'text.txt'}",
            "data.samples=2",
            "data.sequence_length=16",
            "parallel=tp2",
            "eval=none",
            "tracker=none",
            "sweep=mine",
            f"output_dir={self.runs}",
        ]

    def start(self, *overrides: str) -> subprocess.Popen[str]:
        # -u: what a run says must arrive while it runs.
        command = [sys.executable, "-u", str(ROOT / "run.py"), *overrides, *self.settings]
        return subprocess.Popen(
            command, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def run(self, *overrides: str) -> tuple[int, str, str]:
        """Exit status, standard output, standard error."""
        process = self.start(*overrides)
        out, err = process.communicate(timeout=PATIENCE_S)
        return process.returncode, out, err

    def records(self) -> dict[float, str]:
        """Drop fraction -> status, of every record there is."""
        records = [json.loads(file.read_text()) for file in self.runs.glob("points/*/result.json")]
        return {record["config"]["drop"]: record["status"] for record in records}

    def half_written(self) -> list[Path]:
        return [file for file in self.runs.rglob("*") if file.suffix == ".part"]


@pytest.fixture
def runner(tiny_llama: Path, tmp_path: Path) -> Runner:
    return Runner(tiny_llama, tmp_path)


@pytest.mark.slow
def test_one_point_from_another_folder_with_latency_from_real_ranks(runner: Runner) -> None:
    fast = ["latency=cpu", "latency.prompt_length=8", "latency.new_tokens=2", "latency.launches=1", "latency.repeats=1"]
    status, out, err = runner.run("drop=0.5", *fast, "latency.drops=[0]")
    assert status == 0, err
    assert "done" in out
    (file,) = runner.runs.glob("points/*/result.json")
    record = json.loads(file.read_text())
    assert record["perplexity"]["value"] > 1
    assert record["latency"]["ttft_ms"]["median"] > 0
    assert record["latency"]["backend"] == "gloo"
    assert str(file) in out
    # What libraries chatter belongs in the log, and what the runner says is a few lines.
    assert len(err.splitlines()) < 12, err


@pytest.mark.slow
def test_a_points_own_configuration_can_be_run_again_with_settings_changed(runner: Runner) -> None:
    assert runner.run("drop=0.5")[0] == 0
    (file,) = runner.runs.glob("points/*/config.yaml")
    runner.settings = []
    again = ("--config-path", str(file.parent), "--config-name", "config")
    status, _, err = runner.run(*again)
    assert (status, len(runner.records())) == (0, 1), err
    assert "done before" in err
    status, _, err = runner.run(*again, "drop=0", "parallel.tp_size=1")
    assert (status, runner.records()) == (0, {0.5: "done", 0.0: "done"}), err
    assert {path.name for path in runner.folder.iterdir()} <= {"runs", "text.txt", "tiny_llama"}
    for wrong, said in (("strategy=zs", "write strategy.name=zs"), ("-m", "leave --config-path out")):
        status, _, err = runner.run(*again, wrong)
        assert status == 1
        assert said in err


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["stratgy=zs"], "Did you mean strategy?"),
        (["latency=gpu"], "torch sees 0"),
        (["strategy=5"], "what chooses an option of a group is its name, as in parallel=tp2"),
        (["hydra/launcher=slurm"], "hydra/launcher starts the points of a sweep; put -m first"),
        (["-m", "drop=0,0.25,1.7"], "drop=1.7"),
        (["parallel.tp_size=3"], "Sizes that do: 1, 2, 4, 8"),
    ],
)
def test_a_refusal_is_a_sentence_and_leaves_nothing_behind(runner: Runner, overrides: list[str], said: str) -> None:
    runner.settings = [s for s in runner.settings if not overrides[-1].startswith("parallel") or s != "parallel=tp2"]
    status, out, err = runner.run(*overrides)
    assert status == 1
    assert said in err
    assert "Traceback" not in err
    assert "Error executing job" not in err
    assert out == ""
    assert not runner.records()


@pytest.mark.slow
def test_one_failed_point_does_not_lose_the_others(runner: Runner, tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "other")
    (file,) = (tmp_path / "other").glob("*.safetensors")
    weights = load_file(file)  # no numbers, which only computing finds out
    save_file(weights | {"model.norm.weight": weights["model.norm.weight"] * math.nan}, file, {"format": "pt"})
    runner.settings.remove(f"model.path={tiny_llama}")
    status, out, err = runner.run("-m", f"model.path={tmp_path / 'other'},{tiny_llama}", "drop=0,1")
    assert status == 1, err
    assert "2 of 4 points are done" in out
    assert "Traceback" not in err
    frame = pd.read_csv(runner.runs / "sweeps" / "mine" / "points.csv")
    assert frame["status"].tolist() == ["failed", "failed", "done", "done"]
    assert "The model's loss is not finite" in frame["error"][0]
    assert frame["perplexity"].isna().tolist() == [True, True, False, False]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_sweep_goes_on_where_it_was(runner: Runner, number: signal.Signals) -> None:
    process = runner.start("-m", "drop=0,0.3,0.6,1")
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("point 3/4"):
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else 143), err
    assert "Traceback" not in err
    assert runner.records().items() >= {0.0: "done", 0.3: "done"}.items()
    assert 1.0 not in runner.records()
    assert not runner.half_written()
    if number == signal.SIGTERM:
        return

    status, out, err = runner.run("-m", "drop=0,0.3,0.6,1")
    assert status == 0, err
    assert err.count("done before") >= 2
    assert err.count("measuring sensitivities") == 0
    assert "4 of 4 points are done" in out


@pytest.mark.slow
def test_a_full_disk_stops_the_sweep_and_keeps_what_is_done(runner: Runner) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    runner.runs.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "spd-test", str(runner.runs)], check=False)
    if mounted.returncode != 0:
        pytest.skip("no file system can be mounted here")
    try:
        assert runner.run("-m", "drop=0")[0] == 0
        for name in ("points.csv", "curve.png"):  # which the next sweep would remove, and so find room
            (runner.runs / "sweeps" / "mine" / name).unlink()
        filler = runner.runs / "filler"
        with filler.open("wb") as stream:  # leaves one page, less than a point takes
            free = shutil.disk_usage(runner.runs).free
            stream.write(b"0" * max(0, free - 4096))
        status, out, err = runner.run("-m", "drop=0,1")
        assert status == 1, err
        assert "nothing more can be written" in err
        assert "Traceback" not in err
        assert runner.records() == {0.0: "done"}
        assert not runner.half_written()
        filler.unlink()
        status, out, err = runner.run("-m", "drop=0,1")
        assert status == 0, err
        assert "2 of 2 points are done" in out
    finally:
        subprocess.run(["umount", str(runner.runs)], check=True)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undoes what run.cli changes in its process."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)
    monkeypatch.setattr(run, "quiet", lambda: None)


@pytest.mark.usefixtures("in_this_process")
def test_when_the_launcher_gives_up_the_sweep_is_summed_up_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Rest:
        finished = False

        def started(self) -> bool:
            return True

        def finish(self) -> bool:
            self.finished = True
            return False

    def lost() -> None:
        raise RuntimeError("job 7 was cancelled")

    rest = Rest()
    monkeypatch.setattr(run, "main", lost)
    monkeypatch.setattr(run.Sweep, "current", rest)
    assert run.cli() == 1
    assert rest.finished
    assert "the launcher gave up (RuntimeError: job 7 was cancelled)" in capsys.readouterr().err


@pytest.mark.usefixtures("in_this_process")
def test_a_launcher_that_starts_no_job_is_said_instead_of_a_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def missing() -> None:
        raise RuntimeError('Could not detect "srun"')

    monkeypatch.setattr(run, "main", missing)
    monkeypatch.setattr(run.Sweep, "current", Sweep(tmp_path, [["drop=0"]], [RunConfig()]))
    assert run.cli() == 'Error: the launcher could not start a job (RuntimeError: Could not detect "srun").'


@pytest.mark.parametrize("multirun", [[], ["-m"]])
def test_a_folder_that_cannot_hold_results_is_one_sentence(runner: Runner, multirun: list[str]) -> None:
    runner.runs.write_text("a file")
    status, _, said = runner.run(*multirun, "drop=0")
    assert status == 1
    assert "cannot be used (Not a directory); if it is to hold results, give another output_dir." in said
    assert "Traceback" not in said


def test_a_text_that_vanishes_during_a_sweep_fails_its_points_only(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = compose("config", [*runner.settings, "drop=0.5"])
    sweep = Sweep(runner.runs / "sweeps" / "mine", [["drop=0.5"]], [from_hydra(composed)])
    sweep.begin()
    where = SimpleNamespace(output_dir=str(sweep.folder / "0"))
    job = SimpleNamespace(mode=RunMode.MULTIRUN, runtime=where, callbacks={"sweep": None})
    monkeypatch.setattr(run.HydraConfig, "get", lambda: job)
    monkeypatch.setattr(run, "quiet", lambda: None)
    (runner.folder / "text.txt").unlink()
    run.main.__wrapped__(composed)
    (record,) = sweep.records()
    assert record["status"] == "failed"
    assert "text.txt' does not exist" in record["error"]
    assert not sweep.finish()
    assert "0 of 1 points are done" in capsys.readouterr().out


@pytest.mark.usefixtures("in_this_process")
def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug() -> None:
        raise RuntimeError("never happens")

    monkeypatch.setattr(run, "main", bug)
    monkeypatch.setattr(run.Sweep, "current", None)
    with pytest.raises(RuntimeError, match="never happens"):
        run.cli()
