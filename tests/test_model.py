"""What users do with a model beside running it: drop, save, load again."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import spd


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


def test_every_rank_holds_only_its_share(tiny_qwen2: Path) -> None:
    whole, cut = spd.load(tiny_qwen2, tp_size=1), spd.load(tiny_qwen2, tp_size=8)
    full, shard = whole.blocks[0].shards[0], cut.blocks[0].shards[5]
    assert shard.self_attn.q_proj.weight.shape[0] == full.self_attn.q_proj.weight.shape[0] // 8
    assert shard.mlp.down_proj.weight.shape[1] == full.mlp.down_proj.weight.shape[1] // 8


def test_repeated_key_value_heads_and_norms_are_one_parameter(tiny_qwen2: Path) -> None:
    shards = spd.load(tiny_qwen2, tp_size=8).blocks[0].shards  # 2 key/value heads on 8 ranks
    assert shards[0].self_attn.k_proj.weight is shards[3].self_attn.k_proj.weight
    assert shards[3].self_attn.k_proj.weight is not shards[4].self_attn.k_proj.weight
    assert shards[0].input_layernorm.weight is shards[7].input_layernorm.weight


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
