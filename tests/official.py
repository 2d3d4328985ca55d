"""Small invented data sets in the official schemas, in a folder laid out like the hub, traps included."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from lm_eval.tasks._yaml_loader import load_yaml

from spd.tasks import _own_index

Rows = list[dict[str, Any]]
Configs = dict[str, dict[str, Rows]]
"""config -> split -> rows"""

LONG = " ".join(f"word{i % 60}" for i in range(300))
"""Longer than the context of the tests' models."""


def write(data_root: Path, name: str, configs: Configs, form: str = "parquet") -> None:
    """A data set as a repository of the hub holds it: files, and a README.md whose YAML head tells their configs."""
    folder = data_root / name
    head = []
    for config, splits in configs.items():
        files = []
        for split, rows in splits.items():
            path = Path(config) / f"{split}-00000-of-00001.{form}"
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            if form == "parquet":
                pq.write_table(pa.Table.from_pylist(rows), folder / path)
            else:
                text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                (folder / path).write_text(text, encoding="utf-8")
            files.append({"split": split, "path": str(path)})
        head.append({"config_name": config, "data_files": files})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': head})}---\n# {name}\n")


def thrice(rows: Rows) -> dict[str, Rows]:
    return {"train": rows, "validation": rows, "test": rows}


def arc() -> Configs:
    def row(labels: list[str], answer: str) -> dict[str, Any]:
        texts = [f"word{i} " for i, _ in enumerate(labels)]  # trailing spaces
        return {
            "id": f"Mercury_{len(labels)}",
            "question": "Which word comes after word3 ?",
            "choices": {"text": texts, "label": labels},
            "answerKey": answer,
        }

    rows = [row(list("ABCD"), "B"), row(list("ABC"), "C"), row(list("ABCDE"), "E"), row(list("1234"), "4")]
    return {"ARC-Easy": thrice(rows), "ARC-Challenge": thrice(rows[::-1])}


def hellaswag() -> Configs:
    def row(ctx_a: str, ctx_b: str, label: str) -> dict[str, Any]:
        return {
            "ind": 1,
            "activity_label": "Removing ice from car",
            "ctx_a": ctx_a,
            "ctx_b": ctx_b,
            "ctx": f"{ctx_a} {ctx_b}",
            "endings": ["[substeps] word1 [title] word2", "word3  word4 .", "ünïcödé word5", "word6 "],
            "source_id": "wikihow~1",
            "split": "train",
            "split_type": "indomain",
            "label": label,
        }

    rows = [row("[header] How to word1 [title] word2", "", "0"), row(LONG, "then she", "3")]
    # As in the official one, the labels of the test split are empty.
    return {"default": {"train": rows, "validation": rows, "test": [row("word1", "", "")]}}


def piqa() -> Configs:
    rows = [
        {"goal": "How do I word1 ?", "sol1": "word2 word3 ", "sol2": "word4", "label": 0},
        {"goal": LONG, "sol1": "Use a jalapeño .", "sol2": "Use word5 .", "label": 1},
    ]
    return {"default": thrice(rows)}


def sciq() -> Configs:
    def row(support: str) -> dict[str, Any]:
        choices = {f"distractor{i}": f"word{i}" for i in (1, 2, 3)}
        return {"question": "What is word9 ?", **choices, "correct_answer": "word9", "support": support}

    return {"default": thrice([row(""), row("  word9 word8 . "), row(LONG)])}


def winogrande() -> Configs:
    rows = [
        {"sentence": "word1 liked word2 because _ was kind .", "option1": "word1", "option2": "word2", "answer": "1"},
        {"sentence": "_ saw Zoë .", "option1": "Zoë", "option2": "word3", "answer": "2"},
    ]
    hidden = [{**rows[0], "answer": ""}]
    return {"winogrande_xl": {"train": rows, "validation": rows, "test": hidden}}


def lambada() -> Configs:
    return {"default": {"test": [{"text": "word1 word2 “word3” word4"}, {"text": LONG}]}}


def mmlu_subjects() -> list[str]:
    index = _own_index().task_index
    files = [entry.yaml_path for entry in index.values() if "/mmlu/default/" in str(entry.yaml_path)]
    tasks = [load_yaml(file, resolve_func=False) for file in files]
    return sorted({task["dataset_name"] for task in tasks if "dataset_name" in task})


def mmlu(subjects: list[str]) -> Configs:
    def row(subject: str, answer: int) -> dict[str, Any]:
        return {
            "question": f" What is word{answer} ?\n",
            "subject": subject,
            "choices": ["word0", "word1 ", "naïve", "word3"],
            "answer": answer,
        }

    def splits(subject: str) -> dict[str, Rows]:
        dev = [row(subject, i % 4) for i in range(5)]
        return {"test": dev[:2], "validation": dev[:1], "dev": dev}

    return {subject: splits(subject) for subject in subjects}


def longbench() -> Configs:
    rows = [
        {
            "input": "",
            "context": f"Passage {i}:\n{LONG}",
            "answers": ["word1 word2 « word3"],
            "length": 300,
            "dataset": "multi_news",
            "language": "en",
            "all_classes": None,
            "_id": f"id{i}",
        }
        for i in range(2)
    ]
    return {"multi_news": {"test": rows}}


def wikitext() -> Configs:
    paragraph = [{"text": ""}, {"text": " = word1 = \n"}, {"text": ""}, {"text": f" word2 <unk> {LONG} \n"}]
    return {
        "wikitext-2-raw-v1": {
            "train": paragraph * 4,
            "validation": paragraph,
            "test": [{"text": " word5 word6 « word7 \n"}, *paragraph],
        }
    }


def zero_shot(data_root: Path) -> Path:
    """The data of eval=zero_shot."""
    for name, configs in {
        "allenai/ai2_arc": arc(),
        "Rowan/hellaswag": hellaswag(),
        "baber/piqa": piqa(),
        "allenai/sciq": sciq(),
        "allenai/winogrande": winogrande(),
    }.items():
        write(data_root, name, configs)
    write(data_root, "EleutherAI/lambada_openai", lambada(), "jsonl")
    return data_root
