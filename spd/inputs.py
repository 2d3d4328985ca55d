"""What a point reads, checked before any work: checkpoint, texts, and how they fit its settings."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from spd import checkpoint
from spd.checkpoint import Checkpoint, read_architecture, read_config, read_tokenizer
from spd.config import Device, LatencyKind, RunConfig, Strategy, Weights
from spd.data import draw_samples, read_documents, tokenize
from spd.errors import UserError
from spd.families import family_of
from spd.gpu.latency import Shape, check_engine, check_gpus, gpus
from spd.hub import read_text
from spd.launch import check_port
from spd.paths import find_path, need_path
from spd.plan import PLAN_FILE, DropPlan
from spd.results import digest, file_digest, texts_digest
from spd.sharding import check_tp_size

if TYPE_CHECKING:
    from spd.tasks import Asked


def check(config: RunConfig, here: bool = True) -> None:
    """Everything about a point that can be refused before any work, beyond the configuration itself.

    Args:
        here: whether the point will run on this machine; if not, its port and device are not looked at.

    Raises:
        UserError: the checkpoint is incomplete or cut short, its family unknown, tp_size does not cut it evenly or is
            not that of the plan in it, a text is empty or shorter than a sequence, a sequence too long for the model,
            the port taken, the device or a rank's GPU not there, or a task unknown, without its data, packages, score
            or examples, or with answers longer than the model takes.
    """
    if here and config.latency.name is LatencyKind.gpu:
        check_gpus(config.parallel.tp_size)
    if config.weights is Weights.random:
        hf = read_architecture(config.model.architecture)
        check_tp_size(family_of(hf), hf, config.parallel.tp_size)
        _check_lengths(_latency_lengths(config), hf, config.model.name)
        _check_engine(config, hf, here)
        if here:
            check_port(config.parallel.port)
        return
    folder = checkpoint.resolve(find_path(config.model.path) or config.model.path)
    hf = read_config(folder)
    tp_size = config.parallel.tp_size
    check_tp_size(family_of(hf), hf, tp_size)
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(hf)
    # Opens every weight file, and reads headers only.
    Checkpoint(folder).expect({name: tuple(weight.shape) for name, weight in whole.named_parameters()})
    if (folder / PLAN_FILE).is_file():
        plan = DropPlan.load(folder / PLAN_FILE)
        if plan.dropped and plan.tp_size != tp_size:
            raise UserError(
                f"{folder} was saved with a plan for tp_size={plan.tp_size}, and parallel.tp_size={tp_size}; "
                f"write parallel.tp_size={plan.tp_size}, or give the original checkpoint."
            )
        if plan.outcomes:
            raise UserError(
                f"Block {min(plan.outcomes)} of {folder} was treated already ({plan.treatment[min(plan.outcomes)]}); "
                "give the original checkpoint."
            )
    lengths = {"data.sequence_length": config.data.sequence_length}
    _check_lengths(lengths | _latency_lengths(config), hf, str(folder))
    if config.latency.name is LatencyKind.gpu:
        _check_engine(config, hf, here)
    if here and config.latency.name is not LatencyKind.none:
        check_port(config.parallel.port)
    if here and config.model.device is Device.cuda and not torch.cuda.is_available():
        raise UserError("model.device=cuda but torch sees no GPU here; write model.device=cpu.")
    for setting in ("path", "heldout_path"):
        tokens, length = _length(config, setting, folder), config.data.sequence_length
        if 0 < (most := tokens - length + 1) < config.data.samples:
            raise UserError(
                f"{_text_name(config, setting)} has {tokens} tokens, and so {most} samples of "
                f"data.sequence_length={length}, fewer than data.samples={config.data.samples}. "
                "Give fewer, or a longer text; else some would be the same."
            )
        samples_of(config, setting, folder)
    # With corrections, which cost time, the blocks of every fraction that is timed are treated.
    timed = config.latency.drops if config.latency.name is LatencyKind.cpu else []
    drop = max([config.drop, *timed]) if "correction" in config.strategy.name.name else config.drop
    if config.strategy.name is not Strategy.zs and drop > 0:
        _check_recovery_text(config, folder)
    _check_generation(config, hf, str(folder))


def _check_engine(config: RunConfig, hf: PretrainedConfig, here: bool) -> None:
    """Of `latency=gpu`; memory only where the point will run here."""
    asked, tp_size = config.latency, config.parallel.tp_size
    check_engine(
        hf, tp_size, [Shape.of(asked)], gpus(tp_size) if here else [],
        dtype=config.model.dtype.name, new_tokens=asked.new_tokens, tp_plan=asked.tp_plan,
    )  # fmt: skip


def _latency_lengths(config: RunConfig) -> dict[str, int]:
    """What the latency measurement takes of the model's positions, by the settings that say so."""
    settings = config.latency
    if settings.name is LatencyKind.none:
        return {}
    if settings.name is LatencyKind.gpu and settings.decode_at is not None:
        return {
            "latency.prompt_length": settings.prompt_length,
            "latency.decode_at + latency.new_tokens": settings.decode_at + settings.new_tokens,
        }
    return {"latency.prompt_length + latency.new_tokens": settings.prompt_length + settings.new_tokens}


