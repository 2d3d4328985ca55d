"""The next token of a vocabulary that is cut over ranks."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spd.gpu import head


@settings(deadline=None)
@given(
    batch=st.integers(1, 5),
    ranks=st.integers(1, 8),
    vocab_size=st.integers(8, 3000) | st.sampled_from([32000, 50272, 152064]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    seed=st.integers(0, 9),
)
def test_ranks_find_the_likeliest_token_of_the_whole_vocabulary(
    batch: int, ranks: int, vocab_size: int, dtype: torch.dtype, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, vocab_size, generator=random).to(dtype) - 9  # all negative, as zeros are put with them
    parts = [head.part_of(vocab_size, ranks, rank) for rank in range(ranks)]
    assert torch.equal(torch.cat([logits[:, part] for part in parts], 1), logits)
    summed = sum(
        head.candidates(logits[:, part], torch.tensor(part.start), (torch.arange(ranks) == rank).view(-1, 1, 1))
        for rank, part in enumerate(parts)
    )
    assert (summed.dtype, summed.numel()) == (dtype, head.candidates_size(batch, ranks))
    token = head.likeliest(summed)
    assert token.shape == (batch, 1)
    assert torch.equal(logits.gather(1, token), logits.amax(1, keepdim=True))  # of equals, any


def test_the_largest_ids_are_written_and_read() -> None:
    for token in (0, 255, 256, 65535, 65536, 2**24 - 1):
        own = head.candidates(torch.zeros(1, 1, dtype=torch.bfloat16), torch.tensor(token), torch.ones(1, 1, 1).bool())
        assert head.likeliest(own).item() == token
