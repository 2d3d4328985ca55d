"""Data sets of the Hugging Face hub: from the hub (or its cache), or from a folder laid out like it.

    <data_root>/<owner>/<name>/README.md     its YAML head names the configs and their files, as on the hub
    <data_root>/<owner>/<name>/...           parquet or JSON files

Nothing here imports `datasets` before it has to: that takes a second.
"""

import functools
import textwrap
from pathlib import Path

from spd.errors import UserError
from spd.results import digest


def is_hub_name(name: str, data_root: Path | None) -> bool:
    """Whether it is the name of a data set of the hub: no file format (`json`, `parquet`), and no folder here.

    Under a data_root `owner/name` is one whether or not a folder here is called so too.
    """
    if _is_format(name) or name.startswith((".", "/", "~")):
        return False
    return name.count("/") <= 1 if data_root is not None else not Path(name).is_dir()


def _is_format(name: str) -> bool:
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as FORMATS

    return name in FORMATS


def locate(name: str, data_root: Path | None, setting: str) -> dict[str, str]:
    """What `datasets.load_dataset` is to be given for a data set: its folder, under data_root or here, or its name.

    With a folder comes a cache of its own: `datasets` (5.2) would take what it has cached of any other folder, or of
    this one before it changed, where their README.md are alike.

    Args:
        setting: the name of the setting that gave data_root, for the error.

    Raises:
        UserError: data_root has no folder for it.
    """
    if data_root is not None and is_hub_name(name, data_root):
        folder = data_root / name
    elif Path(name).is_dir() and not _is_format(name):
        folder = Path(name)
    else:
        return {"path": name}
    # .cache is what the hub's own downloader leaves there
    every = (file for file in folder.rglob("*") if ".cache" not in file.relative_to(folder).parts)
    files = sorted(file for file in every if file.is_file())
    if not files and data_root is not None:
        raise UserError(
            f"The data set {name} is not in {setting}={data_root} (there is nothing in {folder}); "
            "fill that folder as README.md says ('The official evaluations')."
        )
    from datasets import config

    state = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return {
        "path": str(folder.resolve()),
        "cache_dir": str(Path(config.HF_DATASETS_CACHE) / f"data_root-{digest(state)}"),
    }


def remedy(name: str, data_root: Path | None, setting: str | None, error: Exception) -> str:
    """What went wrong when a data set was loaded, where it was looked for, and what to do: `setting` is the one that
    gives data_root, None where there is none."""
    text = "one of its splits has no rows" if isinstance(error, StopIteration) else str(error).strip()
    details = f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
    if error.__cause__ is not None:  # `datasets` says what went wrong in the cause alone
        details += f" from {type(error.__cause__).__name__}: {str(error.__cause__).strip()}"
    details = textwrap.shorten(details, 240, placeholder=" ...")
    if data_root is not None:
        return (
            f"the data set {name} cannot be read from {data_root / name} ({details}); "
            "fill that folder as README.md says ('The official evaluations')."
        )
    instead = f"write {setting}=<a folder that holds it>" if setting else "start where a folder holds it"
    return (
        f"the data set {name} could not be had from the Hugging Face hub or its cache ({details}); allow access to the "
        f"network, or {instead}, filled as README.md says ('The official evaluations')."
    )


@functools.lru_cache(maxsize=4)  # checked, hashed and drawn from: a text of millions of words is read once
def read_text(name: str, config: str | None, split: str, data_root: Path | None, setting: str) -> str:
    """A split of a data set with a "text" column as one running text: its rows joined by empty lines.

    That is how WikiText, whose rows are paragraphs and headings, is customarily read for perplexities.

    Raises:
        UserError: the data set, config or split is missing, or it has no "text" column.
    """
    where = locate(name, data_root, setting)
    import datasets

    try:
        rows = datasets.load_dataset(**where, name=config, split=split)["text"]
        return "\n\n".join(rows)
    except Exception as error:  # `datasets` raises a dozen unrelated types: offline, missing, gated, ...
        which = f"{name} ({config}, {split})" if config else f"{name} ({split})"
        raise UserError(f"{which}: {remedy(name, data_root, setting, error)}") from error
