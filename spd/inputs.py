"""What a point reads, checked before any work: checkpoint, texts, and how they fit its settings."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spd import checkpoint
from spd.checkpoint import Checkpoint, read_config, read_tokenizer
from spd.config import Device, LatencyKind, RunConfig, Strategy, find_path, need_path
from spd.data import count_tokens, load_samples
from spd.errors import UserError
from spd.families import family_of
from spd.launch import check_port
from spd.plan import PLAN_FILE, DropPlan
from spd.results import digest, file_digest
from spd.sharding import check_tp_size


def check(config: RunConfig, here: bool = True) -> None:
    """Everything about a point that can be refused before any work, beyond the configuration itself.

    Args:
        here: whether the point will run on this machine; if not, its port and device are not looked at.

    Raises:
        UserError: the checkpoint is incomplete or cut short, its family unknown, tp_size does not cut it evenly or is
            not that of the plan in it, a text is empty or shorter than a sequence, a sequence too long for the model,
            the port taken, or the device not there.
    """
    folder = checkpoint.resolve(find_path(config.model.path) or config.model.path)
    hf = read_config(folder)
    tp_size = config.parallel.tp_size
    check_tp_size(family_of(hf), hf, tp_size)
    Checkpoint(folder)  # opens every weight file, reads headers only
    if (folder / PLAN_FILE).is_file():
        plan = DropPlan.load(folder / PLAN_FILE)
        if plan.tp_size != tp_size:
            raise UserError(
                f"{folder} was saved with a plan for tp_size={plan.tp_size}, and parallel.tp_size={tp_size}; "
                f"write parallel.tp_size={plan.tp_size}, or give the original checkpoint."
            )
        if plan.outcomes:
            raise UserError(
                f"Block {min(plan.outcomes)} of {folder} was treated already ({plan.strategy}); "
                "give the original checkpoint."
            )
    lengths = {"data.sequence_length": config.data.sequence_length}
    if config.latency.name is not LatencyKind.none:
        both = config.latency.prompt_length + config.latency.new_tokens
        lengths["latency.prompt_length + latency.new_tokens"] = both
    for setting, length in lengths.items():
        if length > (hf.max_position_embeddings or length):
            most = hf.max_position_embeddings
            raise UserError(f"{setting} is {length}, and {folder} takes {most} positions; give at most {most}.")
    if here and config.latency.name is not LatencyKind.none:
        check_port(config.parallel.port)
    if here and config.model.device is Device.cuda and not torch.cuda.is_available():
        raise UserError("model.device=cuda but torch sees no GPU here; write model.device=cpu.")
    tokenizer = read_tokenizer(folder)
    for setting in ("path", "heldout_path"):
        samples_of(config, setting, tokenizer)
    if config.strategy.name is not Strategy.zs and config.drop > 0:
        _check_recovery_text(config, tokenizer)


def _check_recovery_text(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError where the windows of the calibration text would overlap: the held-out ones could not judge."""
    data = config.data
    needed = data.recovery_samples * data.sequence_length
    tokens = count_tokens(need_path(data.path, "data.path"), tokenizer)
    if tokens < needed:
        raise UserError(
            f"{data.path} has {tokens} tokens, too few for data.recovery_samples={data.recovery_samples} of "
            f"data.sequence_length={data.sequence_length} that do not overlap; give a longer text or at most "
            f"data.recovery_samples={tokens // data.sequence_length}."
        )


def file_digests(config: RunConfig, folder: Path) -> dict[str, str | None]:
    """Hashes of the files a point reads, in the place of their paths: moved files are the same files."""
    texts = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".txt", ".model", ".jinja"))
    tasks = config.eval.include_path if config.eval.tasks else None
    return {
        "tokenizer": digest([file_digest(file) for file in texts]),
        "calibration": _text_digest(need_path(config.data.path, "data.path")),
        "heldout": _text_digest(need_path(config.data.heldout_path, "data.heldout_path")),
        "tasks": file_digest(need_path(tasks, "eval.include_path")) if tasks else None,
    }


def _text_digest(file: Path) -> str:
    return digest([file.suffix, file_digest(file)])  # .jsonl is read in another way than the same bytes as .txt


def samples_of(
    config: RunConfig, setting: str, tokenizer: PreTrainedTokenizerBase, samples: int | None = None
) -> Tensor:
    """Token ids [samples, sequence_length] of the text that `data.<setting>` names; by default `data.samples`."""
    data = config.data
    path = need_path(getattr(data, setting), f"data.{setting}")
    return load_samples(path, tokenizer, samples or data.samples, data.sequence_length, config.seed)
