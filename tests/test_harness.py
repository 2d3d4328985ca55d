"""The lm-eval model `spd`: by lm-eval's command, by real ranks, stopped and gone on with."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from rank_checks import answers
from torch import Tensor

import spd
from spd.evaluation import evaluate
from spd.harness import SpdLM
from spd.launch import RankFailed, run_ranks
from spd.plan import DropPlan

TASKS = ["toy_choice", "toy_last", "toy_summary"]


def plan_of(folder: Path, path: Path, dropped: list[int]) -> Path:
    model = spd.load(folder, tp_size=2)
    model.drop(dropped)
    DropPlan.by_hand(model).save(path)
    return path


def run_lm_eval(*command: str, **arguments: Any) -> subprocess.CompletedProcess[str]:
    given = ",".join(f"{name}={value}" for name, value in arguments.items())
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [*command, "--model", "spd", "--model_args", given],
        capture_output=True,
        text=True,
        env=environment,
        timeout=180,
    )


def written(folder: Path) -> dict[str, Any]:
    (file,) = folder.rglob("results_*.json")
    return json.loads(file.read_text())["results"]


def test_lm_evals_command_knows_it(tiny_llama: Path, tasks: Path, tmp_path: Path) -> None:
    plan = plan_of(tiny_llama, tmp_path / "plan.json", [0, 2])
    command = [str(Path(sys.executable).parent / "lm_eval"), "--include_path", str(tasks), "--tasks", "toy_last"]
    done = run_lm_eval(*command, "--output_path", str(tmp_path / "out"), pretrained=tiny_llama, tp_size=2, plan=plan)
    assert done.returncode == 0, done.stderr
    model = spd.load(tiny_llama, tp_size=2)
    model.drop([0, 2])
    expected = evaluate(model, ["toy_last"], include_path=tasks)["tasks"]["toy_last"]["metrics"]
    assert written(tmp_path / "out")["toy_last"]["perplexity,none"] == pytest.approx(expected["perplexity"], rel=1e-4)


def test_lm_evals_command_still_knows_its_own_models(tasks: Path, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "lm_eval"), "--model", "dummy", "--include_path", str(tasks)]
    done = subprocess.run(
        [*command, "--tasks", "toy_choice", "--output_path", str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    assert "acc,none" in written(tmp_path)["toy_choice"]


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("sciq", "The task sciq: the data set allenai/sciq could not be had .* start where a folder holds it"),
        ("toy_lst", "Tasks not found: toy_lst; lm_eval ls tasks shows all"),
    ],
)
def test_lm_evals_command_tells_what_is_missing_before_a_model_is_loaded(
    tasks: Path, tmp_path: Path, task: str, said: str
) -> None:
    command = [sys.executable, "-m", "spd.lm_eval_cli", "--include_path", str(tasks), "--tasks", task]
    done = run_lm_eval(*command, pretrained=tmp_path / "no_model")
    assert done.returncode == 1
    assert re.match(f"spd: {said}", done.stderr.splitlines()[-1]), done.stderr


def test_lm_evals_command_looks_first_at_the_tasks_of_a_file_of_settings_too(tmp_path: Path) -> None:
    settings = {"model": "spd", "model_args": {"pretrained": str(tmp_path / "no_model")}, "tasks": ["sciq"]}
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    done = subprocess.run(
        [sys.executable, "-m", "spd.lm_eval_cli", "run", "--config", str(tmp_path / "run.yaml")],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        timeout=180,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("spd: The task sciq: the data set allenai/sciq"), done.stderr


def test_lm_evals_command_under_torchrun_is_one_evaluation(tiny_llama: Path, tasks: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "spd.lm_eval_cli", "--include_path", str(tasks), "--tasks", "toy_last"]
    done = run_lm_eval(*command, "--output_path", str(tmp_path), pretrained=tiny_llama, tp_size=2, ranks="processes")
    assert done.returncode == 0, done.stderr
    (expected,) = evaluate(spd.load(tiny_llama, tp_size=2), ["toy_last"], include_path=tasks)["tasks"].values()
    expected = expected["metrics"]
    assert written(tmp_path)["toy_last"]["perplexity,none"] == pytest.approx(expected["perplexity"], rel=1e-4)


def test_a_wrong_argument_ends_lm_evals_command_with_one_sentence(tiny_llama: Path, tasks: Path) -> None:
    command = [sys.executable, "-m", "spd.lm_eval_cli", "--include_path", str(tasks), "--tasks", "toy_last"]
    done = run_lm_eval(*command, pretrained=tiny_llama, tp_size=3)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("spd: ")
    assert "tp_size=3" in done.stderr.splitlines()[-1]


def test_real_ranks_score_in_lock_step_as_virtual_ones(tiny_opt: Path, tasks: Path, tmp_path: Path) -> None:
    virtual = spd.load(tiny_opt, tp_size=2)
    virtual.drop([1])
    expected = evaluate(virtual, TASKS, include_path=tasks, batch_size=4)
    arguments = {
        "folder": str(tiny_opt),
        "tp_size": 2,
        "dropped": [1],
        "noise": True,
        "tasks": TASKS,
        "include_path": str(tasks),
        "answers": str(tmp_path / "answers"),
    }
    for again in range(2):
        scores = run_ranks("tests.rank_checks:evaluate", arguments, tp_size=2, timeout_s=150)["scores"]
        assert scores[0] == scores[1]
        for task in TASKS:
            ours, theirs = scores[0]["tasks"][task]["metrics"], expected["tasks"][task]["metrics"]
            assert ours == pytest.approx(theirs, rel=1e-3), (task, again)
        # Rank 0 alone keeps answers; what it has, no rank computes again.
        assert [sorted((tmp_path / "answers" / rank).iterdir()) != [] for rank in "01"] == [True, False]


def test_a_rank_that_sees_other_numbers_generates_what_rank_0_does(tiny_opt: Path) -> None:
    prompts = [" ".join(WORDS[i : i + n]) for i, n in enumerate((1, 3, 40, 7, 20, 5, 13, 2))]
    options = {"until": ["word7"], "max_gen_toks": 12, "do_sample": False}
    asked = [("generate_until", (prompt, options)) for prompt in prompts]
    arguments = {"folder": str(tiny_opt), "asked": asked}
    found = run_ranks("tests.rank_checks:generate_with_noise", arguments, tp_size=2, timeout_s=150)["texts"]
    expected = answers(SpdLM(spd.load(tiny_opt, tp_size=2), batch_size=4), asked)
    assert sum(map(bool, expected)) >= 6
    assert found == [expected, expected]


@pytest.mark.parametrize("batch_size", [1, 2, "auto"])
def test_whole_texts_are_scored_as_by_lm_evals_own_model_and_kept_by_batches(
    tiny_llama: Path, tmp_path: Path, batch_size: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [" ".join(WORDS[i : i + 40] * times) for i, times in enumerate((4, 1, 3, 1, 2))]  # some do not fit
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0, ("text", i, 1)) for i, text in enumerate(texts)]
    own = HFLM(pretrained=str(tiny_llama), device="cpu", dtype="float32").loglikelihood_rolling(requests)
    seen: list[tuple[int, int]] = []
    ours = SpdLM(
        spd.load(tiny_llama, tp_size=2), batch_size=batch_size, max_batch_size=3, answers=tmp_path,
        on_progress=lambda *at: seen.append(at),
    )  # fmt: skip
    asked: list[int] = []
    detect = ours._detect_batch_size
    monkeypatch.setattr(ours, "_detect_batch_size", lambda: asked.append(0) or detect())
    assert ours.loglikelihood_rolling(requests) == pytest.approx(own, rel=1e-5)
    assert seen == [(i, 5) for i in range(1, 6)]
    assert len(asked) == (batch_size == "auto")  # once for all texts
    assert ours.batch_size == batch_size
    again = SpdLM(spd.load(tiny_llama, tp_size=2), answers=tmp_path)
    monkeypatch.setattr(again, "_model_call", None)
    assert again.loglikelihood_rolling(requests) == pytest.approx(own, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"tpsize": 2}, "takes no tpsize; did you mean tp_size"),
        ({"trust_remote_code": True}, "takes no trust_remote_code; it takes pretrained, tp_size"),
        ({"pretrained": None}, "needs pretrained=<folder or hub id>"),
        ({"pretrained": 123}, r"pretrained=123 is no folder; give its path, \./123"),
        ({"tp_size": "two"}, "tp_size=two is not possible; give 1 or more"),
        ({"tp_size": 0}, "tp_size=0 is not possible"),
        ({"tp_size": True}, "tp_size=True is not possible"),
        ({"batch_size": "-3"}, "batch_size=-3 is not possible; give 1 or more, or auto"),
        ({"batch_size": 0}, "batch_size=0 is not possible"),
        ({"batch_size": "auto:x"}, "batch_size=auto:x is not possible"),
        ({"batch_size": "auto", "ranks": "processes"}, "real ranks must agree; give a number"),
        ({"max_length": "abc"}, "max_length=abc is not possible"),
        ({"add_bos_token": "maybe"}, "add_bos_token=maybe is not possible; give True or False"),
        ({"prefix_token_id": -1}, "prefix_token_id=-1 is no id of a token"),
        ({"device": "mps"}, "device='mps' cannot be used; write cpu, cuda"),
        ({"answers": 7}, r"answers=7 is no folder; give its path, \./7"),
        ({"answers": "/proc/answers"}, "answers=/proc/answers cannot be made"),
    ],
)
def test_arguments_that_cannot_be_are_named_before_a_model_is_loaded(
    tiny_llama: Path, arguments: dict, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spd.loading.TensorParallelLM", None)
    with pytest.raises(spd.UserError, match=said):
        SpdLM(**{"pretrained": str(tiny_llama)} | arguments)


def test_a_model_is_not_given_another_tp_size_or_plan_and_keeps_its_tokenizer(tiny_llama: Path) -> None:
    model = spd.load(tiny_llama, tp_size=2)
    with pytest.raises(spd.UserError, match="tp_size and plan cannot be given beside a model, which has its own"):
        SpdLM(model, tp_size=8, plan="nowhere.json")
    model.tokenizer.pad_token = None
    assert SpdLM(model).tokenizer.pad_token is not None
    assert model.tokenizer.pad_token is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_asked_for_and_not_there_is_said(tiny_llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    SpdLM(str(tiny_llama), tp_size=2, device="cpu")
    assert not caplog.messages
    assert SpdLM(str(tiny_llama), tp_size=2, device="cuda").device.type == "cpu"
    assert caplog.messages == ["torch sees no GPU here: the CPU evaluates instead of cuda."]


def test_processes_that_would_each_evaluate_the_whole_model_are_refused(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(spd.UserError, match="Each of 2 processes would evaluate the whole model; write ranks=proc"):
        SpdLM(str(tiny_llama))
    SpdLM(spd.load(tiny_llama))


def test_more_tokens_than_the_model_takes_are_not_generated(tiny_llama: Path) -> None:
    model = SpdLM(spd.load(tiny_llama))
    for tokens in (64, 500):
        request = Instance("generate_until", {}, ("word1", {"until": [], "max_gen_toks": tokens}), 0, ("task", 0, 1))
        with pytest.raises(spd.UserError, match=f"Up to {tokens} tokens are to be generated, and the model takes 64"):
            model.generate_until([request])


def test_a_plan_that_treats_blocks_is_refused_in_words(tiny_llama: Path, tmp_path: Path) -> None:
    plan = DropPlan.load(plan_of(tiny_llama, tmp_path / "plan.json", [0, 2]))
    plan.treatment[0] = "b2b"
    plan.save(tmp_path / "plan.json")
    with pytest.raises(spd.UserError, match="save the model with save_pretrained and give that folder"):
        SpdLM(str(tiny_llama), plan=str(tmp_path / "plan.json"))


def test_the_batch_size_can_be_found_by_itself(tiny_llama: Path, tasks: Path) -> None:
    model = spd.load(tiny_llama, tp_size=2)
    found = evaluate(model, TASKS, include_path=tasks, batch_size="auto")
    given = evaluate(model, TASKS, include_path=tasks, batch_size=4)
    for task in TASKS:
        assert found["tasks"][task]["metrics"] == pytest.approx(given["tasks"][task]["metrics"], rel=1e-4)


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling", "generate_until"])
def test_a_batch_size_found_by_itself_is_what_fits_in_memory(
    tiny_llama: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SpdLM(spd.load(tiny_llama), batch_size="auto")
    sizes: list[int] = []
    forward = model.tensor_parallel.forward

    def of_little_memory(input_ids: Tensor, *args: Any, **options: Any) -> Any:
        if len(input_ids) > 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        sizes.append(len(input_ids))
        return forward(input_ids, *args, **options)

    monkeypatch.setattr(model.tensor_parallel, "forward", of_little_memory)
    generate = model._model_generate
    monkeypatch.setattr(
        model, "_model_generate", lambda context, **of: sizes.append(len(context)) or generate(context, **of)
    )
    arguments = {
        "loglikelihood": (" word3",),
        "loglikelihood_rolling": (),
        "generate_until": ({"until": [], "max_gen_toks": 2},),
    }
    texts = [" ".join(WORDS[i : i + 9]) for i in range(12)]
    requests = [Instance(kind, {}, (text, *arguments[kind]), 0, ("task", i, 1)) for i, text in enumerate(texts)]
    assert len(getattr(model, kind)(requests)) == 12
    assert sizes[-3:] == [4, 4, 4]


def test_a_continuation_longer_than_the_context_is_told_in_words(tiny_llama: Path) -> None:
    request = Instance("loglikelihood", {}, ("word1", " " + " ".join(WORDS * 2)), 0, ("task", 0, 1))
    with pytest.raises(spd.UserError, match="continuation to be scored has 120 tokens and the model takes 64"):
        SpdLM(spd.load(tiny_llama, tp_size=2)).loglikelihood([request])


def test_a_rank_that_raises_ends_lm_evals_command_with_its_traceback(tiny_llama: Path, tasks: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(Path(__file__).parent / "raising_rank.py"), "--include_path", str(tasks)]
    done = run_lm_eval(*command, "--tasks", "toy_summary", pretrained=tiny_llama, tp_size=2, ranks="processes")
    ended = time.time()
    assert done.returncode != 0
    assert "rank 1 raises at" in done.stderr, done.stderr
    (raised,) = (line.split()[-1] for line in done.stderr.splitlines() if "rank 1 raises at" in line)
    assert ended - float(raised) < 30
    assert 'raise ArithmeticError("rank 1 cannot go on")' in done.stderr
    assert "ArithmeticError: rank 1 cannot go on" in done.stderr


def test_a_rank_that_raises_ends_the_runners_launch_with_its_traceback(tiny_llama: Path, tasks: Path) -> None:
    arguments = {"folder": str(tiny_llama), "tp_size": 2, "tasks": ["toy_last"], "include_path": str(tasks)}
    with pytest.raises(RankFailed, match=r"(?s)rank 1 of 2 failed: ArithmeticError.*in fails_at_third_call") as failed:
        run_ranks("tests.rank_checks:evaluate_and_fail", arguments, tp_size=2, timeout_s=150)
    ended = time.time()
    assert ended - float(str(failed.value).split("at ")[1].split()[0]) < 30
