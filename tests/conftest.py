"""Small random checkpoints of every family, as Hugging Face folders with a whole-word tokenizer."""

import dataclasses
import io
import json
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from spd import point
from spd.config import RunConfig, Tracker
from spd.progress import Display
from spd.results import Record

torch.set_num_threads(1)  # the models here are too small to gain from more, and ranks share the cores
# Else what the tests start and stop would ignore it too where they run as a shell's background job.
signal.signal(signal.SIGINT, signal.default_int_handler)

WORDS = [f"word{i}" for i in range(60)]
TINY = dict(vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=8, max_position_embeddings=64)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": TINY | dict(intermediate_size=48, num_key_value_heads=8, tie_word_embeddings=False),
    "qwen2": TINY | dict(intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=True),
    "opt": TINY | dict(ffn_dim=48, word_embed_proj_dim=32, tie_word_embeddings=True, activation_function="relu"),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, and a BOS before every text."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def make_checkpoint(
    folder: Path, family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """A random model whose attention, MLP and biases all matter, saved by transformers itself."""
    torch.manual_seed(seed)
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = AutoConfig.for_model(family, **FAMILIES[family] | special | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3)
            else:
                weight.normal_(0.0, 1.5 / weight.shape[1] ** 0.5)
    model.to(dtype).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes (once) the random checkpoint of a family with the given config changes."""
    made: dict[str, Path] = {}

    def get(family: str, **changes: Any) -> Path:
        key = f"{family} {sorted(changes.items())}"
        if key not in made:
            made[key] = make_checkpoint(tmp_path_factory.mktemp(family), family, **changes)
        return made[key]

    return get


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Every family in turn."""
    return request.param


@pytest.fixture(scope="session")
def tiny_llama(checkpoint: Callable[..., Path]) -> Path:
    """A LLaMA of 3 blocks and 8 heads."""
    return checkpoint("llama")


@pytest.fixture(scope="session")
def tiny_opt(checkpoint: Callable[..., Path]) -> Path:
    """An OPT of 3 blocks and 8 heads, with biases everywhere."""
    return checkpoint("opt")


@pytest.fixture(scope="session")
def tiny_qwen2(checkpoint: Callable[..., Path]) -> Path:
    """A Qwen2 of 3 blocks, 8 heads and 2 key/value heads."""
    return checkpoint("qwen2")


@pytest.fixture
def input_ids() -> torch.Tensor:
    """Random token ids [2, 11]."""
    return torch.randint(4, 64, (2, 11), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def config(tiny_llama: Path, tmp_path: Path) -> RunConfig:
    """A point of the tiny model: half of its blocks dropped, perplexity only."""
    words = random.Random(0)
    for name in ("calibration", "heldout"):
        lines = (" ".join(words.choice(WORDS) for _ in range(20)) for _ in range(30))
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    config = RunConfig(drop=0.5, output_dir=str(tmp_path / "runs"))
    config.model.path = str(tiny_llama)
    config.model.name = "tiny"
    config.data.path = str(tmp_path / "calibration.txt")
    config.data.heldout_path = str(tmp_path / "heldout.txt")
    config.data.samples, config.data.sequence_length = 3, 16
    config.tracker.name = Tracker.none
    return config


@pytest.fixture
def own_model(config: RunConfig, tmp_path: Path) -> Path:
    """The tiny model in a folder that a test may change."""
    folder = shutil.copytree(config.model.path, tmp_path / "own_model")
    config.model.path = str(folder)
    return folder


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a multiple-choice task, a last-word task and a generation task of 24 invented items each."""
    folder, rng = tmp_path_factory.mktemp("tasks"), random.Random(0)

    def words(n: int) -> str:
        return " ".join(f"word{rng.randrange(60)}" for _ in range(n))

    items = [
        {"text": words(rng.randint(3, 30)), "choices": [words(rng.randint(1, 5)) for _ in range(4)], "gold": i % 4}
        for i in range(24)
    ]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "items.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{text}}",
    }
    choice = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}"}
    last = {"output_type": "loglikelihood", "doc_to_target": " {{choices[0]}}"}
    summary = {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["word7"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match"}],
    }
    for name, fields in {"toy_choice": choice, "toy_last": last, "toy_summary": summary}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | common | fields))
    return folder


@pytest.fixture
def output() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def run(output: io.StringIO) -> Callable[[RunConfig], Record]:
    def run(config: RunConfig) -> Record:
        with Display("point", Console(file=output, soft_wrap=True)) as display:
            return point.run_point(config, display)

    return run


def with_drop(config: RunConfig, drop: float) -> RunConfig:
    return dataclasses.replace(config, drop=drop)
