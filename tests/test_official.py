"""lm-eval's own benchmarks and WikiText-2, from small invented data in the official schemas."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import official
import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from rich.console import Console
from transformers import AutoModelForCausalLM

import spd
from spd import inputs, point, steps
from spd.config import RunConfig
from spd.errors import UserError
from spd.evaluation import evaluate
from spd.harness import SpdLM
from spd.hub import read_text
from spd.paths import ROOT
from spd.perplexity import perplexity
from spd.progress import Display
from spd.steps import Steps
from spd.tasks import _own_index, load_for_command, look_at, task_manager

ZERO_SHOT = yaml.safe_load((ROOT / "conf/eval/zero_shot.yaml").read_text())["tasks"]


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No network, and no cache but this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All data of eval=zero_shot, eval=longbench and data=wikitext2."""
    root = official.zero_shot(tmp_path_factory.mktemp("data"))
    official.write(root, "Xnhyacinth/LongBench", official.longbench(), "jsonl")
    official.write(root, "Salesforce/wikitext", official.wikitext())
    return root


@pytest.fixture
def own_root(data_root: Path, tmp_path: Path) -> Path:
    """The same in a folder that a test may change."""
    return shutil.copytree(data_root, tmp_path / "own_data")


def test_zero_shot_scores_are_those_of_lm_evals_own_model_and_tasks(
    tiny_llama: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = evaluate(spd.load(tiny_llama, tp_size=2), ZERO_SHOT, data_root=data_root, num_fewshot=0)
    monkeypatch.chdir(data_root)  # where lm-eval itself finds them by their names
    own = simple_evaluate(
        model=HFLM(pretrained=str(tiny_llama), device="cpu", dtype="float32", batch_size=32),
        tasks=ZERO_SHOT,
        task_manager=_own_index(),
        num_fewshot=0,
        bootstrap_iters=0,
    )["results"]
    assert list(ours["tasks"]) == ZERO_SHOT
    for name, score in ours["tasks"].items():
        assert score["metric"] == "acc"
        assert score["value"] == own[name]["acc,none"]
    assert ours["mean"]["value"] == pytest.approx(sum(own[name]["acc,none"] for name in ZERO_SHOT) / 7)


def test_the_rows_of_the_official_schemas_are_read_as_their_tasks_mean_them(data_root: Path) -> None:
    tasks = task_manager(ZERO_SHOT, data_root=data_root).load(ZERO_SHOT)["tasks"]

    def shown(name: str, row: int) -> tuple[str, Any, Any]:
        task, doc = tasks[name], list(tasks[name].eval_docs)[row]
        return (
            task.doc_to_text(doc),
            task.doc_to_choice(doc) if name != "lambada_openai" else None,
            task.doc_to_target(doc),
        )

    arc = [shown("arc_easy", row) for row in range(4)]
    assert [len(choices) for _, choices, _ in arc] == [4, 3, 5, 4]
    assert [int(target) for _, _, target in arc] == [1, 2, 4, 3]  # the last one's labels are 1 to 4
    text, endings, _ = shown("hellaswag", 0)
    assert text == "Removing ice from car: How to word1. word2"  # ctx_b is empty
    assert endings[0] == " word1. word2"
    assert endings[2] == "ünïcödé word5"
    assert shown("sciq", 0)[0] == "\nQuestion: What is word9 ?\nAnswer:"
    assert shown("sciq", 1)[0].startswith("word9 word8")
    assert shown("winogrande", 0)[2] == "was kind ."
    assert shown("lambada_openai", 0)[0::2] == ("word1 word2 “word3”", " word4")


def test_all_subjects_of_mmlu_are_asked_after_five_examples(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subjects, settings = official.mmlu_subjects(), yaml.safe_load((ROOT / "conf/eval/mmlu.yaml").read_text())
    official.write(tmp_path, "cais/mmlu", official.mmlu(subjects))
    model = spd.load(tiny_llama, tp_size=2)
    asked = {"num_fewshot": settings["num_fewshot"], "batch_size": settings["batch_size"]}
    shown: list[int] = []
    answer = SpdLM.loglikelihood

    def counted(self: SpdLM, requests: list, **options: Any) -> list:
        shown.extend(request.args[0].count("Answer:") for request in requests)
        return answer(self, requests, **options)

    monkeypatch.setattr(SpdLM, "loglikelihood", counted)
    score = evaluate(model, settings["tasks"], data_root=tmp_path, limit=2, **asked)["tasks"]["mmlu"]
    assert set(shown) == {5 + 1}
    assert (len(subjects), score["items"], score["metric"]) == (57, 114, "acc")
    assert score["stderr"] is not None


def test_a_long_document_is_summarised_and_scored_by_rouge(checkpoint: Callable[..., Path], data_root: Path) -> None:
    for package in ("rouge", "jieba", "fuzzywuzzy"):
        pytest.importorskip(package)
    folder = checkpoint("llama", max_position_embeddings=600)  # 512 of them are for the summary
    scores = evaluate(spd.load(folder, tp_size=2), ["longbench_multi_news"], data_root=data_root, limit=1, batch_size=1)
    score = scores["tasks"]["longbench_multi_news"]
    assert (score["metric"], score["items"]) == ("rouge_score", 1)
    assert 0 <= score["value"] <= 1


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "lm_eval.tasks.longbench.metrics", raising=False)
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(UserError, match=r"longbench_multi_news needs .*jieba.*pip install -e '\.\[longbench\]'"):
        look_at(("longbench_multi_news",), None, data_root, None)


def never(*args: Any, **options: Any) -> None:
    raise AssertionError("a model was loaded")


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda root: shutil.rmtree(root / "allenai/sciq"), r"allenai/sciq is not in eval\.data_root=.*README"),
        (lambda root: official.write(root, "allenai/sciq", {"default": {}}), "data set allenai/sciq cannot be read"),
        (
            lambda root: official.write(
                root, "allenai/sciq", {"default": {"validation": official.sciq()["default"]["test"]}}
            ),
            "sciq.*data set allenai/sciq.*README",
        ),
        (lambda root: official.write(root, "allenai/sciq", {"default": official.piqa()["default"]}), "sciq.*README"),
    ],
)
def test_missing_data_are_told_before_a_model_is_loaded(
    config: RunConfig, own_root: Path, break_it: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "load", never)
    shutil.rmtree(own_root / "allenai/sciq/default")
    break_it(own_root)
    config.eval.tasks, config.eval.data_root = ["sciq"], str(own_root)
    with pytest.raises(UserError, match=said) as refused:
        inputs.check(config)
    assert "\n" not in str(refused.value)
    assert "together" not in str(refused.value)
    with Display("point", Console(quiet=True)) as display:
        record = point.run_point(config, display)
    assert (record["status"], record["error"]) == ("failed", str(refused.value))


