"""Answers that are kept: what goes on after a stop, and what is never served to another model."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from safetensors.torch import load_file, save_file
from treated import prepare

import spd
from spd.evaluation import evaluate
from spd.harness import SpdLM
from spd.plan import DropPlan

TASKS = ["toy_choice", "toy_last", "toy_summary"]
ASKED = [Instance("loglikelihood", {}, ("word1 word2", " word3"), 0, ("task", 0, 1))]


def computed(model: spd.TensorParallelLM, tasks: Path, answers: Path) -> int:
    """How many of the 24 answers were not found."""
    seen: list[tuple[int, int]] = []
    evaluate(model, ["toy_last"], include_path=tasks, answers=answers, on_progress=lambda *at: seen.append(at))
    return len(seen)


def test_an_evaluation_that_was_stopped_goes_on_where_it_was(tiny_llama: Path, tasks: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 50:
            raise KeyboardInterrupt

    model = spd.load(tiny_llama, tp_size=2)
    whole = evaluate(model, TASKS, include_path=tasks)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, TASKS, include_path=tasks, batch_size=4, answers=tmp_path, on_progress=stop)
    (file,) = tmp_path.iterdir()
    kept = file.read_text()
    assert 40 <= len(kept.splitlines()) <= 50
    file.write_text(kept[:-20])  # cut off within the last line
    seen: list[tuple[int, int]] = []
    gone_on = evaluate(
        model, TASKS, include_path=tasks, batch_size=4, answers=tmp_path, on_progress=lambda *at: seen.append(at)
    )
    every = 24 * 4 + 24 + 24
    assert seen[-1] == (every - len(kept.splitlines()) + 1,) * 2
    for task in TASKS:
        assert gone_on["tasks"][task]["metrics"] == pytest.approx(whole["tasks"][task]["metrics"], rel=1e-4)
    seen.clear()
    again = evaluate(model, TASKS, include_path=tasks, answers=tmp_path, on_progress=lambda *at: seen.append(at))
    assert seen == []
    assert again == gone_on


def test_another_plan_tp_size_or_type_is_never_served_these_answers(
    tiny_llama: Path, tasks: Path, tmp_path: Path
) -> None:
    def of(dropped: list[int], **options: Any) -> int:
        model = spd.load(tiny_llama, **options)
        model.drop(dropped)
        return computed(model, tasks, tmp_path)

    assert of([0], tp_size=2) == 24
    assert of([0], tp_size=2) == 0
    assert of([1], tp_size=2) == 24
    assert of([0], tp_size=4) == 24
    assert of([0], tp_size=2, dtype="bfloat16") == 24


def test_another_version_of_a_task_is_answered_anew(tiny_llama: Path, tasks: Path, tmp_path: Path) -> None:
    own, seen = tmp_path / "tasks", []
    own.mkdir()
    text = (tasks / "toy_last.yaml").read_text()
    for version in (1.0, 1.0, 2.0):
        (own / "toy_last.yaml").write_text(f"{text}metadata:\n  version: {version}\n")
        evaluate(
            spd.load(tiny_llama), ["toy_last"], own, answers=tmp_path / "a", on_progress=lambda *at: seen.append(at)
        )
    assert len(seen) == 48


def change_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("norm.weight"))
    save_file(weights | {name: weights[name] * 1.5}, folder / "model.safetensors", metadata={"format": "pt"})


def change_tokenizer(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"truncation_side": "left"}))


def change_generation(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": 5.0}))


@pytest.mark.parametrize("change", [change_weights, change_tokenizer, change_generation])
def test_another_checkpoint_in_the_same_folder_is_never_served_these_answers(
    tiny_llama: Path, tasks: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    assert computed(spd.load(folder), tasks, tmp_path / "answers") == 24
    assert computed(spd.load(folder), tasks, tmp_path / "answers") == 0
    change(folder)
    assert computed(spd.load(folder), tasks, tmp_path / "answers") == 24


def test_a_treated_model_goes_on_and_is_not_served_the_zero_shot_ones_answers(
    tiny_llama: Path, tasks: Path, tmp_path: Path
) -> None:
    zero_shot = spd.load(tiny_llama, tp_size=2, dtype="float32")
    zero_shot.drop([0, 1, 2])
    assert computed(zero_shot, tasks, tmp_path) == 24
    for new in (24, 0):  # treated again, in other seconds, to the same
        assert computed(prepare(spd.load(tiny_llama, tp_size=2, dtype="float32"), "zs_b2b"), tasks, tmp_path) == new


@pytest.mark.parametrize("kept", [False, True])
def test_blocks_dropped_between_two_requests_are_dropped_for_the_second(
    tiny_llama: Path, tmp_path: Path, kept: bool
) -> None:
    model = spd.load(tiny_llama, tp_size=2)
    scorer = SpdLM(model, answers=tmp_path / "answers" if kept else None)
    dense = scorer.loglikelihood(ASKED, disable_tqdm=True)
    model.drop([0, 1, 2])
    dropped = scorer.loglikelihood(ASKED, disable_tqdm=True)
    assert dropped == SpdLM(model).loglikelihood(ASKED, disable_tqdm=True) != dense
    model.drop([])
    assert scorer.loglikelihood(ASKED, disable_tqdm=True) == dense


def test_lm_evals_command_keeps_answers_by_plan_and_refuses_its_own_cache(
    tiny_llama: Path, tasks: Path, tmp_path: Path
) -> None:
    model = spd.load(tiny_llama, tp_size=2)
    model.drop([0, 2])
    DropPlan.by_hand(model).save(tmp_path / "plan.json")

    def run(*options: str, **arguments: Any) -> subprocess.CompletedProcess[str]:
        given = ",".join(
            f"{name}={value}" for name, value in {"pretrained": tiny_llama, "tp_size": 2, **arguments}.items()
        )
        command = [sys.executable, "-m", "spd.lm_eval_cli", "--model", "spd", "--include_path", str(tasks), *options]
        return subprocess.run(
            [*command, "--tasks", "toy_last", "--model_args", given], capture_output=True, text=True, timeout=120,
            env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False,
        )  # fmt: skip

    refused = run("--use_cache", str(tmp_path / "cache"))
    assert refused.returncode == 1
    assert "write answers=<folder> in --model_args" in refused.stderr
    done = run(answers=tmp_path / "answers", plan=tmp_path / "plan.json")
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "answers").iterdir()
    assert len(file.read_text().splitlines()) == 24
    again = run(answers=tmp_path / "answers", plan=tmp_path / "plan.json")
    assert again.returncode == 0, again.stderr
    assert len(file.read_text().splitlines()) == 24


@pytest.mark.parametrize(
    ("kind", "reading"),
    [
        ("loglikelihood", {"max_length": 8}),
        ("loglikelihood", {"add_bos_token": False}),
        ("loglikelihood_rolling", {"prefix_token_id": 5}),
    ],
)
def test_texts_read_in_another_way_are_answered_anew(
    tiny_llama: Path, tmp_path: Path, kind: str, reading: dict
) -> None:
    model = spd.load(tiny_llama, tp_size=2)
    context = " ".join(f"word{n}" for n in range(20))
    asked = [Instance(kind, {}, (context, " word3") if kind == "loglikelihood" else (context,), 0, ("task", 0, 1))]

    def answer(answers: Path | None, **options: Any) -> Any:
        return getattr(SpdLM(model, answers=answers, **options), kind)(asked, disable_tqdm=True)

    before = answer(tmp_path)
    assert answer(tmp_path, **reading) == answer(None, **reading) != before
    assert answer(tmp_path) == before


def test_sampled_texts_are_drawn_anew(tiny_llama: Path, tmp_path: Path) -> None:
    options = {"until": [], "do_sample": True, "temperature": 5.0, "max_gen_toks": 6}
    asked = [Instance("generate_until", {}, ("word1 word2", dict(options)), i, ("task", i, 1)) for i in range(4)]
    first, second = (SpdLM(spd.load(tiny_llama), answers=tmp_path).generate_until(asked) for _ in range(2))
    assert len(set(first)) > 1
    assert len(set(second)) > 1
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_read_as_far_as_it_goes_and_a_file_is_no_folder(tiny_llama: Path, tmp_path: Path) -> None:
    model = spd.load(tiny_llama)
    answers = tmp_path / "answers"
    before = SpdLM(model, answers=answers).loglikelihood(ASKED, disable_tqdm=True)
    (file,) = answers.iterdir()
    file.write_bytes(b"\xff\xfe{\n" + file.read_bytes())
    assert SpdLM(model, answers=answers).loglikelihood(ASKED, disable_tqdm=True) == before
    assert len(file.read_bytes().splitlines()) == 2
    with pytest.raises(spd.UserError, match="is a file; give a folder"):
        SpdLM(model, answers=file)
    with pytest.raises(spd.UserError, match="answers=5 is no folder"):
        SpdLM(model, answers=5)  # type: ignore[arg-type]
