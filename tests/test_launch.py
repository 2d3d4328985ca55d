"""Launches of real torchrun ranks: results, failures, and that nothing stays behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from spd.errors import UserError
from spd.launch import RankFailed, check_port, run_ranks, threads_per_rank

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def ranks_find_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE))


def launch_processes() -> list[psutil.Process]:
    """Every agent or rank of any launch of this test's process, also one that lost its parent."""
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.environ().get("SPD_TEST_CALLER") == str(os.getpid()) and process.pid != os.getpid()
        except psutil.Error:
            continue
        if ours and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


@pytest.fixture(autouse=True)
def nothing_stays_behind(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.setenv("SPD_TEST_CALLER", str(os.getpid()))
    yield
    assert launch_processes() == []


def test_rank_zero_returns_what_all_ranks_computed_and_its_progress_arrives(tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []
    result = run_ranks(
        "launch_jobs:add_ranks",
        {"start": 10},
        tp_size=2,
        log_dir=tmp_path,
        on_progress=lambda done, total: progress.append((done, total)),
    )
    assert result == {"total": 21.0, "threads": str(threads_per_rank(2)), "ranks": 2}
    assert progress
    assert progress == sorted(set(progress))
    assert all(total == 3 for _, total in progress)
    assert list(tmp_path.iterdir()) == [], "a launch that went well leaves no files"


def test_a_rank_that_raises_ends_the_launch_with_its_own_traceback(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(RankFailed) as caught:
        run_ranks("launch_jobs:fail_in_the_middle", {"rank": 1, "how": "exception"}, tp_size=2, log_dir=tmp_path)
    assert time.monotonic() - start < 30
    message = str(caught.value)
    assert caught.value.rank == 1
    assert message.startswith("rank 1 of 2 failed: ZeroDivisionError: this rank divided by zero\nTraceback")
    assert "ZeroDivisionError: this rank divided by zero" in message
    assert "launch_jobs.py" in message
    (folder,) = tmp_path.iterdir()
    assert str(folder) in message
    assert (folder / "rank1.stderr.log").exists()


def test_a_killed_rank_ends_the_launch_with_its_signal_and_not_the_others_lost_connection() -> None:
    start = time.monotonic()
    with pytest.raises(RankFailed, match="rank 1 of 2 was killed by SIGKILL") as caught:
        run_ranks("launch_jobs:fail_in_the_middle", {"rank": 1, "how": "kill"}, tp_size=2)
    assert time.monotonic() - start < 30
    assert caught.value.rank == 1


def test_the_last_words_of_a_rank_that_aborts_are_shown_whoever_is_blamed() -> None:
    with pytest.raises(RankFailed, match="rank 1 was killed by SIGABRT") as caught:
        run_ranks("launch_jobs:fail_in_the_middle", {"rank": 1, "how": "abort"}, tp_size=2)
    assert "The last words of rank 1:" in str(caught.value)
    assert "a library gives up" in str(caught.value)


def test_a_user_error_on_a_rank_stays_a_user_error() -> None:
    with pytest.raises(UserError, match=r"^there are 8 heads: tp_size 1, 2, 4 or 8 would work$"):
        run_ranks("launch_jobs:user_error", {}, tp_size=1)


def test_a_launch_that_takes_too_long_is_killed_and_says_where_it_was() -> None:
    with pytest.raises(RankFailed, match="did not end within 8 s") as caught:
        run_ranks("launch_jobs:sleep_for_ever", {}, tp_size=1, timeout_s=8)
    assert "in sleep_for_ever" in str(caught.value)


def wait_for_ranks(caller: "subprocess.Popen[bytes]", marker: Path) -> list[int]:
    files = [Path(f"{marker}{rank}") for rank in range(2)]
    while not all(file.exists() and file.read_text() for file in files):
        assert caller.poll() is None
        time.sleep(0.1)
    return [int(file.read_text()) for file in files]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with a killed parent")
def test_stopping_the_caller_leaves_no_process(tmp_path: Path, how: signal.Signals) -> None:
    program = f"""
from spd.launch import run_ranks
run_ranks("launch_jobs:sleep_for_ever", {{"marker": {str(tmp_path / "rank")!r}}}, tp_size=2)
"""
    path = os.pathsep.join([str(HERE.parent), str(HERE)])
    caller = subprocess.Popen(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": path, "TMPDIR": str(tmp_path)}
    )
    ranks = wait_for_ranks(caller, tmp_path / "rank")
    assert all(psutil.pid_exists(pid) for pid in ranks)
    caller.send_signal(how)
    caller.wait(timeout=20)
    psutil.wait_procs(launch_processes(), timeout=10)
    # `nothing_stays_behind` checks the rest.


def test_a_port_in_use_is_refused_before_the_launch() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} is in use.*0 to pick a free one"):
            run_ranks("launch_jobs:add_ranks", {}, tp_size=2, port=port)
    check_port(port)
    with pytest.raises(UserError, match="does not exist"):
        check_port(70000)


def test_a_launch_uses_the_port_it_was_given() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert run_ranks("launch_jobs:add_ranks", {"start": 0}, tp_size=1, port=port)["total"] == 0.0


def test_ranks_share_the_cores() -> None:
    assert threads_per_rank(1) >= 1
    assert threads_per_rank(10_000) == 1