def test_readme_names_every_data_set_of_the_official_evaluations(data_root: Path) -> None:
    tasks = [*ZERO_SHOT, *yaml.safe_load((ROOT / "conf/eval/longbench.yaml").read_text())["tasks"]]
    loaded = task_manager(tasks, data_root=data_root).load(tasks)["tasks"].values()
    names = {str(Path(task.config.dataset_path).relative_to(data_root)) for task in loaded}
    names |= {"cais/mmlu", yaml.safe_load((ROOT / "conf/data/wikitext2.yaml").read_text())["dataset"]}
    listed = (ROOT / "README.md").read_text().split("for name in ")[1].split("; do")[0]
    assert set(listed.replace("\\", " ").split()) == names


def sciq_of(root: Path, rows: int) -> Path:
    found = official.sciq()["default"]["test"][:rows]
    official.write(root, "allenai/sciq", {"default": official.thrice(found)})
    return root


def test_a_folder_here_of_a_data_sets_name_is_not_read_in_place_of_data_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sciq_of(tmp_path / "here", 1))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"allenai/sciq is not in eval\.data_root=.*empty"):
        look_at(("sciq",), None, tmp_path / "empty", 0)
    for root, rows in ((sciq_of(tmp_path / "there", 2), 2), (None, 1)):
        loaded = task_manager(["sciq"], data_root=root).load(["sciq"])["tasks"]["sciq"]
        assert len(loaded.eval_docs) == rows


def test_lm_evals_command_reads_the_folder_that_it_is_started_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `datasets` alone would serve the rows that it has cached of the other folder.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, rows in (("one", 1), ("two", 2), ("three", 3)):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.chdir(sciq_of(tmp_path / name, rows))
        load_for_command(_own_index(), ["sciq"])
        assert len(_own_index().load(["sciq"])["tasks"]["sciq"].eval_docs) == rows


def test_a_split_without_rows_is_said(tmp_path: Path) -> None:
    rows = official.sciq()["default"]["test"]
    official.write(tmp_path, "allenai/sciq", {"default": {"train": [], "validation": rows, "test": rows}}, "jsonl")
    with pytest.raises(UserError, match=r"allenai/sciq cannot be read from .*one of its splits has no rows"):
        look_at(("sciq",), None, tmp_path, 0)


