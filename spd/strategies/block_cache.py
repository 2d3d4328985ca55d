"""Treated blocks in files: what was made of one block serves every drop fraction and every sweep."""

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, uint8

from spd.results import digest, held, made_by


@dataclass(frozen=True)
class Recovered:
    """What was made of one block."""

    tensors: dict[str, Tensor]
    """The layer's whole tensors, by their names in it."""
    corrections: dict[str, Tensor]
    """The tensors of its correction, of all ranks; empty without one."""
    outcome: dict[str, Any]
    """What came of it: "kept", the steps whose result the block runs with, "zs" for none; "loss", the mean squared
    error at its output, held out, after each step ("zs" before the first); "seconds", what each took; "notes",
    sentences on what was not kept and why; and what each step has to say of itself."""


class BlockCache:
    """Treated blocks in files, each under a hash of what determined it.

    Args:
        folder: made when first written to.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def _path(self, parts: dict[str, Any]) -> Path:
        return self.folder / f"{digest(parts)}.safetensors"

    def lock(self, parts: dict[str, Any], say: Callable[[str], None] = print) -> AbstractContextManager[None]:
        """To be held from `find` to `keep`, so that of several jobs that need a block one makes it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return held(self._path(parts).with_suffix(".lock"), say, "treats the same block")

    def find(self, parts: dict[str, Any], say: Callable[[str], None] = print) -> Recovered | None:
        """The block that was kept for these parts; None if there is none, or, which is said, a damaged one or one
        that another version of this code or its libraries made."""
        path = self._path(parts)
        try:
            with safe_open(path, framework="pt") as stored:
                about = json.loads((stored.metadata() or {})["spd"])
                read = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
            if about["checksum"] != _checksum(read):
                raise ValueError("its checksum does not match")
            if about["parts"] != json.loads(json.dumps(parts)):
                raise ValueError("it holds another block")
            if about["made_by"] != made_by():
                say(f"{path} was made by another version of spd, torch or transformers; the block is treated again.")
                return None
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            say(f"Warning: {path} is damaged ({error}); the block is treated again.")
            return None
        split: dict[str, dict[str, Tensor]] = {"layer": {}, "correction": {}}
        for name, tensor in read.items():
            kind, _, rest = name.partition(".")
            split[kind][rest] = tensor
        return Recovered(split["layer"], split["correction"], about["outcome"])

    def keep(self, parts: dict[str, Any], recovered: Recovered) -> None:
        """Writes a block, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(parts)
        tensors = {f"layer.{name}": tensor for name, tensor in recovered.tensors.items()}
        tensors |= {f"correction.{name}": tensor.contiguous() for name, tensor in recovered.corrections.items()}
        about = {"parts": parts, "made_by": made_by(), "outcome": recovered.outcome, "checksum": _checksum(tensors)}
        partial = path.with_suffix(f".{uuid4().hex}.part")
        try:
            save_file(tensors, partial, metadata={"spd": json.dumps(about)})
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def _checksum(tensors: dict[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode() + tensors[name].contiguous().view(uint8).numpy().tobytes())
    return total.hexdigest()
