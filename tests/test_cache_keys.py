"""What a cached number is found by: all that can change it, and nothing that cannot."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import make_checkpoint
from gpu_settings import SMALL
from rich.console import Console

from spd import keys, steps
from spd.config import (
    AllReduceKind,
    CorrectionKind,
    DType,
    Interconnect,
    LatencyKind,
    Order,
    RunConfig,
    Strategy,
    Weights,
)
from spd.gpu import step
from spd.progress import Display
from spd.results import FORMAT, Results, digest

EVERYTHING = {"sensitivity", "plan", "perplexity", "accuracy", "latency"}
TREATED = EVERYTHING - {"sensitivity"}

Change = Callable[[RunConfig], Any]


def under(section: str, name: str, value: Any) -> Change:
    def change(config: RunConfig) -> None:
        holder = config
        for part in section.split("."):
            holder = getattr(holder, part) if part else holder
        setattr(holder, name, value)

    change.__name__ = f"{section}.{name}"
    return change


def rewrite(setting: str) -> Change:
    def change(config: RunConfig) -> None:
        file = Path(getattr(config.data, setting))
        file.write_text(file.read_text()[::-1])

    change.__name__ = setting
    return change


def other_task(config: RunConfig) -> None:
    file = Path(config.eval.include_path) / "toy_last.yaml"
    file.write_text(file.read_text().replace("{{text}}", "{{text}}:"))


def other_weights(config: RunConfig) -> None:
    config.model.path = str(make_checkpoint(Path(config.output_dir).parent / "other", "llama", seed=1))


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Callable[[RunConfig], dict[str, str]]:
    """Kind -> a digest of what its cached value is found by. Sensitivities are measured, all else is not."""
    cached, kinds = Results.cached, {}

    def recording(self: Results, kind: str, parts: dict[str, Any], compute: Callable[[], Any]) -> Any:
        kinds[kind.removeprefix("gpu_")] = digest(parts)
        return cached(self, kind, parts, compute) if kind == "sensitivity" else {}

    monkeypatch.setattr(Results, "cached", recording)
    for module in (steps, step):
        monkeypatch.setattr(module, "summarise", lambda *_, **__: {})
    monkeypatch.setattr(steps, "check_gpus", lambda tp_size: None)

    def found(config: RunConfig) -> dict[str, str]:
        kinds.clear()
        made = steps.RandomSteps if config.weights is Weights.random else steps.Steps
        with Display("point", Console(file=io.StringIO())) as display:
            dict(made(config, Results(Path(config.output_dir), print), display).steps())
        return dict(kinds)

    return found


@pytest.fixture
def whole(config: RunConfig, tasks: Path, tmp_path: Path) -> RunConfig:
    """All that a point can compute, of blocks that are corrected and distilled."""
    config.strategy.name, config.strategy.tau1, config.strategy.tau2 = Strategy.zs_correction_b2b, -1e9, 1e9
    config.drop = 0.67
    config.eval.tasks = ["toy_last"]
    config.eval.include_path = str(shutil.copytree(tasks, tmp_path / "tasks"))
    config.latency.name, config.latency.drops = LatencyKind.cpu, [0.0, 0.67, 1.0]
    config.data.recovery_samples = 8
    return config


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        (other_weights, EVERYTHING),
        (under("parallel", "tp_size", 2), EVERYTHING),
        (under("model", "dtype", DType.bfloat16), EVERYTHING),
        (under("", "seed", 1), EVERYTHING),
        (under("data", "sequence_length", 12), EVERYTHING),
        (rewrite("path"), EVERYTHING),
        (under("data", "samples", 2), {"sensitivity", "perplexity"}),
        (under("strategy", "order", Order.alone), {"sensitivity", "plan"}),
        (under("", "drop", 1.0), TREATED - {"latency"}),
        (under("strategy", "name", Strategy.zs_correction), TREATED),
        (under("strategy.correction", "rank", 8), TREATED),
        (under("strategy.correction", "kind", CorrectionKind.scale), TREATED),
        (under("model.distillation", "epochs", 2), TREATED),
        (under("data", "recovery_samples", 9), TREATED),
        (rewrite("heldout_path"), {"perplexity"}),
        (under("eval", "tasks", ["toy_choice"]), {"accuracy"}),
        (under("eval", "limit", 5), {"accuracy"}),
        (under("eval", "num_fewshot", 1), {"accuracy"}),
        (other_task, {"accuracy"}),
        (under("latency", "prompt_length", 9), {"latency"}),
        (under("latency", "new_tokens", 3), {"latency"}),
        (under("latency", "batch_size", 2), {"latency"}),
        (under("latency", "launches", 2), {"latency"}),
        (under("latency", "repeats", 3), {"latency"}),
        (under("latency", "warmup", 0), {"latency"}),
        (under("latency", "realtime", False), {"latency"}),
        (under("latency", "drops", [0.0, 0.67]), {"latency"}),
        (under("parallel", "port", 29501), set()),
        (under("latency", "timeout_s", 10.0), set()),
        (under("model", "name", "other"), set()),
        (under("eval", "batch_size", 1), set()),
    ],
    ids=lambda of: getattr(of, "__name__", " "),
)
def test_a_number_is_found_by_what_determines_it(
    whole: RunConfig, found: Callable[[RunConfig], dict[str, str]], change: Change, kinds: set[str]
) -> None:
    before = found(whole)
    assert set(before) == EVERYTHING
    change(whole)
    after = found(whole)
    assert {kind for kind in EVERYTHING if before[kind] != after[kind]} == kinds


@pytest.mark.parametrize("name", ["cpu", "cores", "gpus"])
def test_latency_alone_belongs_to_a_machine(
    whole: RunConfig, found: Callable[[RunConfig], dict[str, str]], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, here = found(whole), keys.hardware()
    monkeypatch.setattr(keys, "hardware", lambda: here | {name: "another"})
    after = found(whole)
    assert {kind for kind in EVERYTHING if before[kind] != after[kind]} == {"latency"}


def of_gpus(architecture: str = "llama") -> RunConfig:
    config = RunConfig(weights=Weights.random, drop=0.5)
    config.latency.name, config.latency.drops = LatencyKind.gpu, [0.0, 0.5, 1.0]
    config.model.architecture = {"model_type": architecture, **SMALL[architecture]}
    config.parallel.tp_size = 2
    return config


@pytest.mark.parametrize(
    ("change", "another"),
    [
        (under("model", "architecture", {"model_type": "llama", **SMALL["llama"], "num_hidden_layers": 2}), True),
        (under("model", "dtype", DType.float16), True),
        (under("parallel", "tp_size", 1), True),
        (under("interconnect", "name", Interconnect.lbw), True),
        (under("latency", "prompt_length", 9), True),
        (under("latency", "new_tokens", 3), True),
        (under("latency", "decode_at", 300), True),
        (under("latency", "batch_size", 2), True),
        (under("latency", "launches", 2), True),
        (under("latency", "repeats", 3), True),
        (under("latency", "warmup", 0), True),
        (under("latency", "all_reduce", AllReduceKind.nccl), True),
        (under("latency", "blocks_alone", True), True),
        (under("latency", "tp_plan", True), True),
        (under("latency", "drops", [0.0, 0.3]), True),
        (under("", "drop", 1.0), False),
        (under("", "seed", 1), False),
        (under("strategy", "name", Strategy.zs_b2b), False),
        (under("parallel", "port", 29501), False),
        (under("latency", "timeout_s", 10.0), False),
    ],
    ids=lambda of: getattr(of, "__name__", " "),
)
def test_a_session_on_gpus_is_found_by_what_determines_it(
    found: Callable[[RunConfig], dict[str, str]], change: Change, another: bool, tmp_path: Path
) -> None:
    config = of_gpus()
    config.output_dir = str(tmp_path)
    before = found(config)["latency"]
    change(config)
    assert (found(config)["latency"] != before) == another


@pytest.mark.parametrize("what", ["engine", "NCCL_NVLS_ENABLE"])
def test_another_engine_or_nccl_times_another_session_on_gpus_and_makes_another_point(
    what: str,
    found: Callable[[RunConfig], dict[str, str]],
    whole: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def mine() -> list[str]:
        config = of_gpus()
        config.output_dir = str(tmp_path)
        display = Display("point", Console(file=io.StringIO()))
        return [
            found(config)["latency"],
            steps.RandomSteps(config, Results(tmp_path, print), display).key,
            found(whole)["latency"],
        ]

    before = mine()
    if what == "engine":
        monkeypatch.setattr(keys, "gpu_engine", lambda: "another")
    else:
        monkeypatch.setenv(what, "0")
    assert [key == was for key, was in zip(mine(), before, strict=True)] == [False, False, True]


def test_what_a_record_has_is_what_this_format_has(config: RunConfig, tasks: Path) -> None:
    # Kept records and scores of this format are served as they are: with another field here goes another FORMAT.
    from spd.point import run_point

    config.eval.tasks, config.eval.include_path, config.eval.limit = ["toy_last"], str(tasks), 2
    with Display("point", Console(file=io.StringIO())) as display:
        record = run_point(config, display)
    assert FORMAT == 4
    assert set(record["accuracy"]["tasks"]["toy_last"]) == {
        "metric", "value", "stderr", "items", "scores", "metrics", "parts"
    }  # fmt: skip
