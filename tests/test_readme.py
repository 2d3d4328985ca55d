"""What the README shows works as it stands there."""

import json
import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

import spd
from spd.compose import from_hydra

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [c.split("  #")[0].strip() for c in re.findall(r"^    python (run\.py .*)$", README, flags=re.MULTILINE)]


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_composes(command: str) -> None:
    arguments = [word for word in shlex.split(command)[1:] if "=" in word and "<" not in word]
    settings = [word.split(",")[0] for word in arguments if not word.startswith("hydra")]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        from_hydra(compose("config", overrides=settings))


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict = {}
    exec(example, names)
    assert names["logits"].shape == (2, 256, names["model"].config.vocab_size)
    assert 17 <= names["tokens"].shape[1] <= 24  # fewer than eight new ones where both texts end before
    assert len(names["plan"].dropped) == 6
    assert spd.load("runs/prepared").dropped == tuple(names["plan"].dropped)
    assert names["model"].dropped == (3, 5)


@pytest.mark.parametrize("notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_every_notebook_runs(notebook: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(notebook.parent)
    cells = json.loads(notebook.read_text())["cells"]
    names: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "commit notebooks without their outputs"
            exec("".join(cell["source"]), names)
