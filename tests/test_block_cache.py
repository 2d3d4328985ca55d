"""Treated blocks on the disk: kept for later, found again, damaged, interrupted."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_checkpoint
from treated import (
    QUICK,
    RANK,
    empty,
    plan_in,
    plan_of,
    prepare,
    same,
    tokens,
    truncate,
    weights,
)

import spd
from spd.config import CorrectionKind
from spd.model import TensorParallelLM
from spd.strategies import b2b
from spd.strategies.block_cache import BlockCache


def flip_a_bit(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def scribble(data: bytes) -> bytes:
    return b"x" * len(data)


@pytest.fixture
def model(tiny_llama: Path) -> TensorParallelLM:
    return spd.load(tiny_llama, tp_size=2)


@pytest.fixture
def cache(tmp_path: Path) -> BlockCache:
    return BlockCache(tmp_path / "blocks")


@pytest.fixture
def no_distilling(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, a block that is distilled fails the test."""

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a block was distilled again")

    return lambda: monkeypatch.setattr(b2b, "distill", forbidden)


@pytest.mark.parametrize("strategy", ["zs_b2b_hg", "zs_correction_b2b"])
def test_treated_blocks_are_kept_for_later_and_for_larger_fractions(
    tiny_opt: Path, strategy: str, cache: BlockCache, no_distilling: Callable[[], None]
) -> None:
    ids = tokens(2, 11)
    first = prepare(spd.load(tiny_opt, tp_size=2), strategy, 0.67, cache=cache)
    assert len(list(cache.folder.glob("*.safetensors"))) == 1
    all_ = prepare(spd.load(tiny_opt, tp_size=2), strategy, cache=cache)
    kept = sorted(cache.folder.glob("*.safetensors"))
    assert len(kept) == 2
    assert same(weights(first, 1), weights(all_, 1))
    no_distilling()
    for drop, wanted in ((0.67, first), (1.0, all_)):
        again = prepare(spd.load(tiny_opt, tp_size=2), strategy, drop, cache=cache)
        assert torch.equal(again(ids), wanted(ids))
        assert plan_in(again).recovery == plan_in(wanted).recovery
        assert {i: o["loss"] for i, o in plan_in(again).outcomes.items()} == {
            i: o["loss"] for i, o in plan_in(wanted).outcomes.items()
        }
    assert sorted(cache.folder.glob("*.safetensors")) == kept


def test_only_blocks_that_are_missing_are_treated(model: TensorParallelLM, tiny_llama: Path, cache: BlockCache) -> None:
    whole, ids = prepare(model, "zs_b2b", cache=cache), tokens(2, 11)
    seen: list[tuple[int, int]] = []
    for file in sorted(cache.folder.glob("*.safetensors")):
        file.unlink()
        seen.clear()
        again = prepare(
            spd.load(tiny_llama, tp_size=2), "zs_b2b", cache=cache, on_progress=lambda *step: seen.append(step)
        )
        # A block from the cache is two steps at once.
        assert list(dict.fromkeys(seen)) in ([(1, 4), (2, 4), (4, 4)], [(2, 4), (3, 4), (4, 4)])
        assert torch.equal(again(ids), whole(ids))


def test_a_damaged_file_is_said_and_made_again(
    tiny_llama: Path, cache: BlockCache, no_distilling: Callable[[], None]
) -> None:
    whole, ids = prepare(spd.load(tiny_llama, tp_size=2), "zs_b2b", 0.67, cache=cache), tokens(2, 11)
    (file,) = cache.folder.glob("*.safetensors")
    for harm in (truncate, flip_a_bit, empty, scribble):
        file.write_bytes(harm(file.read_bytes()))
        said: list[str] = []
        again = prepare(spd.load(tiny_llama, tp_size=2), "zs_b2b", 0.67, cache=cache, say=said.append)
        assert [line for line in said if "damaged" in line and str(file) in line] == said[:1] != []
        assert torch.equal(again(ids), whole(ids))
    no_distilling()
    prepare(spd.load(tiny_llama, tp_size=2), "zs_b2b", 0.67, cache=cache)


def test_a_file_under_another_blocks_name_is_not_taken_for_it(tiny_llama: Path, cache: BlockCache) -> None:
    whole, ids, said = prepare(spd.load(tiny_llama, tp_size=2), "zs_b2b", cache=cache), tokens(2, 11), list[str]()
    one, other = cache.folder.glob("*.safetensors")
    one.write_bytes(other.read_bytes())
    again = prepare(spd.load(tiny_llama, tp_size=2), "zs_b2b", cache=cache, say=said.append)
    assert any("it holds another block" in line for line in said)
    assert torch.equal(again(ids), whole(ids))


