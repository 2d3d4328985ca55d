"""Run one function on `tp_size` torchrun ranks of this machine; bring back its result or the first failure.

Three kinds of process take part. The *caller* (`run_ranks`) writes a job file and waits. The *agent* is torchrun
itself, called in a process of its own that also writes down how each rank ended. The *ranks* import the function,
run it, and rank 0 writes what it returned. Everything they exchange lies as JSON in one folder, which stays behind
only when the launch fails.

    result = run_ranks("spd.latency:measure_rank", {"checkpoint": "..."}, tp_size=4)

This module imports neither torch nor the engine, so that a rank is ready to be stopped before its slow imports begin.
"""

import contextlib
import ctypes
import errno
import faulthandler
import json
import os
import pkgutil
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from spd.errors import UserError

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""

_POLL_S = 0.1
_LOG_TAIL_LINES = 30
# How a rank ends because another one did: torchrun's SIGTERM, or a C++ abort over a lost connection.
_FOLLOWS_ANOTHER = (-signal.SIGTERM, -signal.SIGABRT)


class RankFailed(RuntimeError):
    """A rank of a launch died, or the launch took too long. The message's first line says what happened,
    and the first failing rank's traceback follows.

    `rank` is that rank, or None when no single rank is to blame (a timeout, torchrun itself).
    """

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


def check_port(port: int) -> None:
    """Raise `UserError` when `port` cannot be listened on. 0 stands for "pick a free one" and is always fine."""
    if not 0 <= port <= 65535:
        raise UserError(f"port {port} does not exist: give one between 1 and 65535, or 0 to pick a free one")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As the rendezvous store does: a port whose last connection is only winding down is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                reason = "is in use by another process"
            else:
                reason = f"cannot be listened on ({error.strerror})"
            raise UserError(
                f"port {port} {reason}: give another one as parallel.port, or 0 to pick a free one"
            ) from None


def threads_per_rank(tp_size: int) -> int:
    """CPU threads each of `tp_size` ranks may use: the cores this process is allowed, shared out, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // tp_size)


def run_ranks(
    function: str,
    arguments: dict[str, Any],
    *,
    tp_size: int,
    port: int = 0,
    timeout_s: float = 600,
    environment: dict[str, str] | None = None,
    log_dir: Path | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Call `function(arguments, on_progress)` on every one of `tp_size` ranks; return what rank 0 returned.

    Args:
        function: where the function lives, as "package.module:name". Each rank imports it afresh.
        arguments: what it is called with; must survive JSON, as must the dict it returns on rank 0.
        tp_size: number of ranks, all on this machine, each with its share of the CPU cores.
        port: for the rendezvous; 0 picks a free one.
        timeout_s: seconds until the whole launch, imports included, is given up and killed.
        environment: variables that the ranks have beside this process's.
        log_dir: where the folder of a launch that failed is kept, with each rank's output; a temporary folder
            that always goes away when None.
        on_progress: called here with `(done, total)` as rank 0 reports it.

    Raises:
        UserError: the port is in use, or a rank raised a `UserError`.
        RankFailed: a rank raised anything else, was killed, or the time was up.

    However this returns, Ctrl-C included, no process of the launch is left. On Linux the ranks also end when this
    process is killed outright.
    """
    if tp_size < 1:
        raise UserError(f"tp_size must be at least 1, got {tp_size}")
    check_port(port)
    if log_dir is not None:
        log_dir.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=time.strftime("launch-%Y%m%d-%H%M%S-"), dir=log_dir)).resolve()
    keep = False
    try:
        job = {"function": function, "arguments": arguments, "tp_size": tp_size, "port": port, "caller": os.getpid()}
        _write_json(folder / "job.json", job)
        with (folder / "torchrun.log").open("w") as log:
            agent = subprocess.Popen(
                [sys.executable, "-m", "spd.launch", "agent", str(folder)],
                env=_environment(tp_size) | (environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            _wait(agent, folder, timeout_s, on_progress)
        finally:
            _kill(agent)
        if agent.returncode != 0:
            raise _failure(folder, agent.returncode)
        result: dict[str, Any] = json.loads((folder / "result.json").read_text())
        return result
    except RankFailed as error:
        if log_dir is None:
            raise
        keep = True
        raise RankFailed(f"{error}\nThe output of every rank is in {folder}", rank=error.rank) from None
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _environment(tp_size: int) -> dict[str, str]:
    """The environment of the agent and, through it, of the ranks."""
    # A caller that is itself a torchrun or Slurm task must not pass on its own place in a world.
    foreign = ("TORCHELASTIC_", "MASTER_", "LOCAL_", "GROUP_", "ROLE_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    for name in ("RANK", "WORLD_SIZE"):
        env.pop(name, None)
    env["OMP_NUM_THREADS"] = str(threads_per_rank(tp_size))
    # spd may be imported from a checkout that is not installed, and the caller's folder may be another one.
    here = str(Path(__file__).resolve().parent.parent)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [here, env.get("PYTHONPATH", "")]))
    env["PYTHONUNBUFFERED"] = "1"
    # Without a name gloo resolves the host's name, which many containers cannot.
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if loopback is not None:
        env.setdefault("GLOO_SOCKET_IFNAME", loopback)
    return env


def _wait(agent: "subprocess.Popen[bytes]", folder: Path, timeout_s: float, on_progress: Progress | None) -> None:
    """Return once the agent has ended; pass rank 0's progress on meanwhile."""
    deadline = time.monotonic() + timeout_s
    seen: list[int] | None = None
    while agent.poll() is None:
        if time.monotonic() > deadline:
            raise RankFailed(
                f"the launch did not end within {timeout_s:g} s, and all ranks were killed; for a latency write "
                f"latency.timeout_s={2 * timeout_s:g} if it should take as long.\n"
                f"{_stacks(folder)}"
            )
        time.sleep(_POLL_S)
        if on_progress is not None and (folder / "progress.json").exists():
            latest = json.loads((folder / "progress.json").read_text())
            if latest != seen:
                seen = latest
                on_progress(*latest)


def _kill(agent: "subprocess.Popen[bytes]") -> None:
    """Kill the agent and its ranks, if any still run. They hold nothing that needs an orderly end."""
    family: list[psutil.Process] = []
    if agent.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(agent.pid).children(recursive=True)
        agent.kill()
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family, timeout=10)
    agent.wait()


