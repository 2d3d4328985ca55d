"""Calibration samples from text files."""

import json
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer

import spd
from spd.data import load_samples


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Three documents of 20, 10 and 15 words."""
    lines = [" ".join(f"word{i}" for i in range(n)) for n in (20, 10, 15)]
    path = tmp_path / "text.txt"
    path.write_text("\n".join(lines) + "\n\n")
    return path


def test_samples_are_windows_of_the_joined_documents(text: Path) -> None:
    stream = [1, *range(4, 24), 2, 1, *range(4, 14), 2, 1, *range(4, 19), 2]  # BOS words EOS, three times
    windows = {tuple(stream[i : i + 8]) for i in range(len(stream) - 7)}
    samples = load_samples(text, make_tokenizer(), samples=200, sequence_length=8)
    assert samples.shape == (200, 8)
    assert {tuple(s) for s in samples.tolist()} == windows


@pytest.mark.parametrize(("samples", "length"), [(0, 8), (-4, 8), (4, 0)])
def test_less_than_one_sample_or_token_is_refused(text: Path, samples: int, length: int) -> None:
    with pytest.raises(spd.UserError, match="give 1 of each or more"):
        load_samples(text, make_tokenizer(), samples=samples, sequence_length=length)


def test_samples_do_not_overlap_where_the_text_has_room(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(" ".join(f"word{i}" for i in range(48)))  # 50 tokens, all different
    for seed in range(20):
        samples = load_samples(tmp_path / "text.txt", make_tokenizer(), samples=6, sequence_length=8, seed=seed)
        assert len(set(samples.flatten().tolist())) == 48


def test_the_seed_decides_the_samples(text: Path) -> None:
    draws = [load_samples(text, make_tokenizer(), samples=5, sequence_length=8, seed=s) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_json_lines_give_the_same_samples_as_text(text: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"text": line}) for line in text.read_text().splitlines() if line]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    draws = [load_samples(p, make_tokenizer(), 5, 8) for p in (text, tmp_path / "text.jsonl")]
    assert torch.equal(*draws)


def test_a_line_separator_inside_a_document_does_not_split_it(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "word1\u2028word2"}, ensure_ascii=False), encoding="utf-8")
    assert load_samples(tmp_path / "text.jsonl", make_tokenizer(), 1, 4).tolist() == [[1, 5, 6, 2]]


def test_the_longest_possible_sample_is_the_whole_text(text: Path) -> None:
    assert load_samples(text, make_tokenizer(), samples=2, sequence_length=51).shape == (2, 51)
    with pytest.raises(spd.UserError, match="has 51 tokens, fewer than one sequence of 52"):
        load_samples(text, make_tokenizer(), samples=2, sequence_length=52)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"\n \n", "holds no text"),
        ("latin.txt", b"\xe4\xff", "cannot be read"),
        ("broken.jsonl", b'{"text": "word1"}\n{', 'one JSON object with a "text" field a line'),
        ("fields.jsonl", b'{"txt": "word1"}\n', 'one JSON object with a "text" field a line'),
        ("null.jsonl", b'{"text": null}\n', 'one JSON object with a "text" field a line'),
    ],
)
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(spd.UserError, match=message):
        load_samples(tmp_path / name, make_tokenizer(), samples=1, sequence_length=2)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(spd.UserError, match=r"missing.txt cannot be read"):
        load_samples(tmp_path / "missing.txt", make_tokenizer(), samples=1, sequence_length=2)