def _check_lengths(lengths: dict[str, int], hf: PretrainedConfig, model: str) -> None:
    for setting, length in lengths.items():
        most = hf.max_position_embeddings
        if length > (most or length):
            raise UserError(f"{setting} is {length}, and {model} takes {most} positions; give at most {most}.")


def _length(config: RunConfig, setting: str, folder: Path) -> int:
    """Tokens in the text of a setting."""
    return len(_tokens(_documents(config, setting), folder, texts_digest(folder)))


def _check_recovery_text(config: RunConfig, folder: Path) -> None:
    """Raises UserError where the windows of the calibration text would overlap: the held-out ones could not judge."""
    data = config.data
    needed = data.recovery_samples * data.sequence_length
    tokens = _length(config, "path", folder)
    if tokens < needed:
        raise UserError(
            f"{_text_name(config, 'path')} has {tokens} tokens, too few for data.recovery_samples="
            f"{data.recovery_samples} of data.sequence_length={data.sequence_length} that do not overlap; give a "
            f"longer text or at most data.recovery_samples={tokens // data.sequence_length}."
        )


def file_digests(config: RunConfig, folder: Path) -> dict[str, str | None]:
    """Hashes of the files a point reads, in the place of their paths: moved files are the same files."""
    return {
        "tokenizer": texts_digest(folder),
        "calibration": _text_digest(config, "path"),
        "heldout": _text_digest(config, "heldout_path"),
        "tasks": _tasks_digest(config),
    }


def _asked(config: RunConfig) -> "Asked | None":
    """What there is to know of the tasks; None where there are none."""
    settings = config.eval
    if not settings.tasks:
        return None
    from spd.tasks import look_at  # imports lm-eval: slow, and not needed where no task is asked for

    include = optional_path(settings.include_path, "eval.include_path")
    root = optional_path(settings.data_root, "eval.data_root")
    return look_at(tuple(settings.tasks), include, root, settings.num_fewshot)


def _tasks_digest(config: RunConfig) -> str | None:
    """Of the tasks' rows, and of the folder that defines them (lm-eval's own definitions go with its version)."""
    asked, include = _asked(config), optional_path(config.eval.include_path, "eval.include_path")
    return None if asked is None else digest([asked.digest, file_digest(include) if include else None])


def _check_generation(config: RunConfig, hf: PretrainedConfig, model: str) -> None:
    """Raises UserError where a task's answers are longer than what the model takes."""
    asked = _asked(config)
    if asked is None:
        return
    tokens, task = asked.longest
    if tokens >= hf.max_position_embeddings:
        raise UserError(
            f"The task {task} has answers of up to {tokens} tokens generated, and {model} takes "
            f"{hf.max_position_embeddings} positions, prompt included; leave the task out, or give another model."
        )


def _text_digest(config: RunConfig, setting: str) -> str:
    if config.data.dataset is not None:
        return digest(_documents(config, setting))
    file = need_path(getattr(config.data, setting), f"data.{setting}")
    return digest([file.suffix, file_digest(file)])  # .jsonl is read in another way than the same bytes as .txt


def optional_path(path: str | None, setting: str) -> Path | None:
    """`need_path` of a setting that may be null."""
    return None if path is None else need_path(path, setting)


def _split(config: RunConfig, setting: str) -> str:
    return config.data.split if setting == "path" else config.data.heldout_split


def _text_name(config: RunConfig, setting: str) -> str:
    data = config.data
    return getattr(data, setting) if data.dataset is None else f"{data.dataset} ({_split(config, setting)})"


def _documents(config: RunConfig, setting: str) -> tuple[str, ...]:
    """The documents of the text that `data.<setting>` names, or of the data set's split in its place."""
    data = config.data
    if data.dataset is None:
        return tuple(read_documents(need_path(getattr(data, setting), f"data.{setting}")))
    root = optional_path(data.data_root, "data.data_root")
    return (read_text(data.dataset, data.dataset_config, _split(config, setting), root, "data.data_root"),)


@functools.lru_cache(maxsize=4)  # millions of tokens take seconds, and every point of a sweep draws from the same
def _tokens(documents: tuple[str, ...], folder: Path, texts: str) -> Tensor:
    return tokenize(documents, read_tokenizer(folder))


def samples_of(config: RunConfig, setting: str, folder: Path, samples: int | None = None) -> Tensor:
    """Token ids [samples, sequence_length] of a text, by the tokenizer of a checkpoint.

    Args:
        setting: "path" or "heldout_path": the text that `data.<setting>` names, or the data set's split in its place.
        folder: the checkpoint.
        samples: by default `data.samples`.
    """
    tokens = _tokens(_documents(config, setting), folder, texts_digest(folder))
    number, length = samples or config.data.samples, config.data.sequence_length
    return draw_samples(tokens, _text_name(config, setting), number, length, config.seed)