def test_other_settings_are_other_blocks(tiny_llama: Path, tmp_path: Path, cache: BlockCache) -> None:
    def files(model: TensorParallelLM, strategy: str = "zs_correction_b2b", **options: Any) -> int:
        """How many were added."""
        before = len(list(cache.folder.glob("*.safetensors"))) if cache.folder.exists() else 0
        prepare(model, strategy, 0.67, cache=cache, **options)
        return len(list(cache.folder.glob("*.safetensors"))) - before

    def load(tp_size: int = 2, **options: Any) -> TensorParallelLM:
        return spd.load(tiny_llama, tp_size=tp_size, **options)

    assert files(load()) == 1
    assert files(load()) == 0
    assert files(load(), say=print, on_progress=lambda *_: None) == 0
    changes: list[dict[str, Any]] = [
        dict(seed=1),
        dict(distillation=dataclasses.replace(QUICK, learning_rate=1e-3)),
        dict(distillation=dataclasses.replace(QUICK, epochs=1)),
        dict(distillation=dataclasses.replace(QUICK, batch_size=5)),
        dict(corrections=dataclasses.replace(RANK, rank=4)),
        dict(corrections=dataclasses.replace(RANK, ridge=1e-3)),
        dict(corrections=dataclasses.replace(RANK, kind=CorrectionKind.linear)),
        dict(strategy="zs_b2b"),
    ]
    for change in changes:
        assert files(load(), **change) == 1
    assert files(load(), "zs_b2b", corrections=dataclasses.replace(RANK, rank=2)) == 0  # takes no part in it
    whole = [prepare(load(), strategy, cache=cache) for strategy in ("zs_b2b", "zs_b2b_hg")]
    assert [plan_in(model).treatment[2] for model in whole] == ["b2b", "hg+b2b"]
    assert not same(weights(whole[0], 2), weights(whole[1], 2))
    assert files(load(tp_size=4)) == 1
    assert files(load(dtype="bfloat16")) == 1
    assert files(spd.load(make_checkpoint(tmp_path / "other", "llama", seed=1), tp_size=2)) == 1
    model = load()
    spd.apply(model, plan_of(model, "zs_b2b", 0.67), tokens(32, 12, seed=6), distillation=QUICK, cache=cache)
    assert len(list(cache.folder.glob("*.safetensors"))) == 1 + len(changes) + 6


def test_an_interruption_costs_the_block_it_falls_in(
    tiny_llama: Path, model: TensorParallelLM, cache: BlockCache
) -> None:
    def stop(done: int, steps: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(model, "zs_b2b", cache=cache, on_progress=stop)
    (file,) = cache.folder.glob("*.safetensors")
    seen: list[tuple[int, int]] = []
    again = prepare(spd.load(tiny_llama, tp_size=2), "zs_b2b", cache=cache, on_progress=lambda *step: seen.append(step))
    assert list(dict.fromkeys(seen)) == [(2, 4), (3, 4), (4, 4)]
    assert file in cache.folder.glob("*.safetensors")
    whole, ids = prepare(spd.load(tiny_llama, tp_size=2), "zs_b2b"), tokens(2, 11)
    assert torch.equal(again(ids), whole(ids))


def test_a_block_of_another_version_is_said_and_made_again(
    model: TensorParallelLM, tiny_llama: Path, cache: BlockCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, said, ids = prepare(model, "zs_b2b", cache=cache), [], tokens(2, 11)
    files = sorted(cache.folder.glob("*.safetensors"))
    with monkeypatch.context() as patch:
        patch.setattr("spd.strategies.block_cache.made_by", lambda: {"format": 0})
        again = prepare(spd.load(tiny_llama, tp_size=2), "zs_b2b", cache=cache, say=said.append)
    assert len(said) == 2
    assert "was made by another version" in said[0]
    assert sorted(cache.folder.glob("*.safetensors")) == files
    assert torch.equal(again(ids), whole(ids))


def test_a_full_disk_leaves_no_half_written_block(
    model: TensorParallelLM, cache: BlockCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("spd.strategies.block_cache.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        prepare(model, "zs_b2b", cache=cache)
    assert not [file for file in cache.folder.iterdir() if file.suffix != ".lock"]
