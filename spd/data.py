"""Calibration and held-out samples from texts."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spd.errors import UserError


def load_samples(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, samples: int, sequence_length: int, seed: int = 0
) -> Tensor:
    """Random windows of a text: token ids [samples, sequence_length].

    The documents are tokenized as the tokenizer does by default (with its BOS, if it has one), each ends with the EOS
    token, and all are joined. Windows do not overlap, so that some of them can judge what was learned from the others,
    as long as the text has room for so many; in a shorter text they start anywhere.

    Args:
        path: a text file, one document a line, or a .jsonl file with a "text" field in each line.
        samples: S.
        sequence_length: T.
        seed: of the window starts.

    Raises:
        UserError: the file is missing, not readable as that format, empty, or shorter than one sequence.
    """
    return draw_samples(tokenize(read_documents(path), tokenizer), str(path), samples, sequence_length, seed)


def draw_samples(tokens: Tensor, name: str, samples: int, sequence_length: int, seed: int = 0) -> Tensor:
    """As `load_samples`, from what `tokenize` gave; `name` says in errors whose text it is."""
    if samples < 1 or sequence_length < 1:
        raise UserError(f"{samples} samples of {sequence_length} tokens were asked for; give 1 of each or more.")
    if len(tokens) < sequence_length:
        raise UserError(
            f"{name} has {len(tokens)} tokens, fewer than one sequence of {sequence_length}; "
            "give a longer text or a shorter data.sequence_length."
        )
    generator = torch.Generator().manual_seed(seed)
    places, rest = divmod(len(tokens), sequence_length)
    if samples <= places:
        # Side by side from a random first token on.
        begin = int(torch.randint(rest + 1, (), generator=generator))
        starts = begin + sequence_length * torch.randperm(places, generator=generator)[:samples]
    else:
        starts = torch.randint(len(tokens) - sequence_length + 1, (samples,), generator=generator)
    return tokens[starts[:, None] + torch.arange(sequence_length)]


def tokenize(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Token ids [tokens] of the documents, each with its BOS and EOS, joined."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    # A whole file is longer than any context, and the tokenizer would warn of that.
    encoded = tokenizer(list(documents), verbose=False)["input_ids"]
    return torch.tensor(
        list(itertools.chain.from_iterable(ids if ids[-1:] == end else ids + end for ids in encoded)), dtype=torch.long
    )


def read_documents(path: str | Path) -> list[str]:
    """The documents of a text file, at least one.

    Raises:
        UserError: the file is missing, not readable as its format, or empty.
    """
    path = Path(path)
    documents = _parse(path)
    if not documents:
        raise UserError(f"{path} holds no text; give a file with one document a line.")
    return documents


def _parse(path: Path) -> list[str]:
    try:
        # Not splitlines(), which also splits at characters that may stand inside a document.
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The text {path} cannot be read: {error}") from error
    if path.suffix != ".jsonl":
        return lines
    try:
        documents = [json.loads(line)["text"] for line in lines]
        if not all(isinstance(document, str) for document in documents):
            raise TypeError("a text is no string")
        return documents
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path} must hold one JSON object with a "text" field a line: {error}') from error
