"""Reads what an offline W&B run wrote: the log of records that `wandb sync` would send."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

# The file is a LevelDB log: blocks of 32 KiB; in them chunks of header (checksum, length, type) and data; a record is
# one FULL chunk, or a FIRST, any MIDDLE and a LAST. W&B puts seven bytes of its own in front.
BLOCK, HEADER = 32768, 7
FULL, LAST = 1, 4


def read_records(path: Path) -> Iterator[Record]:
    data = path.read_bytes()
    assert data.startswith(b":W&B")
    at, collected = HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # too little of the block left for a header: padding
            at += BLOCK - at % BLOCK
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        collected += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if at > len(data):  # still being written
            return
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(collected)
            yield record
            collected = b""


class OfflineRun:
    """One run, put together from its records."""

    def __init__(self, folder: Path) -> None:
        (path,) = folder.glob("run-*.wandb")
        self.files = folder / "files"
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.exit_code: int | None = None
        for record in read_records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.run = record.run
                self._update(self.config, record.run.config.update)
            elif kind == "config":
                self._update(self.config, record.config.update)
            elif kind == "summary":
                self._update(self.summary, record.summary.update)
            elif kind == "history":
                row: dict[str, Any] = {}
                self._update(row, record.history.item)
                self.history.append(row)
                self.summary.update({name: value for name, value in row.items() if not name.startswith("_")})
            elif kind == "exit":
                self.exit_code = record.exit.exit_code

    @staticmethod
    def _update(target: dict[str, Any], items: Any) -> None:
        for item in items:
            *path, last = item.nested_key or [item.key]
            inner = target
            for name in path:
                inner = inner.setdefault(name, {})
            inner[last] = json.loads(item.value_json)

    def table(self, key: str) -> dict[str, Any]:
        """Columns and data of a table that was logged under `key`."""
        logged = self.summary[key]
        assert logged["_type"] == "table-file"
        table: dict[str, Any] = json.loads((self.files / logged["path"]).read_text())
        return table


def read_runs(output_dir: Path) -> list[OfflineRun]:
    """The finished offline runs under an output folder, in the order they were started."""
    return sorted((_finished(folder) for folder in (output_dir / "wandb").glob("offline-run-*")), key=_start)


def _finished(folder: Path) -> OfflineRun:
    # W&B's service writes the last records a moment after `finish` has returned.
    deadline = time.monotonic() + 20
    while (run := OfflineRun(folder)).exit_code is None:
        assert time.monotonic() < deadline, f"{folder} never ended"
        time.sleep(0.05)
    return run


def _start(run: OfflineRun) -> int:
    return run.run.start_time.ToNanoseconds()
