"""What conf/ and the command line may say, and how what they may not say is refused."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from spd.compose import HydraError, explain, from_hydra
from spd.config import RunConfig, dump_yaml, to_dict
from spd.errors import UserError
from spd.paths import ROOT, find_path

CONF = ROOT / "conf"


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Overrides that point to files which exist, so that only what a test is about can be wrong."""
    text = tmp_path / "text.txt"
    text.write_text("word1 word2")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "one.yaml").write_text("task: own_task\noutput_type: multiple_choice\n")
    return [f"data.path={text}", f"data.heldout_path={text}", "eval=none", f"eval.include_path={tasks}"]


def composed(overrides: list[str]) -> RunConfig:
    """What run.py would make of a command line; raises UserError as run.py words it."""
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return from_hydra(compose("config", overrides))
    except HydraError as error:
        raise UserError(explain(error)) from error


def options(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize(
    ("group", "option"),
    [
        (group, option)
        for group in ("model", "interconnect", "strategy", "latency", "tracker")
        for option in options(group)
    ],
)
def test_every_option_in_conf_composes_to_the_schema(group: str, option: str, texts: list[str]) -> None:
    path = ["model.path=somewhere"] if option == "custom" else []
    path += ["latency=gpu"] if option in ("lbw", "socket") else []
    config = to_dict(composed([*texts, f"{group}={option}", *path]))
    assert config[group]["name"] == option


def test_defaults_are_a_dense_point_of_the_reference_model(texts: list[str]) -> None:
    config = composed(texts)
    assert (config.model.name, config.parallel.tp_size, config.drop) == ("ref_llama", 4, 0.0)


def test_quickstart_sweeps_seven_fractions_without_being_told_to() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        hydra = compose("config", ["experiment=quickstart"], return_hydra_config=True).hydra
    assert hydra.mode.name == "MULTIRUN"
    assert hydra.sweeper.params.drop == "0,0.25,0.5,0.625,0.75,0.875,1.0"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("stratgy=zs", ["stratgy", "Did you mean strategy?"]),
        ("+foo=1", ["foo", "no such setting", "drop"]),
        ("+tp_size=2", ["no such setting at the top level. Did you mean parallel.tp_size?"]),
        ("+limit=5", ["Did you mean eval.limit?"]),
        ("+data_root=x", ["Did you mean eval.data_root or data.data_root?"]),
        ("strategy.taul=1", ["strategy.taul", "tau1", "no such setting in strategy"]),
        ("+latency.warmups=1", ["latency.warmups", "Did you mean warmup?"]),
        ("strategy=zss", ["strategy=zss", "Did you mean zs?"]),
        ("parallel=tp3", ["parallel=tp3", "tp2", "tp4"]),
        ("parallel.tp_size=abc", ["parallel.tp_size=abc", "a whole number is needed"]),
        ("parallel.tp_size=2.5", ["parallel.tp_size=2.5", "a whole number is needed"]),
        ("drop=half", ["drop=half", "a number is needed"]),
        ("latency.drops=[a]", ["latency.drops=a", "a list of numbers"]),
        ("eval.tasks=3", ["eval.tasks", "a list of texts"]),
        ("strategy.order=random", ["strategy.order=random", "suffix, alone, front"]),
        ("drop=0,0.5", ["drop=0,0.5", "put -m first"]),
        ("a b", ["cannot be read", "key=value"]),
        ("+strategy=zs", ["without '+'"]),
        ("drop=1.5", ["drop=1.5", "between 0 and 1"]),
        ("drop=-0.1", ["drop=-0.1", "between 0 and 1"]),
        ("drop=nan", ["between 0 and 1"]),
        ("seed=-1", ["seed=-1", "0 or more"]),
        ("seed=99999999999999999999", ["seed=99999999999999999999", "below 2^63"]),
        ("sweep=a/b", ["sweep='a/b'", "letters"]),
        ("parallel.tp_size=0", ["parallel.tp_size=0", "1 or more"]),
        ("parallel.port=80", ["parallel.port=80", "0"]),
        ("strategy.tau1=11", ["strategy.tau1=11", "strategy.tau2=10"]),
        ("strategy.tau2=inf", ["strategy.tau2", "finite"]),
        ("strategy=zs_distil", ["zs_b2b"]),
        ("strategy.correction.rank=0", ["strategy.correction.rank=0", "1 or more"]),
        ("strategy.correction.ridge=0", ["strategy.correction.ridge=0", "1e-4"]),
        ("strategy.correction.kind=cubic", ["strategy.correction.kind=cubic", "linear", "shift"]),
        ("model.distillation.learning_rate=-1", ["model.distillation.learning_rate=-1", "5e-5"]),
        ("model.distillation.epochs=0", ["model.distillation.epochs=0", "1 or more"]),
        ("data.recovery_samples=7", ["data.recovery_samples=7", "8 or more"]),
        ("latency.prompt_length=0", ["latency.prompt_length=0", "1 or more"]),
        ("latency.timeout_s=0", ["latency.timeout_s=0", "300"]),
        ("latency.drops=[0,2]", ["latency.drops", "2", "between 0 and 1"]),
        ("data.samples=0", ["data.samples=0"]),
        ("data.sequence_length=1", ["data.sequence_length=1", "2 tokens"]),
        ("data.path=nowhere.txt", ["data.path='nowhere.txt'", "does not exist"]),
        ("eval.limit=0", ["eval.limit=0", "null for all"]),
        ("eval.batch_size=0", ["eval.batch_size=0", "1 or more, or auto"]),
        ("eval.batch_size=most", ["eval.batch_size=most", "1 or more, or auto"]),
        ("eval.tasks=[own_task,own_task]", ["own_task twice"]),
        ("eval.data_root=nowhere", ["eval.data_root='nowhere'", "does not exist"]),
        ("eval.include_path=nowhere", ["eval.include_path='nowhere'", "does not exist"]),
        ("model.path=null", ["model.path", "a text is needed"]),
        ("model.path=''", ["model.path is empty", "hub id"]),
    ],
)
def test_a_wrong_setting_is_refused_with_what_to_write(override: str, parts: list[str], texts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        composed([*texts, override])
    message = str(error.value)
    assert all(part in message for part in parts), message
    assert "Traceback" not in message
    assert "full_key" not in message


def test_one_data_root_serves_tasks_and_text(texts: list[str], tmp_path: Path) -> None:
    config = composed([*texts, "eval=zero_shot", "data=wikitext2", f"eval.data_root={tmp_path}"])
    assert config.data.data_root == config.eval.data_root == str(tmp_path)
    assert composed([*texts, "data=wikitext2", f"data.data_root={tmp_path}"]).eval.data_root is None
    with pytest.raises(UserError, match=r"data\.data_root='nowhere' does not exist"):
        composed([*texts, "data=wikitext2", "data.data_root=nowhere"])
    with pytest.raises(UserError, match=r"data\.heldout_split=train is data\.split too"):
        composed([*texts, "data=wikitext2", "data.heldout_split=train"])


@pytest.mark.parametrize("eval_", ["zero_shot", "mmlu", "longbench"])
def test_the_published_evaluations_need_no_folder_of_tasks(eval_: str) -> None:
    config = composed([f"eval={eval_}", "data=wikitext2"])
    assert config.eval.include_path is None
    assert (config.data.recovery_samples, config.data.sequence_length) == (128, 2048)


def test_a_misspelt_key_in_a_file_is_refused_too(texts: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "more" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("# @package _global_\nstrategy:\n  taul: 1\n")
    with pytest.raises(UserError, match=r"strategy\.taul"):
        composed([*texts, f"hydra.searchpath=[file://{tmp_path / 'more'}]", "experiment=mine"])


def test_a_record_s_configuration_gives_the_same_configuration_again(texts: list[str]) -> None:
    config = composed([*texts, "drop=0.5", "latency=cpu", "strategy.order=alone", "sweep=one"])
    again = from_hydra(OmegaConf.create(yaml.safe_load(dump_yaml(config))))
    assert to_dict(again) == to_dict(config)


def test_relative_paths_are_found_from_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_path("conf/config.yaml") == CONF / "config.yaml"
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").touch()
    assert find_path("conf/config.yaml") == tmp_path / "conf" / "config.yaml"
    assert find_path("nowhere") is None


def _sections() -> list[ast.ClassDef]:
    tree = ast.parse((ROOT / "spd" / "config.py").read_text())
    return [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Config")]


@pytest.mark.parametrize("section", _sections(), ids=lambda node: node.name)
def test_every_setting_has_a_docstring(section: ast.ClassDef) -> None:
    for setting, after in zip(section.body, [*section.body[1:], None], strict=True):
        if isinstance(setting, ast.AnnAssign):
            documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            assert documented, f"{section.name}.{ast.unparse(setting.target)}"


def test_conf_files_set_only_what_the_schema_names() -> None:
    sections: dict[str, Any] = {item.name: item.type for item in dataclasses.fields(RunConfig)}
    for file in CONF.glob("*/*.yaml"):
        if file.parent.name in sections:
            known = {item.name for item in dataclasses.fields(sections[file.parent.name])}
            assert set(yaml.safe_load(file.read_text())) <= known, file


def test_a_configuration_is_checked_without_waiting_for_torch() -> None:
    code = "import sys, spd.compose, spd.progress; print([m for m in ('torch', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
