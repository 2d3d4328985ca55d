"""A Hugging Face checkpoint on disk: is it whole, what is in it, and slices of its tensors.

Only safetensors files are ever opened: pickled weights can run code, so they are refused.
"""

import functools
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from spd.errors import UserError
from spd.families import check_known

_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_TOKENIZER_FILES = ["tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"]
_FLOATS = ("F32", "F16", "BF16")
_PICKLED = ["*.bin", "*.pt", "*.pth", "*.ckpt"]


def resolve(path_or_id: str | Path) -> Path:
    """The local folder of a checkpoint; a hub id is downloaded (safetensors, config and tokenizer files only).

    Raises:
        UserError: there is no such folder or hub id, or config, tokenizer or safetensors weights are missing.
    """
    folder = Path(path_or_id).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or str(path_or_id).startswith(".") or len(folder.parts) != 2:
            raise UserError(f"There is no folder {folder}. Give a Hugging Face model folder or a hub id (owner/name).")
        folder = _download(str(path_or_id))
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json; is it a Hugging Face model folder (model.save_pretrained)?")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(
            f"{folder} has no tokenizer (none of {', '.join(_TOKENIZER_FILES)}); "
            "write one there with tokenizer.save_pretrained."
        )
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(file.name for pattern in _PICKLED for file in folder.glob(pattern))
        if pickled:
            raise UserError(
                f"{folder} holds pickled weights only ({pickled[0]}), and loading a pickle can run any code. "
                "Convert it once, where that does no harm: "
                "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(another_folder)."
            )
        raise UserError(f"{folder} has no weights (*.safetensors).")
    return folder


def _download(hub_id: str) -> Path:
    try:
        return Path(snapshot_download(hub_id, allow_patterns=_WANTED))
    except Exception as error:  # the hub client raises a dozen unrelated types: offline, missing, gated, ...
        raise UserError(
            f"{hub_id!r} is neither a folder here nor could it be had from the Hugging Face hub "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no details'})."
        ) from error


class Checkpoint:
    """The tensors of one model folder, by name, read slice by slice.

    Args:
        folder: a folder that `resolve` has accepted.

    Raises:
        UserError: config.json is not readable, or a safetensors file is missing, truncated or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._types: dict[str, str] = {}
        for file in _weight_files(folder):
            with self._open(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                    self._files[name] = file
                    stored = tensors.get_slice(name)
                    self.shapes[name] = tuple(stored.get_shape())
                    self._types[name] = stored.get_dtype()

    @property
    def config(self) -> PretrainedConfig:
        """The Hugging Face config. Never runs code from the folder."""
        return read_config(self.folder)

    def expect(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Checks that every tensor the model needs is there with its shape, as floating point numbers.

        Raises:
            UserError: naming the first tensor that is not, and how many there are.
        """
        missing = sorted(name for name in shapes if not self.has(name))
        if missing:
            raise UserError(
                f"{self.folder}: {len(missing)} tensors of the model are not in its weights, {missing[0]!r} first; "
                "config.json is of another model, or files are missing. Copy the folder anew."
            )
        wrong = sorted(name for name, shape in shapes.items() if self.shapes[self._stored(name)] != shape)
        if wrong:
            name = wrong[0]
            raise UserError(
                f"{self.folder}: {len(wrong)} tensors do not fit config.json; {name!r} is "
                f"{list(self.shapes[self._stored(name)])} in the file and {list(shapes[name])} by the config, "
                "which is of another model. Copy the folder anew."
            )
        odd = sorted(name for name in shapes if self._types[self._stored(name)] not in _FLOATS)
        if odd:
            stored = self._types[self._stored(odd[0])]
            raise UserError(
                f"{self.folder}: {len(odd)} tensors are stored as {stored}, {odd[0]!r} first; "
                "quantised weights are not supported, give the float32, float16 or bfloat16 original."
            )

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds a tensor of that name."""
        return self._stored(name) in self.shapes

    def read(self, name: str, rows: slice = slice(None), columns: slice | None = None) -> Tensor:
        """One tensor, or the given rows and columns of it, as stored; nothing else of it is kept in memory."""
        name = self._stored(name)
        # Opened anew for every tensor: closing the file drops its mapped pages, so that a process never holds
        # more of the checkpoint than its own slices and the tensor at hand.
        with self._open(self._files[name]) as tensors:
            part = tensors.get_slice(name)
            return (part[rows] if columns is None else part[rows, columns]).clone()

    def _stored(self, name: str) -> str:
        # Checkpoints saved from the bare decoder (early OPT ones) lack the leading "model.".
        return name if name in self.shapes else name.removeprefix("model.")

    @contextmanager
    def _open(self, file: Path) -> Iterator[safe_open]:
        try:
            with safe_open(file, framework="pt") as tensors:
                yield tensors
        except SafetensorError as error:
            raise UserError(f"{file} is damaged or was cut short ({error}); copy or download it again.") from error
        except FileNotFoundError as error:
            raise UserError(f"{file} is named by the weight index but missing; copy or download it again.") from error


def read_config(folder: Path) -> PretrainedConfig:
    """The Hugging Face config of a folder, without running code from it."""
    try:
        # Before transformers, whose error for a family that it does not know either says less.
        check_known(json.loads((folder / "config.json").read_text()).get("model_type"))
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be used: {error}") from error


def read_architecture(fields: dict[str, Any]) -> PretrainedConfig:
    """The Hugging Face config of an architecture given by its fields, `model_type` among them.

    Raises:
        UserError: the family is not known, or a field does not fit it.
    """
    known = dict(fields)
    model_type = known.pop("model_type", None)
    check_known(model_type)
    try:
        return AutoConfig.for_model(model_type, **known)
    except Exception as error:  # each of the config's own checks raises another type
        first = (str(error).strip() or "no details").splitlines()[0]
        raise UserError(f"model.architecture is no {model_type} config ({type(error).__name__}: {first}).") from error


def read_tokenizer(folder: Path, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, without running code from it; UserError when its files are no tokenizer.

    `options` are transformers' own (add_bos_token).
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise UserError(f"The tokenizer in {folder} cannot be used: {error}") from error


def fingerprint(folder: Path) -> str:
    """SHA-256 over config.json and every safetensors file of a folder: what a result depends on.

    Reads everything, at disk speed (about a second per GB), once in a process while the files stay as they are. Names
    count as well as contents.
    """
    total = hashlib.sha256()
    for file in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        state = file.stat()
        total.update(file.name.encode() + _sha256(file.resolve(), state.st_ino, state.st_size, state.st_mtime_ns))
    return total.hexdigest()


@functools.lru_cache(maxsize=1024)
def _sha256(file: Path, *_state: int) -> bytes:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def parse_dtype(dtype: "str | torch.dtype | None", config: PretrainedConfig) -> torch.dtype:
    """`float32`, `float16`, `bfloat16` or the torch dtype of that name; None is the checkpoint's own."""
    if dtype is None:
        dtype = config.dtype or torch.float32
    if isinstance(dtype, str):
        dtype = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}.get(dtype, dtype)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UserError(f"dtype {dtype!r} is not known; write float32, float16 or bfloat16.")
    assert isinstance(dtype, torch.dtype)
    return dtype


def _weight_files(folder: Path) -> list[Path]:
    """The files that make up the model: what the index names, else model.safetensors, else all there are."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{index} is not a weight index ({error}); copy or download it again.") from error
        return sorted({folder / Path(weight_map[name]).name for name in weight_map})
    single = folder / "model.safetensors"
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
