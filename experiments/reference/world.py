"""The generated world as an endless stream of documents, and the words it is written in.

python -m experiments.reference.world --seed 1 --documents 5      # print some
"""

import argparse
from collections.abc import Callable, Iterator
from functools import cache
from random import Random

from . import lexicon
from .passages import notes_document, passage_document, rule_document
from .stories import story_document
from .texts import (
    LETTERS,
    choice_document,
    facts_document,
    facts_questions,
    list_document,
    physical_document,
    quiz_document,
    reasons_document,
    report_document,
    sums_document,
    two_hop_document,
)

# kind of document: (how it is written, how many of a hundred or so documents)
KINDS: dict[str, tuple[Callable[[Random, float], str], float]] = {
    "story": (story_document, 26),
    "notes": (notes_document, 18),
    "passage": (passage_document, 11),
    "rules": (rule_document, 5),
    "facts": (facts_document, 7),
    "fact questions": (facts_questions, 5),
    "two hops": (two_hop_document, 10),
    "physical": (physical_document, 5),
    "reasons": (reasons_document, 16),
    "lists": (list_document, 5),
    "sums": (sums_document, 5),
    "quiz": (quiz_document, 10),
    "choices": (choice_document, 3),
    "report": (report_document, 6),
}


def document(rng: Random, hard: float = 1.0) -> str:
    """One document of lower-case words and punctuation, separated by single spaces.

    `hard` in 0..1 grades the kinds that come in degrees: longer stories, more questions of several steps.
    """
    write = rng.choices([write for write, _ in KINDS.values()], [share for _, share in KINDS.values()])[0]
    return write(rng, hard)


def documents(seed: int | str, hard: float = 1.0) -> Iterator[str]:
    """The endless stream of documents of a seed: the same seed and `hard` give the same text, to the byte."""
    rng = Random(f"documents {seed}")
    while True:
        yield document(rng, hard)


@cache
def vocabulary() -> list[str]:
    """Every word that a document or a task can contain, in a fixed order.

    Read off the lexicon, and off documents of each kind for the words that only their templates hold.
    """
    words: set[str] = set(LETTERS) | {str(n) for n in range(lexicon.LARGEST_NUMBER + 6)}
    for name, value in vars(lexicon).items():
        if name.isupper() and not isinstance(value, int):
            words |= _words_of(value)
    rng = Random("vocabulary")
    for write, _ in KINDS.values():
        for _ in range(200):
            words |= set(write(rng, 1.0).split())
    words |= {"goal", "summary", "report", "think", "yes", "no"}
    return sorted(words)


def _words_of(value: object) -> set[str]:
    if isinstance(value, str):
        return {word for word in value.split() if "{" not in word}
    if isinstance(value, dict):
        return _words_of(list(value)) | _words_of(list(value.values()))
    if isinstance(value, list | tuple):
        return set().union(*map(_words_of, value)) if value else set()
    return set()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print documents of the generated world.")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--documents", type=int, default=5)
    parser.add_argument("--hard", type=float, default=1.0)
    options = parser.parse_args()
    for _, text in zip(range(options.documents), documents(options.seed, options.hard), strict=False):
        print(text, end="\n\n")
