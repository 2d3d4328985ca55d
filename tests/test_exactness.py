"""The engine against transformers itself: what must be the same function is the same to rounding.

Tolerance: 2e-5 of the largest logit, in fp32.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, make_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

import spd

TOLERANCE = 2e-5
TP_SIZES = (1, 2, 4, 8)
REFERENCE_MODELS = sorted((Path(__file__).parent.parent / "experiments/reference/models").glob("ref_*"))


def assert_same(actual: Tensor, expected: Tensor) -> None:
    scale = expected.abs().max()
    assert (actual - expected).abs().max() <= TOLERANCE * scale


@torch.inference_mode()
def dense_logits(folder: Path, input_ids: Tensor, **inputs: Any) -> Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(input_ids, **inputs).logits


@torch.inference_mode()
@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_dropping_nothing_equals_the_dense_model(
    checkpoint: Callable[..., Path], family: str, tp_size: int, input_ids: Tensor
) -> None:
    folder = checkpoint(family)
    model = spd.load(folder, tp_size=tp_size)
    assert_same(model(input_ids), dense_logits(folder, input_ids))


@torch.inference_mode()
@pytest.mark.parametrize("dropped", [[0], [1, 2], [0, 1, 2]])
def test_one_rank_with_anything_dropped_equals_the_dense_model(
    checkpoint: Callable[..., Path], family: str, dropped: list[int], input_ids: Tensor
) -> None:
    folder = checkpoint(family)
    model = spd.load(folder, tp_size=1)
    model.drop(dropped)
    assert_same(model(input_ids), dense_logits(folder, input_ids))


@torch.inference_mode()
def test_dropping_changes_the_function_and_dropping_nothing_restores_it(
    checkpoint: Callable[..., Path], family: str, input_ids: Tensor
) -> None:
    model = spd.load(checkpoint(family), tp_size=4)
    before = model(input_ids)
    model.drop([1])
    assert model.dropped == (1,)
    assert (model(input_ids) - before).abs().max() > 1e-2 * before.abs().max()
    model.drop([])
    assert torch.equal(model(input_ids), before)


@st.composite
def shapes(draw: st.DrawFn, tp_sizes: Sequence[int] = TP_SIZES) -> tuple[str, int, dict[str, Any]]:
    """A family, a tp size, and a config that this tp size cuts evenly."""
    family = draw(st.sampled_from(list(FAMILIES)))
    tp_size = draw(st.sampled_from(tp_sizes))
    heads = tp_size * draw(st.integers(1, 3))
    head_size = 2 * draw(st.integers(1, 4))
    width = tp_size * draw(st.integers(1, 5))
    changes: dict[str, Any] = {
        "hidden_size": heads * head_size,
        "num_attention_heads": heads,
        "num_hidden_layers": draw(st.integers(1, 4)),
        "tie_word_embeddings": draw(st.booleans()),
    }
    if family == "opt":
        # word_embed_proj_dim < hidden_size adds project_in and project_out, as in OPT-350m.
        changes |= {"ffn_dim": width, "word_embed_proj_dim": draw(st.sampled_from([heads * head_size, 6]))}
        changes |= {"enable_bias": draw(st.booleans())}
    else:
        kv_heads = [k for k in range(1, heads + 1) if heads % k == 0 and (k % tp_size == 0 or tp_size % k == 0)]
        changes |= {"intermediate_size": width, "num_key_value_heads": draw(st.sampled_from(kv_heads))}
    if family == "llama":
        changes |= {"attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans())}
        changes |= {"head_dim": 2 * draw(st.integers(1, 4))}  # may differ from D/H
    return family, tp_size, changes


@torch.inference_mode()
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(shape=shapes(), batch=st.integers(1, 3), tokens=st.integers(1, 12), seed=st.integers(0, 99))
def test_any_shape_is_exact(shape: tuple[str, int, dict[str, Any]], batch: int, tokens: int, seed: int) -> None:
    family, tp_size, changes = shape
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder), family, seed=seed, **changes)
        input_ids = torch.randint(4, 64, (batch, tokens), generator=torch.Generator().manual_seed(seed))
        expected = dense_logits(Path(folder), input_ids)
        cut, whole = spd.load(folder, tp_size=tp_size), spd.load(folder, tp_size=1)
        assert_same(cut(input_ids), expected)
        whole.drop(range(whole.num_blocks))
        assert_same(whole(input_ids), expected)
        # With blocks dropped: the last token through the cache, and a left-padded first row.
        cut.drop(range(seed % 2, cut.num_blocks, 2))
        logits = cut(input_ids)
        if tokens > 1:
            past = cut.hf(input_ids[:, :-1], use_cache=True).past_key_values
            assert_same(cut.hf(input_ids[:, -1:], past_key_values=past).logits[:, -1], logits[:, -1])
        mask = torch.ones(batch, tokens + 2, dtype=torch.long)
        mask[:, :2] = 0
        padded = torch.cat([torch.zeros(batch, 2, dtype=torch.long), input_ids], dim=1)
        assert_same(cut(padded, attention_mask=mask)[:, 2:], logits)


@torch.inference_mode()
@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_the_spd_block_is_the_equation_of_the_paper(checkpoint: Callable[..., Path], family: str, tp_size: int) -> None:
    # P_i and MLP_i from transformers' own whole layer, with all but rank i's columns of the output layers set to zero.
    folder = checkpoint(family)
    model, dense = spd.load(folder, tp_size=tp_size), AutoModelForCausalLM.from_pretrained(folder)
    row = model.family
    layer = dense.get_submodule(row.decoder).layers[1]
    outputs = [layer.get_submodule(row.attention_output), layer.get_submodule(row.mlp_output)]
    biases = [torch.zeros(32) if layer.bias is None else layer.bias.clone() for layer in outputs]
    weights = [layer.weight.clone() for layer in outputs]
    x, inputs = model.embed(torch.randint(4, 64, (2, 7), generator=torch.Generator().manual_seed(1)))

    def only_rank(i: int) -> None:
        for output, weight in zip(outputs, weights, strict=True):
            if output.bias is not None:
                output.bias.zero_()
            share = weight.shape[1] // tp_size
            output.weight.zero_()
            output.weight[:, i * share : (i + 1) * share] = weight[:, i * share : (i + 1) * share]

    total = torch.zeros_like(x)
    for i in range(tp_size):
        only_rank(i)
        p_i = layer.self_attn(hidden_states=layer.get_submodule(row.attention_norm)(x), **inputs)[0]
        u_i = x + p_i + biases[0]
        total += p_i + row.mlp(layer, layer.get_submodule(row.mlp_norm)(u_i))
    block = model.blocks[1]
    assert_same(block.spd(x, block.attention(x, **inputs)), x + biases[0] + total + biases[1])


@torch.inference_mode()
@pytest.mark.parametrize("dropped", [[], [0, 2]])
@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_cached_generation_equals_uncached(
    checkpoint: Callable[..., Path], family: str, tp_size: int, dropped: list[int], input_ids: Tensor
) -> None:
    model = spd.load(checkpoint(family), tp_size=tp_size)
    model.drop(dropped)
    cached = model.generate(input_ids, max_new_tokens=12)
    assert torch.equal(cached, model.generate(input_ids, max_new_tokens=12, use_cache=False))
    step = model.hf(input_ids, use_cache=True)
    following = cached[:, input_ids.shape[1], None]
    decoded = model.hf(following, past_key_values=step.past_key_values, use_cache=True).logits[:, -1]
    assert_same(decoded, model(torch.cat([input_ids, following], dim=1))[:, -1])


@torch.inference_mode()
def test_generation_equals_transformers_own(checkpoint: Callable[..., Path], family: str, input_ids: Tensor) -> None:
    folder = checkpoint(family)
    dense = AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = dense.generate(input_ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(spd.load(folder, tp_size=4).generate(input_ids, max_new_tokens=12), expected)


@torch.inference_mode()
@pytest.mark.parametrize("dropped", [[], [0, 1]])
@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_a_padded_batch_equals_single_prompts(
    checkpoint: Callable[..., Path], family: str, tp_size: int, dropped: list[int], input_ids: Tensor
) -> None:
    model = spd.load(checkpoint(family), tp_size=tp_size)
    model.drop(dropped)
    short, long = input_ids[:1, :4], input_ids[1:]
    padding = torch.zeros(1, long.shape[1] - 4, dtype=torch.long)
    batch = torch.cat([torch.cat([padding, short], dim=1), long])
    mask = torch.cat([torch.cat([padding, torch.ones_like(short)], dim=1), torch.ones_like(long)])
    left = model(batch, attention_mask=mask)
    assert_same(left[0, -4:], model(short)[0])
    assert_same(left[1], model(long)[0])
    right = model(
        torch.cat([short, padding], dim=1), attention_mask=torch.cat([torch.ones_like(short), padding], dim=1)
    )
    assert_same(right[0, :4], model(short)[0])
    generated = model.generate(batch, attention_mask=mask, max_new_tokens=6, min_new_tokens=6)
    assert torch.equal(generated[0, -6:], model.generate(short, max_new_tokens=6, min_new_tokens=6)[0, -6:])
    assert torch.equal(generated[1, -6:], model.generate(long, max_new_tokens=6, min_new_tokens=6)[0, -6:])


@torch.inference_mode()
def test_going_through_the_blocks_by_hand_equals_the_forward(
    checkpoint: Callable[..., Path], family: str, input_ids: Tensor
) -> None:
    model = spd.load(checkpoint(family), tp_size=2)
    x, inputs = model.embed(input_ids)
    for block in model.blocks:
        x = block(x, **inputs)
    assert_same(model.head(x), model(input_ids))


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_load_as_they_are_or_as_asked(
    tmp_path: Path, family: str, dtype: torch.dtype, input_ids: Tensor
) -> None:
    folder = make_checkpoint(tmp_path / "half", family, dtype=dtype)
    assert spd.load(folder, tp_size=2).dtype == dtype
    assert_same(spd.load(folder, tp_size=2, dtype="float32")(input_ids), dense_logits(folder, input_ids))


@torch.inference_mode()
def test_a_checkpoint_in_several_files_is_the_same_model(tmp_path: Path, tiny_llama: Path, input_ids: Tensor) -> None:
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama)
    dense.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    spd.load(tiny_llama).tokenizer.save_pretrained(tmp_path / "parts")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    assert torch.equal(spd.load(tmp_path / "parts", tp_size=4)(input_ids), spd.load(tiny_llama, tp_size=4)(input_ids))


@torch.inference_mode()
@pytest.mark.parametrize("tp_size", TP_SIZES)
@pytest.mark.parametrize("folder", REFERENCE_MODELS, ids=lambda folder: folder.name)
def test_the_reference_models_equal_transformers_own(folder: Path, tp_size: int) -> None:
    model = spd.load(folder, tp_size=tp_size, dtype="float32")
    input_ids = torch.randint(4, model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    assert_same(model(input_ids), dense_logits(folder, input_ids))
    if tp_size == 1:
        model.drop(range(model.num_blocks))
        assert_same(model(input_ids), dense_logits(folder, input_ids))


@torch.inference_mode()
@pytest.mark.parametrize("tp_size", TP_SIZES)
@pytest.mark.parametrize("folder", REFERENCE_MODELS, ids=lambda folder: folder.name)
def test_the_reference_models_with_dropped_blocks_are_the_same_cached_and_padded(folder: Path, tp_size: int) -> None:
    model = spd.load(folder, tp_size=tp_size, dtype="float32")
    model.drop(range(0, model.num_blocks, 2))
    input_ids = torch.randint(4, model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    logits = model(input_ids)
    past = model.hf(input_ids[:, :30], use_cache=True).past_key_values
    assert_same(model.hf(input_ids[:, 30:], past_key_values=past).logits, logits[:, 30:])
    padded, mask = input_ids.clone(), torch.ones_like(input_ids)
    padded[0], mask[0, :10] = input_ids[0].roll(10), 0  # the first prompt has thirty tokens, behind ten of padding
    assert_same(model(padded, attention_mask=mask)[0, 10:], logits[0, :30])
    assert_same(model(padded, attention_mask=mask)[1], logits[1])
