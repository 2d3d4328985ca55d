"""From what Hydra composed to a RunConfig, and from what it could not compose to a sentence that says what to write.

`from_hydra` checks keys, types, ranges, combinations and files; `explain` words the errors of Hydra and OmegaConf.
"""

import dataclasses
import difflib
import re
from enum import Enum
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from spd.config import RunConfig, Weights
from spd.errors import UserError
from spd.paths import need_path

ConfigStore.instance().store(name="schema", node=RunConfig)

HydraError = (HydraException, OmegaConfBaseException)
"""What Hydra and OmegaConf raise for a configuration they cannot compose; `explain` words it."""


def from_hydra(composed: DictConfig) -> RunConfig:
    """The validated RunConfig of a composed configuration (without its `hydra` node).

    Raises:
        UserError: a key that does not exist, a value of the wrong type or out of range, a file that is not there.
    """
    try:
        plain = OmegaConf.to_container(composed, resolve=True)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), plain))
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from error
    assert isinstance(config, RunConfig)
    config.check()
    _check_files(config)
    return config


def _check_files(config: RunConfig) -> None:
    if config.weights is Weights.random:  # nothing is read
        return
    data = config.data
    if data.dataset is None:
        need_path(data.path, "data.path")
        need_path(data.heldout_path, "data.heldout_path")
    elif data.data_root is not None:
        need_path(data.data_root, "data.data_root")
    for name in ("include_path", "data_root"):  # the tasks' names and data take seconds: spd.inputs looks at them
        if (path := getattr(config.eval, name)) is not None:
            need_path(path, f"eval.{name}")


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=2, cutoff=0.6)
    listed = f"Known: {', '.join(known)}." if known else "There are none."
    return f"Did you mean {' or '.join(close)}? {listed}" if close else listed


def explain(error: BaseException) -> str:
    """One readable message for an error of Hydra's or OmegaConf's, naming what to write instead."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={option}: there is no such option in conf/{group}. {_nearest(option, list(error.options))}"
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        return _explain_key(str(cause.full_key), cause)
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} cannot be read; write key=value, and quote a value with spaces or commas."
    text = str(error).strip()
    several = re.match(r"Ambiguous value for argument '(.*)'", text)
    if several:
        return (
            f"{several[1]} gives several values; to sweep over them put -m first, as in "
            f"python run.py -m {several[1]}, and write a list as [a,b]."
        )
    if "is not a subclass of" in text:
        return "A point's own config.yaml has no groups to choose from; write strategy.name=zs or parallel.tp_size=2."
    if text.startswith("Config group override must be a string"):
        return f"{text}: what chooses an option of a group is its name, as in parallel=tp2 or strategy=zs."
    if "appears more than once" in text or text.startswith("Multiple values for"):
        return f"{text}. A group that is there already is chosen without '+', as in strategy=zs."
    return text


def _explain_key(full_key: str, error: OmegaConfBaseException) -> str:
    if full_key.startswith("hydra."):
        return f"{full_key}: {str(error).splitlines()[0]}"
    full_key = re.sub(r"\[\d+\]", "", full_key)  # an item of a list is explained as the list
    holder, known = _keys_beside(full_key)
    last = full_key.rpartition(".")[2]
    if last not in known:
        where = f"in {holder}" if holder else "at the top level"
        meant = [f"{name}.{last}" for name in known if last in _keys_beside(f"{name}.{last}")[1]]
        nearest = f"Did you mean {' or '.join(meant)}?" if meant and not holder else _nearest(last, known)
        return f"{full_key}: there is no such setting {where}. {nearest}"
    text = str(error).splitlines()[0]
    value = re.search(r"[Vv]alue '([^']*)'", text)
    expected = _expected(full_key)
    given = f"{full_key}={value[1]}" if value else full_key
    return f"{given}: {expected} is needed." if expected else f"{full_key}: {text}"


def _keys_beside(full_key: str) -> tuple[str, list[str]]:
    """The nearest existing section above a key, and the names of the settings in it."""
    holder: Any = RunConfig
    path = []
    for part in full_key.split(".")[:-1]:
        types = {item.name: item.type for item in dataclasses.fields(holder)}
        if not dataclasses.is_dataclass(types.get(part)):
            break
        holder = types[part]
        path.append(part)
    return ".".join(path), [item.name for item in dataclasses.fields(holder)]


def _expected(full_key: str) -> str | None:
    """What a setting takes, in words."""
    kind: Any = RunConfig
    for part in full_key.split("."):
        if not dataclasses.is_dataclass(kind):
            return None
        kind = {item.name: item.type for item in dataclasses.fields(kind)}.get(part)
    if dataclasses.is_dataclass(kind):
        return "a group of settings (choose one from conf/)"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(member.name for member in kind)
    words = {
        int: "a whole number",
        float: "a number",
        str: "a text",
        bool: "true or false",
        int | None: "a whole number or null",
        str | None: "a text or null",
        dict[str, Any]: "fields and their values, as in {a:1},",
        list[str]: "a list of texts, as in [a,b],",
        list[float]: "a list of numbers, as in [0,0.5],",
    }
    return words.get(kind)
