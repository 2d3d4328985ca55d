"""With nothing dropped, every answer to every task's requests is that of lm-eval's own Hugging Face model."""

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import official
import pytest
import yaml
from conftest import WORDS, make_tokenizer
from lm_eval.models.huggingface import HFLM
from rank_checks import Asked, answers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

import spd
from spd.harness import SpdLM
from spd.launch import run_ranks
from spd.paths import ROOT
from spd.tasks import task_manager

CONTEXT = 256
CONTINUATIONS = [*(f" {word}" for word in WORDS), *string.ascii_letters]
VOCABULARY = {"with BOS": 64, "without BOS": 65, "of bytes": 400}
CONTEXTS = [" ".join(WORDS[i : i + 2]) for i in range(20)]
MODELS = ["llama with BOS", "llama without BOS", "opt with BOS", "opt without BOS", "qwen2 of bytes"]


def bytes_tokenizer() -> Qwen2Tokenizer:
    """Qwen2's own kind: bytes, merged to words; no BOS."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learned.train_from_iterator([f" {word}" for word in WORDS], trainer)
    return Qwen2Tokenizer(
        vocab=learned.get_vocab(),
        merges=[tuple(pair) for pair in yaml.safe_load(learned.to_str())["model"]["merges"]],
        unk_token="<eos>",
        eos_token="<eos>",
        pad_token="<pad>",
    )


@pytest.fixture(scope="module")
def folders(checkpoint: Callable[..., Path]) -> dict[str, Path]:
    """A model for each of MODELS."""
    made = {}
    for name in MODELS:
        family, tokenizer = name.split(" ", 1)
        # Written over the fixture's tokenizer: each model has a vocabulary, and so a folder, of its own.
        made[name] = checkpoint(family, max_position_embeddings=CONTEXT, vocab_size=VOCABULARY[tokenizer])
        if tokenizer == "of bytes":
            bytes_tokenizer().save_pretrained(made[name])
        elif tokenizer == "without BOS":
            words = make_tokenizer()
            words.backend_tokenizer.post_processor = None
            words.save_pretrained(made[name])
    return made


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """What the tasks of eval=zero_shot, mmlu and longbench ask, from files that hit their traps, and whole texts."""
    root = official.zero_shot(tmp_path_factory.mktemp("data"))
    official.write(root, "cais/mmlu", official.mmlu(official.mmlu_subjects()))
    official.write(root, "Xnhyacinth/LongBench", official.longbench(), "jsonl")
    found: Asked = []
    for name in ("zero_shot", "mmlu", "longbench"):
        settings = yaml.safe_load((ROOT / f"conf/eval/{name}.yaml").read_text())
        tasks = task_manager(settings["tasks"], data_root=root).load(settings["tasks"])["tasks"]
        for task in tasks.values():
            if (shots := settings.get("num_fewshot")) is not None:
                task.set_config(key="num_fewshot", value=shots)
            task.build_all_requests(limit=1 if name == "mmlu" else None)
            found += [(request.request_type, request.args) for request in task.instances]
    for kind, arguments in found:
        if kind == "generate_until":
            arguments[1]["max_gen_toks"] = 8
    # Of all lengths in one batch, which is padded from the left, and up to more than fits.
    free = {"until": [], "max_gen_toks": 12, "do_sample": False}
    found += [("generate_until", (" ".join((WORDS * 6)[n : 2 * n]), free)) for n in (1, 3, 40, 7, 90, 22, 5, 13, 61, 2)]
    found += [("loglikelihood_rolling", (text,)) for text in (official.LONG, "word1 ünïcödé")]
    # Every word and letter after some contexts: random models find none of the tasks' continuations the likeliest.
    return found + [("loglikelihood", (context, next_one)) for context in CONTEXTS for next_one in CONTINUATIONS]


def check(ours: list[Any], own: list[Any]) -> None:
    for a, b in zip(ours, own, strict=True):
        if isinstance(b, list):
            assert a[0] == pytest.approx(b[0], abs=2e-4)
            assert a[1] is b[1]
        elif isinstance(b, float):
            assert a == pytest.approx(b, rel=1e-6, abs=2e-4)
        else:
            assert a == b


def test_what_is_asked_is_every_task_with_its_traps(asked: Asked, folders: dict[str, Path]) -> None:
    kinds = [kind for kind, _ in asked]
    assert kinds.count("generate_until") == 2 + 10
    assert kinds.count("loglikelihood") == 57 * 4 + 2 * (4 + 3 + 5 + 4) + 2 * 4 + 2 * 2 + 3 * 4 + 2 * 2 + 2 + 20 * 112
    tokenizer = SpdLM(spd.load(folders["qwen2 of bytes"])).tokenizer
    assert type(tokenizer).__name__.startswith("Qwen2Tokenizer")
    lengths = [len(tokenizer(arguments[0])["input_ids"]) for _, arguments in asked]
    assert min(lengths) < 10
    assert max(lengths) > CONTEXT


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("name", MODELS)
def test_virtual_ranks_answer_as_lm_evals_own_model(
    folders: dict[str, Path], asked: Asked, name: str, batch_size: int
) -> None:
    own = HFLM(pretrained=str(folders[name]), device="cpu", dtype="float32", batch_size=batch_size)
    ours = SpdLM(spd.load(folders[name], tp_size=4 if "qwen2" in name else 8), batch_size=batch_size)
    bos = [len(model.tok_encode("word1", add_special_tokens=None)) for model in (ours, own)]
    assert bos == [2, 2] if "with BOS" in name else [bos[0]] * 2
    expected = answers(own, asked)
    assert any(answer[1] for answer in expected if isinstance(answer, list))
    assert sum(bool(answer) for answer in expected if isinstance(answer, str)) >= 10
    check(answers(ours, asked), expected)


@pytest.mark.parametrize("add_bos_token", [True, False])
@pytest.mark.parametrize("name", ["llama with BOS", "llama without BOS"])
def test_a_bos_is_added_or_left_out_as_by_lm_evals_own_model(
    folders: dict[str, Path], asked: Asked, name: str, add_bos_token: bool
) -> None:
    some = asked[:: len(asked) // 60] + [one for one in asked if one[0] != "loglikelihood"]
    options: dict[str, Any] = {"add_bos_token": add_bos_token, "batch_size": 4}
    own = HFLM(pretrained=str(folders[name]), device="cpu", dtype="float32", **options)
    check(answers(SpdLM(spd.load(folders[name], tp_size=2), **options), some), answers(own, some))


def test_two_processes_answer_as_lm_evals_own_model(folders: dict[str, Path], asked: Asked) -> None:
    chosen = ("llama with BOS", "opt without BOS", "qwen2 of bytes")
    arguments = {"folders": {name: str(folders[name]) for name in chosen}, "asked": asked}
    found = run_ranks("tests.rank_checks:answer", arguments, tp_size=2, timeout_s=200)
    for name, by_batch in found.items():
        for batch_size, ours in by_batch.items():
            own = HFLM(pretrained=str(folders[name]), device="cpu", dtype="float32", batch_size=int(batch_size))
            for rank in ours:
                check(rank, answers(own, asked))
