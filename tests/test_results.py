"""Records and caches: whole or not there, never taken for something else, never computed twice."""

import errno
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from spd.results import (
    FORMAT,
    Results,
    environment,
    file_digest,
    is_disk_full,
    line_columns,
    to_frame,
    write_json,
    write_text,
)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def results(tmp_path: Path, said: list[str]) -> Results:
    return Results(tmp_path, say=said.append)


def make_record(**changes: Any) -> dict[str, Any]:
    config = {
        "model": {"name": "tiny"},
        "parallel": {"tp_size": 4},
        "strategy": {"name": "zs"},
        "drop": 0.5,
    }
    return {"format": FORMAT, "key": "abc", "status": "done", "error": None, "config": config} | changes


def test_a_finished_point_is_found_again(results: Results) -> None:
    assert results.find("abc") is None
    results.finish(make_record())
    assert results.find("abc") == make_record()


def test_a_failed_point_is_tried_again(results: Results) -> None:
    path = results.finish(make_record(status="failed", error="why"))
    assert results.find("abc") is None
    assert json.loads(path.read_text())["error"] == "why"


def test_a_late_failure_does_not_replace_a_finished_record(results: Results) -> None:
    results.finish(make_record(status="failed", error="why"))
    results.finish(make_record())
    path = results.finish(make_record(status="failed", error="why"))
    assert json.loads(path.read_text())["status"] == "done"


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"status": "done"}', "\x00\x00"])
def test_a_damaged_record_is_computed_again_and_said(damage: str, results: Results, said: list[str]) -> None:
    results.finish(make_record()).write_text(damage)
    assert results.find("abc") is None
    assert "damaged" in said[0]
    assert "result.json" in said[0]