def _failure(folder: Path, agent_code: int) -> Exception:
    """The error to raise for a launch whose agent ended with `agent_code`, from what ranks and agent wrote down."""
    exits: dict[int, int] = {}
    if (folder / "exits.json").exists():
        exits = {int(rank): code for rank, code in json.loads((folder / "exits.json").read_text()).items()}
    errors = {rank: json.loads(path.read_text()) for rank, path in _per_rank(folder, "error.json").items()}
    tp_size = json.loads((folder / "job.json").read_text())["tp_size"]
    # A rank that ended without a word lost the others their connection, which they then recorded. Otherwise the
    # first to record its error was the cause: a rank records before it closes its connections.
    silent = [rank for rank, code in exits.items() if rank not in errors and code not in _FOLLOWS_ANOTHER]
    if silent:
        first = silent[0]
    elif errors:
        first = min(errors, key=lambda rank: errors[rank]["time_ns"])
    elif exits:
        first = min(exits)
    else:
        how = _how_ended(agent_code)
        return RankFailed(f"torchrun {how} before any rank failed:\n{_tail(folder / 'torchrun.log')}")
    if first in errors and errors[first]["user_error"] is not None:
        return UserError(errors[first]["user_error"])
    if first in errors:
        message = f"rank {first} of {tp_size} failed: {errors[first]['summary']}\n{errors[first]['traceback'].rstrip()}"
    else:
        message = f"rank {first} of {tp_size} {_how_ended(exits[first])} without a traceback"
        if exits[first] == -signal.SIGKILL:
            message += " (often the kernel, out of memory)"
        # What a rank says before it has a file of its own goes to torchrun's.
        tail = _tail(_per_rank(folder, "stderr.log").get(first, folder / "torchrun.log"))
        message += f"; its last words:\n{tail}" if tail else "; it printed nothing"
    others = [f"rank {rank}: {error['summary']}" for rank, error in errors.items() if rank != first]
    quiet = {r: code for r, code in exits.items() if r != first and r not in errors}
    others += [f"rank {r} {_how_ended(code)}" for r, code in quiet.items()]
    if others:
        message += "\nAfter that: " + "; ".join(others)
    # An abort can also be the cause: of CUDA or NCCL, who have no traceback.
    for r in (r for r, code in quiet.items() if code == -signal.SIGABRT):
        if tail := _tail(_per_rank(folder, "stderr.log").get(r, folder / "torchrun.log")):
            message += f"\nThe last words of rank {r}:\n{tail}"
    return RankFailed(message, rank=first)


