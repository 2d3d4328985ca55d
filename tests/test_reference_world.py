"""The generated world, its tasks and the three models trained on it keep what experiments/reference/README.md says."""

import json
import re
from collections import Counter
from itertools import islice
from pathlib import Path
from random import Random

import pytest
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from experiments.reference import lexicon
from experiments.reference.check import ZERO_SHOT, requests
from experiments.reference.items import all_rows
from experiments.reference.texts import LETTERS, SUBJECTS, lettered
from experiments.reference.tokenizer import encode
from experiments.reference.train import MODELS, shard
from experiments.reference.world import KINDS, documents, vocabulary
from experiments.reference.write import HERE, files
from spd.tasks import task_manager

ROWS = all_rows()


@pytest.fixture(scope="module")
def training_text() -> str:
    """Some 2 MB of what the models were trained on, one document a line."""
    return " \n ".join(text for i in range(4) for text in islice(documents(f"train 1 {i}"), 900))


@pytest.fixture(scope="module", params=MODELS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(HERE / "models" / request.param)


def prompts(task: str) -> list[tuple[str, str, int, int]]:
    """(context, continuation, choice, which choice is right) of every item of a task."""
    found = []
    for row in ROWS[task]:
        pairs, gold = requests(task, row)
        found += [(context, continuation, i, gold) for i, (context, continuation) in enumerate(pairs)]
    return found


def test_the_same_seed_gives_the_same_text_and_another_gives_another() -> None:
    once, again, other = (list(islice(documents(seed), 50)) for seed in ("a", "a", "b"))
    assert once == again
    assert not set(once) & set(other)


@pytest.mark.parametrize("kind", list(KINDS))
def test_documents_are_words_separated_by_single_spaces(kind: str) -> None:
    write, _ = KINDS[kind]
    words = set(vocabulary())
    for seed in range(40):
        text = write(Random(seed), 1.0)
        assert text == " ".join(text.split())
        assert set(text.split()) <= words


def test_committed_items_and_texts_are_what_the_recipe_writes() -> None:
    for path, content in files().items():
        assert (HERE / path).read_text() == content, path


def test_facts_asked_by_the_tasks_are_told_but_never_asked_in_training(training_text: str) -> None:
    asked = [str(row["question"]) for task in ("rw_facts", "rw_subject_people") for row in ROWS[task]]
    assert not [question for question in asked if question in training_text]
    told = [
        any(wording.format(e=entity, v=value) in training_text for wording in lexicon.WORDINGS[relation][0])
        for entity, relation, value in lexicon.one_hop_facts()
        if lexicon.held_out("ask", entity, relation)
    ]
    assert sum(told) / len(told) > 0.9


def test_combinations_held_out_for_the_tasks_never_occur_in_training(training_text: str) -> None:
    for row in ROWS["rw_two_hop"]:
        if row["kind"] == "memory":
            assert str(row["question"]) not in training_text
        for told in re.findall(r"the \w+ of \w+ is \w+ \.", str(row["context"])):  # the friend of anna is tom
            assert told not in training_text
    for row in ROWS["rw_physical"]:
        for solution in ("sol1", "sol2"):
            assert f"goal : {row['goal']} . answer : {row[solution]}" not in training_text
    for row in ROWS["rw_pronoun"]:
        told = str(row["sentence"]).split(" _ ")[0].rsplit(" ", 1)[0]  # who did what to whom
        assert f" {told} " not in training_text
    for task, column in (("rw_continuation", "context"), ("rw_passage", "support"), ("rw_summary", "context")):
        assert not [row for row in ROWS[task] if str(row[column]) in training_text]
    assert not [row for row in ROWS["rw_last_word"] if str(row["text"]) in training_text]
    for row in ROWS["rw_subject_sums"]:
        assert str(row["question"]) not in training_text


def test_every_choice_item_has_one_right_answer_among_different_choices() -> None:
    for task in ZERO_SHOT:
        for row in ROWS[task]:
            pairs, gold = requests(task, row)
            assert len(set(pairs)) == len(pairs)
            assert 0 <= gold < len(pairs)
    for subject in SUBJECTS:
        for row in ROWS[f"rw_subject_{subject}"]:
            assert len(set(row["choices"])) == 4  # type: ignore[call-overload]
    for row in ROWS["rw_physical"]:
        need = next(need for need, goals in lexicon.GOALS.items() if row["goal"] in goals)
        serves = [need in lexicon.PROPERTIES[str(row[s]).split()[2]] for s in ("sol1", "sol2")]
        assert serves == [row["label"] == 0, row["label"] == 1]


def test_no_position_is_right_more_often_than_the_others() -> None:
    golds = {task: [requests(task, row)[1] for row in ROWS[task]] for task in ZERO_SHOT if task != "rw_last_word"}
    golds |= {subject: [int(str(row["answer"])) for row in ROWS[f"rw_subject_{subject}"]] for subject in SUBJECTS}
    for task, positions in golds.items():
        counts = Counter(positions)
        assert max(counts.values()) - min(counts.values()) <= 3, (task, counts)


def test_every_text_and_item_is_read_without_an_unknown_word_and_comes_back(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = [*islice(documents("calibration"), 200)]
    texts += [f"{context} {continuation}" for task in ZERO_SHOT for context, continuation, _, _ in prompts(task)[:200]]
    texts += [f"{row['context']} summary :" for row in ROWS["rw_summary"][:40]]
    for ids, text in zip(tokenizer(texts)["input_ids"], texts, strict=True):
        assert "<unk>" not in tokenizer.convert_ids_to_tokens(ids)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_context_is_a_prefix_of_itself_with_its_continuation(tokenizer: PreTrainedTokenizerBase) -> None:
    for task in ZERO_SHOT:
        for context, continuation, _, _ in prompts(task)[:60]:
            whole, alone = tokenizer([f"{context} {continuation}", context])["input_ids"]
            assert whole[: len(alone)] == alone
            assert len(whole) > len(alone)


@pytest.mark.parametrize("name", MODELS)
def test_training_rows_are_what_the_tokenizer_reads(name: str) -> None:
    saved = AutoTokenizer.from_pretrained(HERE / "models" / name)
    for text in islice(documents("rows"), 60):
        assert encode(name, text) == saved(text)["input_ids"]
    rows = shard((name, 1, 0, 1.0, 2))
    assert rows.shape == (2, 512)
    assert rows.max() < len(saved)
    assert (rows[:, 0] == saved.bos_token_id).all() == (name != "ref_qwen2")


@pytest.mark.parametrize("name", MODELS)
def test_the_models_are_as_large_as_the_card_says(name: str) -> None:
    folder = HERE / "models" / name
    config = AutoConfig.from_pretrained(folder)
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 14 * 2**20
    assert config.num_hidden_layers == 12
    assert config.num_attention_heads == 8
    assert config.tie_word_embeddings
    assert getattr(config, "num_key_value_heads", 8) == (4 if name == "ref_qwen2" else 8)
    assert getattr(config, "intermediate_size", getattr(config, "ffn_dim", 0)) % 8 == 0
    record = json.loads((HERE / "records" / f"{name}.scores.json").read_text())
    assert record["zero_shot_mean"]["value"] >= 0.80


def test_the_nine_tasks_load_in_lm_eval_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [*ZERO_SHOT, "rw_summary", *(f"rw_subject_{subject}" for subject in SUBJECTS)]
    tasks = task_manager([*ZERO_SHOT, "rw_subjects", "rw_summary"], HERE / "tasks").load(names)["tasks"]
    sizes = {name: len(task.test_docs()) for name, task in tasks.items()}
    assert all(sizes[name] >= 200 for name in (*ZERO_SHOT, "rw_summary"))
    assert sum(sizes[f"rw_subject_{subject}"] for subject in SUBJECTS) >= 200
    for name in ZERO_SHOT:  # what check.py asks is what the YAML asks
        task, row = tasks[name], ROWS[name][3]
        pairs, gold = requests(name, row)
        document = task.test_docs()[3]
        if name == "rw_pronoun":
            assert task.doc_to_choice(document) == [context for context, _ in pairs]
            assert task.doc_to_text(document) == gold
            assert task.doc_to_target(document) == pairs[0][1]
        elif name == "rw_last_word":
            assert (task.doc_to_text(document), task.doc_to_target(document).strip()) == pairs[0]
        else:
            assert [(task.doc_to_text(document), choice) for choice in task.doc_to_choice(document)] == pairs
            assert task.doc_to_target(document) == gold
    quiz = tasks["rw_subject_sums"]
    row = ROWS["rw_subject_sums"][0]
    assert quiz.doc_to_text(quiz.test_docs()[0]) == lettered(str(row["question"]), list(row["choices"]))  # type: ignore[call-overload]
    assert quiz.doc_to_choice(quiz.test_docs()[0]) == list(LETTERS)