def test_a_record_of_another_point_is_not_taken(results: Results, said: list[str]) -> None:
    path = results.finish(make_record())
    write_json(path, make_record(key="other"))
    assert results.find("abc") is None
    assert "something else" in said[0]


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_no_half_new_one(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    write_text(path, "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((os, "fsync", full) if fails == "fsync" else (Path, "replace", full)))
    with pytest.raises(OSError, match="No space left") as error:
        write_text(path, "new")
    assert is_disk_full(error.value)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_written_files_have_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    write_text(tmp_path / "ours", "")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_numbers_that_json_cannot_hold_become_null_not_zero(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": float("nan"), "b": [float("inf"), 1.5]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": [None, 1.5]}


def test_a_cached_value_is_computed_once(results: Results) -> None:
    calls: list[int] = []

    def compute() -> dict[str, Any]:
        calls.append(1)
        return {"value": 0.1, "items": (1, 2)}

    first = results.cached("kind", {"drop": [1]}, compute)
    assert results.cached("kind", {"drop": [1]}, compute) == first == {"value": 0.1, "items": [1, 2]}
    assert len(calls) == 1
    results.cached("kind", {"drop": [2]}, compute)
    results.cached("other", {"drop": [1]}, compute)
    assert len(calls) == 3


def test_a_cached_value_says_where_it_was_computed_also_to_who_finds_it(
    results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    results.cached("kind", {}, lambda: 1)
    first = results.computed["kind"]
    assert first["versions"]["torch"]
    assert first["hardware"]["cores"] >= 1
    assert first["seconds"] >= 0
    monkeypatch.setattr("spd.results.environment", lambda: {"git_commit": "a later one"})
    later = Results(results.output_dir)
    assert later.cached("kind", {}, lambda: 2) == 1
    assert later.computed == {"kind": first}


def test_other_libraries_may_give_other_numbers(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    assert results.cached("kind", {}, lambda: 1) == 1
    monkeypatch.setattr("spd.results._version", lambda name: "next" if name == "torch" else None)
    assert results.cached("kind", {}, lambda: 2) == 2


def test_a_computation_that_fails_is_not_cached(results: Results) -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        results.cached("kind", {}, fail)
    assert results.cached("kind", {}, lambda: 1) == 1


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "other"])
def test_a_damaged_cache_is_computed_again_and_said(damage: str, results: Results, said: list[str]) -> None:
    results.cached("kind", {}, lambda: {"value": 1.25})
    (path,) = (results.output_dir / "cache" / "kind").glob("*.json")
    text = path.read_text()
    damaged = {"cut": text[:-9], "changed": text.replace("1.25", "1.26"), "empty": "", "other": "[1]"}
    path.write_text(damaged[damage])
    assert results.cached("kind", {}, lambda: {"value": 2}) == {"value": 2}
    assert "damaged" in said[0]
    assert results.cached("kind", {}, lambda: {"value": 3}) == {"value": 2}


def _compute_slowly(folder: Path) -> None:
    def compute() -> int:
        (folder / f"computed-{os.getpid()}").touch()
        time.sleep(0.5)
        return 1

    Results(folder, say=lambda _: None).cached("kind", {}, compute)


def test_processes_that_want_the_same_value_compute_it_once(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("fork")
    processes = [spawn.Process(target=_compute_slowly, args=(tmp_path,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(list(tmp_path.glob("computed-*"))) == 1


def test_a_table_has_gaps_where_nothing_was_measured(tmp_path: Path) -> None:
    accuracy = {"mean": {"value": 0.5, "stderr": 0.1}, "tasks": {"facts": {"value": 0.5, "stderr": None}}}
    latency = {"ttft_ms": {"median": 3.0, "low": 2.0, "high": 4.0}}
    plan = {"dropped": [5, 3], "source": {"num_blocks": 8}}
    done = make_record(plan=plan, perplexity={"value": 9.0}, accuracy=accuracy, latency=latency)
    failed = make_record(key=None, status="failed", error="a, comma", plan=None, accuracy=None, latency=None)
    to_frame([done, failed]).to_csv(tmp_path / "points.csv", index=False)
    frame = pd.read_csv(tmp_path / "points.csv")
    first, second = frame.to_dict("records")
    assert (first["num_dropped"], first["fraction_dropped"], first["dropped_blocks"]) == (2, 0.25, "3 5")
    assert (first["facts"], first["ttft_ms_high"]) == (0.5, 4.0)
    assert frame.loc[0, ["facts_stderr", "tpot_ms", "error"]].isna().all()
    assert frame.loc[1, ["perplexity", "accuracy_mean", "facts", "ttft_ms", "num_dropped", "key"]].isna().all()
    assert (second["model"], second["status"], second["error"]) == ("tiny", "failed", "a, comma")
    assert list(frame.columns[:6]) == ["model", "tp_size", "strategy", "drop", "num_dropped", "fraction_dropped"]
    assert list(frame.columns[-3:]) == ["status", "error", "key"]


def test_settings_that_vary_tell_the_rows_of_a_table_apart(tmp_path: Path) -> None:
    def record(**settings: Any) -> dict[str, Any]:
        made = make_record()
        made["config"] = json.loads(json.dumps(made["config"])) | {"sweep": "x", "seed": 0} | settings.pop("top", {})
        made["config"]["strategy"] |= {"order": "suffix"} | settings
        return made

    same = [record(top={"drop": drop, "sweep": f"s{drop}", "output_dir": f"o{drop}"}) for drop in (0.0, 1.0)]
    assert line_columns(to_frame(same)) == ["model", "tp_size", "strategy"]

    orders = [record(order=order, top={"seed": seed}) for order in ("suffix", "alone") for seed in (0, 1)]
    frame = to_frame(orders)
    assert line_columns(frame) == ["model", "tp_size", "strategy", "strategy.order", "seed"]
    assert frame["strategy.order"].tolist() == ["suffix", "suffix", "alone", "alone"]

    limits = [
        record(top={"eval": {"name": f"e{limit}", "limit": limit, "tasks": tasks}})
        for limit in (None, 100)
        for tasks in ([], ["a", "b"])
    ]
    frame = to_frame(limits)
    assert line_columns(frame)[3:] == ["eval.name", "eval.tasks"], "the limit says no more than the name"
    assert frame["eval.tasks"].tolist() == ["[]", "[a,b]"] * 2
    for one in limits:
        del one["config"]["eval"]["name"]
    to_frame(limits).to_csv(tmp_path / "points.csv", index=False)
    assert pd.read_csv(tmp_path / "points.csv")["eval.limit"].tolist() == ["none", "none", "100", "100"]


def test_the_environment_says_what_the_numbers_were_made_with() -> None:
    here = environment()
    assert here["versions"]["torch"]
    assert here["versions"]["lm_eval"]
    assert here["hardware"]["cores"] >= 1
    assert here["hardware"]["memory_gib"] > 0
    assert here["git_commit"] is None or len(here["git_commit"]) == 40


def test_a_folder_s_digest_sees_names_and_contents(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ("same" if name != "c" else "other")).write_text("text")
    assert file_digest(tmp_path / "a") == file_digest(tmp_path / "b") != file_digest(tmp_path / "c")
    (tmp_path / "a" / "same").write_text("next")
    assert file_digest(tmp_path / "a") != file_digest(tmp_path / "b")
