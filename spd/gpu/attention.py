"""Attention of a whole prompt and of one token, each in two versions.

Of a prompt: queries [B, H/N, T, h], keys and values [B, K/N, T, h]. Of a token: queries [B, H/N, 1, h], keys and values
[B, K/N, C, h], of which `mask` [C] says which to look at. What the heads find has the shape of the queries.

Legend: B batch, T tokens, C cached positions, H query heads, K key/value heads, G = H / K, h head size, N ranks.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

SMALLEST_FLEX_HEAD = 16
"""Flex attention's kernels are products of the matrix units, which take no less."""
_AT_ONCE = 264
"""Parts that are read at once, of all sequences and heads: two for each multiprocessor of an H100."""


def prompt_by_sdpa(q: Tensor, k: Tensor, v: Tensor, causal: BlockMask) -> Tensor:
    """By the kernel that torch takes for the fastest: cuDNN's, on an H100."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def prompt_by_flex(q: Tensor, k: Tensor, v: Tensor, causal: BlockMask) -> Tensor:
    """By a Triton kernel: of a short prompt, the launch of cuDNN's takes as long as the kernel.

    `causal` is the mask as flex attention has it (`causal_mask`). For GPUs: compiled for a CPU by torch 2.13 it reads
    `v`, which is a view, from the wrong place.
    """
    options: Any = {
        "BACKEND": "TRITON",  # the one that torch 2.11 takes of itself for less than 128 tokens is wrong for such views
        "ROWS_GUARANTEED_SAFE": True,  # a token looks at itself at least
        "BLOCKS_ARE_CONTIGUOUS": True,
    }
    heads: Any = flex_attention(q, k, v, block_mask=causal, enable_gqa=q.shape[1] != k.shape[1], kernel_options=options)
    return heads


def token_by_reductions(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, _: BlockMask) -> Tensor:
    """By two sums, which the compiler fuses with the softmax between them."""
    of_group = q.unflatten(1, (keys.shape[1], -1))  # [B, K/N, G, 1, h]
    scores = (of_group.float() * keys.unsqueeze(2)).sum(-1) * q.shape[-1] ** -0.5  # [B, K/N, G, C]
    shares = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    heads = (shares.unsqueeze(-1) * values.unsqueeze(2)).sum(-2).to(q.dtype)  # [B, K/N, G, h]
    return heads.flatten(1, 2).unsqueeze(2)


def token_by_flex(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, parts: BlockMask) -> Tensor:
    """By torch's kernel for decoding: `parts` of the cache (`in_parts`) are read at once, then put together."""

    def known(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return torch.where(mask[key], score, -torch.inf)

    at_once = min(parts.kv_indices.shape[-1], max(1, _AT_ONCE // (keys.shape[0] * keys.shape[1])))
    options: Any = {"SPLIT_KV": at_once}
    heads: Any = flex_attention(
        q, keys, values, score_mod=known, block_mask=parts, enable_gqa=q.shape[1] != keys.shape[1],
        kernel_options=options,
    )  # fmt: skip
    return heads


def causal_mask(tokens: int, device: torch.device) -> BlockMask:
    """Of a prompt, in blocks of 128: all of those before a row's own are seen, and of that one the tokens up to each.

    What torch's `create_block_mask` makes, which first holds a number for each pair of tokens: 17 GB of 131072.
    """
    rows = -(-tokens // 128)
    row = torch.arange(rows, dtype=torch.int32, device=device)
    own, before = row[:, None].expand(1, 1, rows, rows), row.expand(1, 1, rows, rows)
    return BlockMask.from_kv_blocks(
        torch.ones_like(row).view(1, 1, -1), own.contiguous(), row.view(1, 1, -1), before.contiguous(),
        mask_mod=_up_to, seq_lengths=(tokens, tokens), compute_q_blocks=False,
    )  # fmt: skip


def _up_to(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def in_parts(reach: int, device: torch.device) -> BlockMask:
    """The first `reach` positions of a cache in parts of 64: without, flex attention sees one part, and reads by one
    multiprocessor a head (pytorch/pytorch#167935)."""
    parts = -(-reach // 64)
    number = torch.full((1, 1, 1), parts, dtype=torch.int32, device=device)
    which = torch.arange(parts, dtype=torch.int32, device=device).view(1, 1, 1, -1)
    return BlockMask.from_kv_blocks(number, which, BLOCK_SIZE=(128, 64), seq_lengths=(1, reach), compute_q_blocks=False)
