"""Attention as the engine has it, version by version: as written, and as compiled for a GPU."""

import pytest
import torch
from gpu_settings import on_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask
from transformers import LlamaConfig

from spd.families import family_of
from spd.gpu import attention
from spd.gpu.halves import Halves

PROMPT = (attention.prompt_by_sdpa, attention.prompt_by_flex)
TOKEN = (attention.token_by_reductions, attention.token_by_flex)


def exact(q: Tensor, k: Tensor, v: Tensor, **mask: object) -> Tensor:
    """torch's own in float64, each key and value as often as there are queries."""
    q, k, v = (part.double() for part in (q, k, v))
    k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
    return F.scaled_dot_product_attention(q, k, v, **mask)


def error(found: Tensor, want: Tensor) -> float:
    """Of the largest number."""
    return ((found.double() - want).abs().max() / want.abs().max()).item()


@settings(deadline=None)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 150),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    size=st.sampled_from([8, 24, 64]),
)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_every_version_is_attention(batch: int, tokens: int, kv_heads: int, group: int, size: int) -> None:
    q, k, v = (torch.randn(batch, heads, tokens, size) for heads in (kv_heads * group, kv_heads, kv_heads))
    for attend in PROMPT:
        assert error(attend(q, k, v, attention.causal_mask(tokens, q.device)), exact(q, k, v, is_causal=True)) < 1e-5
    q, seen = q[:, :, :1], torch.arange(tokens) <= tokens // 2
    for attend in TOKEN:
        found = attend(q, k, v, seen, attention.in_parts(tokens, q.device))
        assert error(found, exact(q, k, v, attn_mask=seen.unsqueeze(0))) < 1e-5


@settings(deadline=None)
@given(tokens=st.integers(1, 600))
def test_a_prompts_mask_is_torchs(tokens: int) -> None:
    made = attention.causal_mask(tokens, torch.device("cpu"))
    torchs = create_block_mask(lambda b, h, q, k: q >= k, None, None, tokens, tokens, device="cpu")
    assert (made.to_dense() == torchs.to_dense()).all()
    assert (made.shape, made.BLOCK_SIZE, made.seq_lengths) == (torchs.shape, torchs.BLOCK_SIZE, torchs.seq_lengths)
    for kinds in ((made.kv_num_blocks, made.kv_indices), (made.full_kv_num_blocks, made.full_kv_indices)):
        for number, which in zip(kinds[0][0, 0], kinds[1][0, 0], strict=True):
            seen = which[:number]  # one after the other in memory, as BLOCKS_ARE_CONTIGUOUS has it
            assert (seen.diff() == 1).all()
    if tokens % 128 == 0:  # else torch takes the last row's blocks for partly seen ones
        assert torch.equal(made.kv_num_blocks, torchs.kv_num_blocks)
        assert torch.equal(made.full_kv_num_blocks, torchs.full_kv_num_blocks)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(("batch", "tokens"), [(1, 20), (3, 128), (1, 200), (1, 2048)])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "rotary"),
    [
        pytest.param(16, 16, 128, True, id="llama2_7b"),
        pytest.param(32, 4, 128, True, id="llama2_70b"),
        pytest.param(14, 2, 128, True, id="qwen2.5_7b"),
        pytest.param(16, 16, 128, False, id="opt_6.7b"),
        pytest.param(8, 4, 24, True, id="small"),
    ],
)
def test_every_version_compiled_for_a_gpu_is_attention(
    batch: int, tokens: int, heads: int, kv_heads: int, size: int, rotary: bool
) -> None:
    """With what is compiled around it: queries, keys and values are parts of one product, which one of torch 2.11's
    kernels reads wrongly."""
    options = {"dtype": torch.float32 if size < 128 else torch.bfloat16, "device": "cuda"}
    config = LlamaConfig(
        hidden_size=heads * size, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=size
    )
    plain, compiled = (Halves(family_of(config), config, compiled=compiled).versions for compiled in (False, True))
    torch.manual_seed(0)

    def compare(phase: str, length: int, cache: int, *where: object) -> None:
        qkv = torch.randn(batch, length, (heads + 2 * kv_heads) * size, **options)
        angles = torch.rand(length, size, device="cuda")
        rope = (angles.cos().to(qkv.dtype), angles.sin().to(qkv.dtype)) if rotary else None
        before = torch.randn(2, batch, kv_heads, 2 * cache, size, **options)[:, :, :, :cache]  # of a longer one
        kept = before.double()
        wide = None if rope is None else tuple(part.double() for part in rope)
        want = next(iter(plain[phase]["attend"].values()))(qkv.double(), wide, *kept, *where)
        for name, attend in compiled[phase]["attend"].items():
            keys, values = before.clone(memory_format=torch.preserve_format)
            found = attend(qkv, rope, keys, values, *where)
            rounding = 1e-5 if size < 128 else 2**-7
            assert error(found, want) < rounding, name
            assert error(torch.stack([keys, values]), kept) < rounding, name

    position = torch.tensor([tokens], device="cuda")
    with torch.no_grad():
        compare("prefill", tokens, -(-tokens // 128) * 128, attention.causal_mask(tokens, position.device))
        reach = -(-(tokens + 1) // 128) * 128
        seen = torch.arange(reach, device="cuda") <= position
        compare("decode", 1, reach, position, seen, attention.in_parts(reach, position.device))


@pytest.mark.parametrize(("size", "kinds"), [(8, ["sdpa"]), (16, ["sdpa", "flex"])])
def test_heads_too_small_for_flex_attention_go_without(size: int, kinds: list[str]) -> None:
    config = LlamaConfig(hidden_size=4 * size, num_attention_heads=4, head_dim=size)
    versions = Halves(family_of(config), config, compiled=False).versions
    assert list(versions["prefill"]["attend"]) == kinds
    assert ("flex" in versions["decode"]["attend"]) == (size >= 16)