def test_a_config_that_is_missing_is_named(own_root: Path) -> None:
    official.write(own_root, "allenai/ai2_arc", {"ARC-Easy": official.arc()["ARC-Easy"]})
    look_at(("arc_easy",), None, own_root, 0)
    with pytest.raises(UserError, match=r"arc_challenge \(ARC-Challenge\).*allenai/ai2_arc"):
        look_at(("arc_challenge",), None, own_root, 0)


def test_a_subject_of_mmlu_that_is_missing_is_named_in_a_line(config: RunConfig, tmp_path: Path) -> None:
    official.write(tmp_path, "cais/mmlu", official.mmlu(official.mmlu_subjects()[1:]))
    config.eval.tasks, config.eval.data_root = ["mmlu"], str(tmp_path)
    with pytest.raises(UserError, match=r"mmlu_.*data set cais/mmlu cannot be read from") as refused:
        inputs.check(config)
    assert len(str(refused.value)) < 600


def write_tasks(config: RunConfig, tmp_path: Path, data_root: Path) -> None:
    (tmp_path / "tasks").mkdir()
    for name, fields in WRITTEN.items():
        (tmp_path / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | fields))
    config.eval.include_path, config.eval.data_root = str(tmp_path / "tasks"), str(data_root)


METRIC = [{"metric": "word_perplexity", "aggregation": "weighted_perplexity"}]
OWN = {"dataset_path": "baber/piqa", "test_split": "test", "doc_to_text": "{{goal}}", "doc_to_target": "{{sol1}}"}
WRITTEN = {
    "own_rolling": OWN | {"output_type": "loglikelihood_rolling", "metric_list": METRIC},
    "own_shots": OWN | {"output_type": "loglikelihood", "fewshot_split": "train"},
    "own_text": OWN | {"output_type": "generate_until", "generation_kwargs": {"max_gen_toks": 64}},
    "own_zero": OWN | {"output_type": "loglikelihood", "fewshot_split": "train", "num_fewshot": 0},
    "own_words": OWN | {"output_type": "generate_until", "generation_kwargs": {"max_new_tokens": "8"}},
    "own_acc": {"group": "own_acc", "task": ["own_rolling"], "aggregate_metric_list": [{"metric": "acc"}]},
    "own_group": {"group": "own_group", "task": ["own_shots"]},
    "own_scored": {"group": "own_scored", "task": ["own_shots"], "aggregate_metric_list": [{"metric": "acc"}]},
}


@pytest.mark.parametrize(
    ("tasks", "shots", "said"),
    [
        (["own_rolling"], None, "'own_rolling' reports none of acc, .*, but word_perplexity; leave it out"),
        (["own_group"], None, r"'own_group' reports none of acc, .*, but nothing; name its tasks .*: \[own_shots\]"),
        (["own_shots"], 50, r"own_shots shows 50 examples before each item, and has 2; write eval\.num_fewshot=1 or"),
        (["own_acc"], None, "'own_acc' reports none of acc, .*, but nothing"),
        (["own_text"], None, "own_text has answers of up to 64 tokens generated, and .* takes 64 positions"),
        (["own_scored", "own_shots"], None, "cannot be evaluated together"),
    ],
)
def test_tasks_that_cannot_be_scored_are_told_before_any_work(
    config: RunConfig, data_root: Path, tmp_path: Path, tasks: list[str], shots: int | None, said: str
) -> None:
    write_tasks(config, tmp_path, data_root)
    config.eval.tasks, config.eval.num_fewshot = tasks, shots
    with pytest.raises(UserError, match=said):
        inputs.check(config)


@pytest.mark.parametrize(("task", "shots"), [("own_zero", 50), ("own_words", None), ("own_shots", 2)])
def test_tasks_that_lm_eval_can_score_are_not_refused(
    config: RunConfig, data_root: Path, tmp_path: Path, task: str, shots: int | None
) -> None:
    write_tasks(config, tmp_path, data_root)
    config.eval.tasks, config.eval.num_fewshot = [task], shots
    inputs.check(config)
    where = {"include_path": config.eval.include_path, "data_root": data_root, "num_fewshot": shots}
    assert evaluate(spd.load(config.model.path), [task], **where)["tasks"][task]["items"] == 2


def test_without_a_network_or_a_folder_the_hub_is_named_before_a_model_is_loaded(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "load", never)
    config.eval.tasks = ["piqa"]
    with pytest.raises(
        UserError, match=r"piqa.*baber/piqa could not be had from the Hugging Face hub.*eval\.data_root="
    ):
        inputs.check(config)
    config.eval.tasks, config.data.dataset = [], "Salesforce/wikitext"
    with pytest.raises(UserError, match=r"Salesforce/wikitext \(train\).*Hugging Face hub.*data\.data_root="):
        inputs.check(config)


