"""The next token of a vocabulary that is cut over ranks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spd.gpu import head


@settings(deadline=None)
@given(
    batch=st.integers(1, 5),
    ranks=st.integers(1, 8),
    vocab_size=st.integers(8, 400) | st.sampled_from([32000, 50272, 152064, 2**24]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    seed=st.integers(0, 9),
)
def test_ranks_find_the_likeliest_token_of_the_whole_vocabulary(
    batch: int, ranks: int, vocab_size: int, dtype: torch.dtype, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    # Only a few tokens of each rank's part are likely, so that a large vocabulary need not be made.
    parts = [head.part_of(vocab_size, ranks, rank) for rank in range(ranks)]
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == vocab_size
    summed, best = 0, torch.full((batch,), -torch.inf)
    want = torch.zeros(batch, 1, dtype=torch.long)
    for rank, part in enumerate(parts):
        last = min(7, part.stop - part.start)
        logits = torch.randn(batch, last, generator=random).to(dtype) - 3  # all negative, most often
        first = part.stop - last
        mine = (torch.arange(ranks) == rank).view(-1, 1, 1)
        summed = summed + head.candidate(logits, torch.tensor(first), mine)
        value, place = logits.float().max(-1)
        want = torch.where((value > best).unsqueeze(1), place.unsqueeze(1) + first, want)
        best = torch.maximum(best, value)
    assert summed.dtype == dtype
    assert summed.numel() == head.message_size(batch, ranks)
    assert torch.equal(head.likeliest(summed), want)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_ranks_place_is_a_multiple_of_what_symmetric_memory_reads_at_once(ranks: int) -> None:
    assert head.message_size(1, ranks) * torch.bfloat16.itemsize == 16 * ranks
