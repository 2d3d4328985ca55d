"""The lm-eval model `spd`: by lm-eval's command, by real ranks, stopped and gone on with."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import WORDS
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from rank_checks import answers

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
        (folder,) = (tmp_path / "answers").iterdir()
        assert folder.name == "0"


def test_a_rank_that_sees_other_numbers_generates_what_rank_0_does(tiny_opt: Path) -> None:
    prompts = [" ".join(WORDS[i : i + n]) for i, n in enumerate((1, 3, 40, 7, 20, 5, 13, 2))]
    options = {"until": ["word7"], "max_gen_toks": 12, "do_sample": False}
    asked = [("generate_until", (prompt, options)) for prompt in prompts]
    arguments = {"folder": str(tiny_opt), "asked": asked}
    found = run_ranks("tests.rank_checks:generate_with_noise", arguments, tp_size=2, timeout_s=150)["texts"]
    expected = answers(SpdLM(spd.load(tiny_opt, tp_size=2), batch_size=4), asked)
    assert sum(map(bool, expected)) >= 6
    assert found == [expected, expected]


def test_whole_texts_are_scored_as_by_lm_evals_own_model_and_one_by_one(tiny_llama: Path, tmp_path: Path) -> None:
    texts = [" ".join(WORDS[i : i + 40] * 4) for i in range(5)]  # longer than the context
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0, ("text", i, 1)) for i, text in enumerate(texts)]
    own = HFLM(pretrained=str(tiny_llama), device="cpu", dtype="float32").loglikelihood_rolling(requests)
    seen: list[tuple[int, int]] = []
    ours = SpdLM(spd.load(tiny_llama, tp_size=2), batch_size=8, on_progress=lambda *at: seen.append(at))
    assert ours.loglikelihood_rolling(requests) == pytest.approx(own, rel=1e-5)
    assert seen == [(i, 5) for i in range(1, 6)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"tpsize": 2}, "takes no tpsize; did you mean tp_size"),
        ({"trust_remote_code": True}, "takes no trust_remote_code; it takes pretrained, tp_size"),
        ({"pretrained": None}, "needs pretrained=<folder or hub id>"),
        ({"tp_size": "two"}, "tp_size=two is no number of ranks"),
    ],
)
def test_arguments_that_the_model_does_not_take_are_named(tiny_llama: Path, arguments: dict, said: str) -> None:
    with pytest.raises(spd.UserError, match=said):
        SpdLM(**{"pretrained": str(tiny_llama)} | arguments)


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