def _how_ended(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"


def _stacks(folder: Path) -> str:
    """Where each rank is stuck, as the faulthandler of each writes it to its own output on SIGUSR1."""
    for path in _per_rank(folder, "pid").values():
        with contextlib.suppress(ProcessLookupError, ValueError):
            os.kill(int(path.read_text()), signal.SIGUSR1)
    time.sleep(0.5)
    logs = _per_rank(folder, "stderr.log")
    return "\n".join(f"rank {rank} was here:\n{_tail(log)}" for rank, log in logs.items())


def _per_rank(folder: Path, name: str) -> dict[int, Path]:
    """The file called `name` of each rank that has one, in order of rank."""
    found = {int(path.name.split(".")[0].removeprefix("rank")): path for path in folder.glob(f"rank*.{name}")}
    return dict(sorted(found.items()))


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:])


def _write_json(path: Path, data: Any) -> None:
    """Write whole or not at all: readers poll these files."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(data))
    draft.replace(path)


def _die_with_parent(parent: int) -> None:
    """Let the kernel kill this process when `parent` dies, however it dies. Linux only; elsewhere nothing happens."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _agent_main(folder: Path) -> int:
    """Be torchrun for the job in `folder`; write down each failed rank's exit status."""
    job = json.loads((folder / "job.json").read_text())
    _die_with_parent(job["caller"])
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    command = [
        "--nnodes=1",
        f"--nproc-per-node={job['tp_size']}",
        "--max-restarts=0",
        "--monitor-interval=0.1",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{job['port']}",
        f"--rdzv-id={uuid.uuid4()}",
        "--local-addr=127.0.0.1",
        f"--log-dir={folder / 'torchrun'}",
        *("-m", "spd.launch", "rank", str(folder), str(os.getpid())),
    ]
    try:
        run.run(run.parse_args(command))
    except ChildFailedError as error:
        _write_json(folder / "exits.json", {rank: failure.exitcode for rank, failure in error.failures.items()})
        return 1
    return 0


def _rank_main(folder: Path, agent: int) -> None:
    """Be one rank: run the job's function, write rank 0's result or this rank's error."""
    _die_with_parent(agent)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    rank = os.environ["RANK"]
    # Own file instead of torchrun's redirects: its folders carry the attempt and a random id in their names.
    output = os.open(folder / f"rank{rank}.stderr.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    (folder / f"rank{rank}.pid").write_text(str(os.getpid()))
    job = json.loads((folder / "job.json").read_text())

    def on_progress(done: int, total: int) -> None:
        if rank == "0":
            _write_json(folder / "progress.json", [done, total])

    try:
        result = pkgutil.resolve_name(job["function"])(job["arguments"], on_progress)
        if rank == "0":
            _write_json(folder / "result.json", result)
    except BaseException as error:
        record = {
            "time_ns": time.time_ns(),
            "summary": "".join(traceback.format_exception_only(error)).strip().splitlines()[0],
            "traceback": traceback.format_exc(),
            "user_error": str(error) if isinstance(error, UserError) else None,
        }
        _write_json(folder / f"rank{rank}.error.json", record)
        traceback.print_exc()
        # At once: tearing down a half-closed process group can hang.
        os._exit(1)
    end_rank()


def end_rank() -> None:
    """Ends the process of a rank that is done, its process group closed."""
    dist: Any = sys.modules.get("torch.distributed")
    # NCCL's would wait for CUDA graphs that hold its kernels.
    if dist is not None and dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()  # else gloo and torch warn about a group that was left open
    sys.stdout.flush()
    sys.stderr.flush()
    # Not through the interpreter's own end, at which a thread of the libraries now and then aborts the process.
    os._exit(0)


if __name__ == "__main__":
    # `python -m spd.launch agent FOLDER` and `... rank FOLDER AGENT_PID` are what run_ranks starts; not for people.
    if sys.argv[1] == "agent":
        sys.exit(_agent_main(Path(sys.argv[2])))
    _rank_main(Path(sys.argv[2]), int(sys.argv[3]))
