"""What users do with a model beside running it: drop, save, load again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import spd
from spd.sharding import BlockReader, Cut, InMemory


@pytest.fixture
def samples() -> Tensor:
    """Random calibration samples [4, 12]."""
    return torch.randint(4, 64, (4, 12), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("block", [-1, 3])
def test_a_block_that_does_not_exist_is_refused_and_nothing_changes(tiny_llama: Path, block: int) -> None:
    model = spd.load(tiny_llama, tp_size=2)
    model.drop([1])
    with pytest.raises(spd.UserError, match=f"no block {block}; this model's blocks are 0 to 2"):
        model.drop([0, block])
    assert model.dropped == (1,)


def layer_of(model: spd.TensorParallelLM, tp_size: int, ranks: list[int]) -> Any:
    """Block 0's layer as a process of these ranks holds it."""
    family, config, original = model.family, model.hf.config, model.blocks[0].layer
    reader = BlockReader(family, config, type(original), Cut.of_ranks(family, config, tp_size, ranks))
    return reader.read(0, InMemory(model.layer_tensors(model.blocks[0])), torch.float32, torch.device("cpu"))[0]


@pytest.mark.parametrize("blocks", [0.5, 1, "1", ["1"], [0.5]])
def test_what_is_no_list_of_blocks_is_told_how_to_write_one(tiny_llama: Path, blocks: Any) -> None:
    model = spd.load(tiny_llama, tp_size=2)
    model.drop(np.array([1]))
    with pytest.raises(spd.UserError, match=r"as in drop\(\[0, 3\]\), not .*; a fraction is for spd.make_plan"):
        model.drop(blocks)
    assert model.dropped == (1,)


def test_every_rank_holds_only_its_share(tiny_qwen2: Path) -> None:
    model = spd.load(tiny_qwen2, tp_size=1)
    full, share = model.blocks[0].layer, layer_of(model, 8, [5])
    assert torch.equal(share.self_attn.q_proj.weight, full.self_attn.q_proj.weight.chunk(8)[5])
    assert torch.equal(share.mlp.up_proj.weight, full.mlp.up_proj.weight.chunk(8)[5])
    assert torch.equal(share.mlp.down_proj.weight, full.mlp.down_proj.weight.chunk(8, dim=1)[5])
    assert torch.equal(share.input_layernorm.weight, full.input_layernorm.weight)
    two = layer_of(model, 8, [4, 5])
    assert torch.equal(two.mlp.down_proj.weight, full.mlp.down_proj.weight.chunk(4, dim=1)[2])


def test_neighbouring_ranks_repeat_key_value_heads(tiny_qwen2: Path) -> None:
    model = spd.load(tiny_qwen2, tp_size=1)  # 2 key/value heads, on 8 ranks
    keys = [layer_of(model, 8, [rank]).self_attn.k_proj.weight for rank in range(8)]
    heads = model.blocks[0].layer.self_attn.k_proj.weight.chunk(2)
    assert all(torch.equal(key, heads[rank // 4]) for rank, key in enumerate(keys))


@pytest.mark.parametrize("tp_size", [1, 4, 8])
def test_a_saved_model_is_an_ordinary_checkpoint_with_the_same_tensors(
    checkpoint: Callable[..., Path], family: str, tp_size: int, tmp_path: Path, input_ids: Tensor
) -> None:
    folder = checkpoint(family)
    spd.load(folder, tp_size=tp_size).save_pretrained(tmp_path / "out")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.inference_mode():
        logits = [AutoModelForCausalLM.from_pretrained(f)(input_ids).logits for f in (folder, tmp_path / "out")]
    assert torch.equal(*logits)


def test_a_prepared_model_comes_back_as_it_was(tiny_opt: Path, samples: Tensor, tmp_path: Path) -> None:
    model = spd.load(tiny_opt, tp_size=4)
    plan = spd.make_plan(spd.measure_sensitivity(model, samples), drop=0.6)
    spd.apply(model, plan).save_pretrained(tmp_path / "out")
    again = spd.load(tmp_path / "out")
    assert (again.tp_size, again.dropped, again.plan) == (4, model.dropped, plan)
    assert len(again.dropped) == 2
    assert torch.equal(again(samples), model(samples))


def test_a_prepared_model_is_refused_at_another_tp_size(tiny_opt: Path, samples: Tensor, tmp_path: Path) -> None:
    model = spd.load(tiny_opt, tp_size=4)
    spd.apply(model, spd.make_plan(spd.measure_sensitivity(model, samples), drop=1)).save_pretrained(tmp_path / "out")
    with pytest.raises(spd.UserError, match="prepared for tp_size=4, not 2"):
        spd.load(tmp_path / "out", tp_size=2)


def test_blocks_dropped_by_hand_come_back_dropped(tiny_opt: Path, samples: Tensor, tmp_path: Path) -> None:
    model = spd.load(tiny_opt, tp_size=4)
    spd.apply(model, spd.make_plan(spd.measure_sensitivity(model, samples), drop=0.3))
    other = next(block for block in range(3) if block not in model.dropped)
    model.drop([other])
    assert model.plan is None
    model.save_pretrained(tmp_path / "out")
    again = spd.load(tmp_path / "out")
    assert (again.tp_size, again.dropped) == (4, (other,))
    assert torch.equal(again(samples), model(samples))


def test_a_model_saved_with_nothing_dropped_loads_at_any_tp_size(tiny_opt: Path, tmp_path: Path) -> None:
    spd.load(tiny_opt, tp_size=4).save_pretrained(tmp_path / "out")
    assert spd.load(tmp_path / "out").tp_size == 4
    assert spd.load(tmp_path / "out", tp_size=8).tp_size == 8


def test_saving_never_overwrites_and_leaves_nothing_half_written(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = spd.load(tiny_llama)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    for taken in ("mine", "mine/notes.txt"):
        with pytest.raises(spd.UserError, match="a file or not empty"):
            model.save_pretrained(tmp_path / taken)

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model.tokenizer, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_only_hugging_face_options_reach_generate(tiny_llama: Path, input_ids: Tensor) -> None:
    model = spd.load(tiny_llama, tp_size=2)
    torch.manual_seed(0)
    sampled = model.generate(input_ids, max_new_tokens=8, do_sample=True, temperature=5.0)
    assert sampled.shape == (2, 19)
    assert not torch.equal(sampled, model.generate(input_ids, max_new_tokens=8))
