"""What the task YAMLs call: rows from the files beside them, and the score of a summary."""

from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from rouge_score.rouge_scorer import RougeScorer

DATA = Path(__file__).parent / "data"


def load(file: str, dev: str | None = None, **_: Any) -> DatasetDict:
    """The rows of `data/<file>.jsonl` as split "test", those of `data/<dev>.jsonl` as split "dev"."""
    splits = {"test": file} | ({"dev": dev} if dev else {})
    return DatasetDict({split: Dataset.from_json(str(DATA / f"{name}.jsonl")) for split, name in splits.items()})


def pronoun_index(row: dict[str, Any]) -> int:
    """Which of the two contexts is right."""
    return int(row["answer"]) - 1


def pronoun_contexts(row: dict[str, Any]) -> list[str]:
    """The sentence up to the blank, filled in with either name."""
    head = row["sentence"].split(" _ ")[0]
    return [f"{head} {row['option1']}", f"{head} {row['option2']}"]


def pronoun_rest(row: dict[str, Any]) -> str:
    """The sentence after the blank."""
    return row["sentence"].split(" _ ")[1]


def last_word_context(row: dict[str, Any]) -> str:
    """The text without its last word."""
    return row["text"].rsplit(" ", 1)[0]


def last_word(row: dict[str, Any]) -> str:
    """The last word, with the space before it."""
    return " " + row["text"].rsplit(" ", 1)[1]


def rouge_l(row: dict[str, Any], results: list[str]) -> dict[str, float]:
    """ROUGE-L (F measure, 0 to 1) of a summary against the row's answers, the best of them."""
    scorer = RougeScorer(["rougeL"])
    return {"rougeL": max(scorer.score(answer, results[0])["rougeL"].fmeasure for answer in row["answers"])}