def test_rows_not_places_make_the_key(config: RunConfig, data_root: Path, own_root: Path, tmp_path: Path) -> None:
    def key(root: Path) -> str:
        config.eval.tasks, config.eval.data_root = ["piqa"], str(root)
        return Steps(config, None, None).key  # type: ignore[arg-type]

    assert key(data_root) == key(own_root)
    changed = official.piqa()["default"]["test"][:1]
    official.write(tmp_path / "changed", "baber/piqa", {"default": official.thrice(changed)})
    assert key(tmp_path / "changed") != key(own_root)


def test_own_tasks_read_the_hubs_data_from_the_folder_and_their_own_from_where_they_lie(
    tiny_llama: Path, data_root: Path, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"q": "word1", "choices": ["word2", "word3"], "gold": 1}) + "\n")
    own = {
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
    }
    files = {"data_files": {"test": str(tmp_path / "rows.jsonl")}}
    of_hub = {"doc_to_text": "{{goal}}", "doc_to_choice": "{{[sol1, sol2]}}", "doc_to_target": "label"}
    written = {
        "own_rows": {"task": "own_rows", "dataset_path": "json", "dataset_kwargs": files, **own},
        "own_piqa": {"task": "own_piqa", "dataset_path": "baber/piqa", **own, **of_hub},
        "both": {
            "group": "both",
            "task": ["own_rows", {"task": "in_place", "dataset_path": "baber/piqa", **own, **of_hub}],
            "aggregate_metric_list": [{"metric": "acc"}],
        },
    }
    (tmp_path / "tasks").mkdir()
    for name, said in written.items():
        (tmp_path / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(said))
    model = spd.load(tiny_llama)
    names = ["own_piqa", "both", "sciq"]  # lm-eval's own beside those of the folder
    scores = evaluate(model, names, include_path=tmp_path / "tasks", data_root=data_root)["tasks"]
    assert [scores[name]["items"] for name in names] == [2, 3, 3]


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        (["arc_esay"], "no lm-eval task 'arc_esay'; nearest: arc_easy"),
        (["ai2_arc"], r"'ai2_arc' is a tag .* name its tasks: \[arc_challenge,arc_easy\]"),
    ],
)
def test_a_name_that_is_no_task_is_refused_with_those_that_are(config: RunConfig, tasks: list[str], said: str) -> None:
    config.eval.tasks = tasks
    with pytest.raises(UserError, match=said):
        inputs.check(config)


def test_wikitext_gives_the_calibration_and_held_out_text(config: RunConfig, data_root: Path) -> None:
    files = inputs.file_digests(config, Path(config.model.path))
    config.data.dataset, config.data.dataset_config = "Salesforce/wikitext", "wikitext-2-raw-v1"
    config.data.data_root, config.data.path, config.data.heldout_path = str(data_root), "", ""
    inputs.check(config)
    folder = Path(config.model.path)
    assert inputs.samples_of(config, "path", folder, 8).shape == (8, 16)
    digests = inputs.file_digests(config, folder)
    assert len({digests["calibration"], digests["heldout"], files["calibration"]}) == 3
    train = read_text("Salesforce/wikitext", "wikitext-2-raw-v1", "train", data_root, "data.data_root")
    assert train.startswith("\n\n = word1 = \n\n\n\n\n word2 <unk> word0")
    config.data.split = "trian"
    with pytest.raises(UserError, match=r"Salesforce/wikitext \(wikitext-2-raw-v1, trian\).*cannot be read"):
        inputs.check(config)
    config.data.split, config.data.sequence_length = "validation", 64
    config.data.heldout_split = "train"
    inputs.check(config)
    config.data.dataset_config, config.data.split = "wikitext-103-raw-v1", "train"
    with pytest.raises(UserError, match="wikitext-103"):
        inputs.check(config)


def test_wikitexts_perplexity_is_that_of_transformers_on_the_same_windows(config: RunConfig, data_root: Path) -> None:
    config.data.dataset, config.data.dataset_config = "Salesforce/wikitext", "wikitext-2-raw-v1"
    config.data.data_root, config.data.path, config.data.heldout_path = str(data_root), "", ""
    folder = Path(config.model.path)
    windows = inputs.samples_of(config, "heldout_path", folder, 8)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        losses = [theirs(ids[None], labels=ids[None]).loss for ids in windows]
    expected = torch.stack(losses).mean().exp().item()
    assert perplexity(spd.load(folder, tp_size=2, dtype="float32"), windows) == pytest.approx(expected, rel=1e-5)
