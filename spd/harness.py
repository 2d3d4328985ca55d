"""The lm-eval model `spd`: a TensorParallelLM behind lm-eval's own Hugging Face class.

    lm_eval --model spd --model_args pretrained=<folder>,tp_size=8,plan=plan.json --tasks arc_easy

With virtual ranks one process answers. With `ranks=processes`, under torchrun, all ranks answer the same requests in
lock-step.

Legend: B batch, T tokens, V vocabulary.
"""

import copy
import difflib
import inspect
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from tqdm import tqdm
from transformers import LogitsProcessorList

from spd.answers import Answers
from spd.checkpoint import read_tokenizer
from spd.errors import UserError
from spd.launch import Progress
from spd.loading import load
from spd.model import TensorParallelLM
from spd.plan import DropPlan
from spd.ranks import VirtualRanks
from spd.strategies.recovery import apply


@register_model("spd")
class SpdLM(HFLM):
    """A TensorParallelLM as an lm-eval model.

    Given a model object, lm-eval's class sees rank 0 of 1 on every process, so that all ranks get the same requests:
    what tensor parallelism needs.

    Args:
        pretrained: the model, or what `spd.load` loads: a folder or hub id.
        tp_size, ranks, dtype, device: as for `spd.load`.
        plan: file of a zero-shot plan to apply. Treated blocks come with a folder that `save_pretrained` wrote.
        batch_size: sequences at a time, formed by length; "auto" takes the largest that fits in memory (virtual ranks).
        max_batch_size: where "auto" begins.
        max_length, add_bos_token, prefix_token_id: as for lm-eval's `hf`.
        answers: folder in which answers are kept as they come, under what determines them, and looked for: an
            evaluation that was stopped goes on where it was. None remembers nothing.
        on_progress: called with (requests answered, requests known of); by default lm-eval shows its own bars.

    Raises:
        UserError: as `spd.load`; an argument that is missing, not known, of the wrong type or given beside a model that
            has its own; a plan that treats blocks; batch_size=auto with ranks=processes; several processes that would
            each evaluate the whole model; lm-eval's own request cache.
    """

    def __init__(
        self,
        pretrained: str | TensorParallelLM | None = None,
        tp_size: int | None = None,
        plan: str | None = None,
        ranks: str = "virtual",
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int = 64,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        answers: Answers | str | Path | None = None,
        on_progress: Progress | None = None,
        **unknown: Any,
    ) -> None:
        _check_arguments(
            unknown, pretrained=pretrained, tp_size=tp_size, plan=plan, ranks=ranks, dtype=dtype, device=device,
            batch_size=batch_size, max_batch_size=max_batch_size, max_length=max_length, add_bos_token=add_bos_token,
            prefix_token_id=prefix_token_id, answers=answers,
        )  # fmt: skip
        kept = answers if answers is None or isinstance(answers, Answers) else Answers(answers)
        if isinstance(pretrained, TensorParallelLM):
            model = pretrained
        else:
            given = DropPlan.load(plan) if plan else None
            if given and set(given.treatment.values()) - {"zs"}:
                raise UserError(
                    f"{plan} treats blocks ({given.strategy}), which takes calibration data; apply it with spd.apply, "
                    "save the model with save_pretrained and give that folder as pretrained."
                )
            if str(device).startswith("cuda") and not torch.cuda.is_available():
                logging.getLogger(__name__).warning("torch sees no GPU here: the CPU evaluates instead of %s.", device)
                device = None  # lm-eval's command says cuda where nothing was asked for
            assert pretrained is not None
            size = given.tp_size if tp_size is None and given else tp_size
            model = load(pretrained, size, ranks, None if dtype == "auto" else dtype, device)
            if given:
                apply(model, given)
        self.virtual = isinstance(model.ranks, VirtualRanks)
        if not self.virtual:
            _check_agreed(batch_size)
        # lm-eval may give it a padding token, and the model's own is the user's.
        own = copy.deepcopy(model.tokenizer)
        super().__init__(
            pretrained=model.hf,
            tokenizer=own if add_bos_token is None else read_tokenizer(model.folder, add_bos_token=add_bos_token),
            batch_size=batch_size,
            max_batch_size=max_batch_size,
            max_length=max_length,
            add_bos_token=add_bos_token,
            prefix_token_id=prefix_token_id,
        )
        self.tensor_parallel = model
        self.answers, self.on_progress = kept, on_progress
        if kept is not None:
            _ = model.fingerprint  # by every rank here: rank 0 would keep the others waiting
        self._reading = {
            "max_length": self.max_length,
            "add_bos_token": self.add_bos_token,
            "prefix_token_id": self.prefix_token_id,
        }
        self.cache_hook = self
        self._done = self._total = 0
        self._one_bar = False  # whether lm-eval is not to show one for each call

    def add_partial(self, method: str, args: Any, answer: Any) -> None:
        """Takes an answer as soon as it is there: this model stands where lm-eval's request cache would."""
        if self.answers is not None and self._first:
            self.answers.add(method, args, answer)
        self._done += 1
        if self.on_progress:
            self.on_progress(self._done, self._total)

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Refuses lm-eval's request cache, which does not know of plans and differs between ranks."""
        raise UserError("--use_cache would serve another plan's answers; write answers=<folder> in --model_args.")

    @property
    def _first(self) -> bool:
        return 0 in self.tensor_parallel.ranks.local

    def _quiet(self, disable_tqdm: bool) -> bool:
        return disable_tqdm or self.on_progress is not None or self._one_bar or not self._first

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        quiet = self._quiet(disable_tqdm)
        return self._answer(requests, lambda rest: super(SpdLM, self).loglikelihood(rest, disable_tqdm=quiet))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        bar = tqdm(desc="Running loglikelihood_rolling requests", disable=self._quiet(disable_tqdm))

        def by_batches(rest: list[Instance]) -> list[float]:
            # lm-eval tells of these answers only when it has all that it was asked for; so it is asked for a batch of
            # texts, of about a length, at a time.
            before: int | str = self.batch_size
            found = [0.0] * len(rest)
            size = self._detect_batch_size() if before == "auto" else int(before)
            order = sorted(range(len(rest)), key=lambda i: -len(rest[i].args[0]))
            bar.reset(len(rest))
            self.batch_size_per_gpu, self._one_bar = size, True
            try:
                for start in range(0, len(rest), size):
                    batch = order[start : start + size]
                    answers = super(SpdLM, self).loglikelihood_rolling([rest[i] for i in batch], disable_tqdm=True)
                    for i, answer in zip(batch, answers, strict=True):
                        found[i] = answer
                    bar.update(len(batch))
            finally:
                self.batch_size_per_gpu, self._one_bar = before, False
            return found

        with bar:
            return self._answer(requests, by_batches)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        quiet = self._quiet(disable_tqdm)
        longest = max((normalize_gen_kwargs(r.args[1], self.max_gen_toks)["max_gen_toks"] for r in requests), default=0)
        if longest >= self.max_length:
            raise UserError(
                f"Up to {longest} tokens are to be generated, and the model takes {self.max_length}, prompt included; "
                "ask for fewer (max_gen_toks), or take a model with a longer context."
            )
        return self._answer(requests, lambda rest: super(SpdLM, self).generate_until(rest, disable_tqdm=quiet))

    def _answer(self, requests: list[Instance], compute: Callable[[list[Instance]], Sequence[Any]]) -> list[Any]:
        """Answers to the requests, those computed that are not known."""
        known: list[Any] = [None] * len(requests)
        if self.answers is not None:
            # Rank 0 knows what was answered: the ranks must not differ in what they compute.
            if self._first:
                self.answers.open(self.tensor_parallel, **self._reading)
                known = [self.answers.find(request) for request in requests]
            known = self.tensor_parallel.ranks.of_first(known)
        rest = [request for request, answer in zip(requests, known, strict=True) if answer is None]
        self._total += len(rest)
        fresh = iter(compute(rest) if rest else [])
        every = (next(fresh) if answer is None else answer for answer in known)
        return [tuple(answer) if isinstance(answer, list) else answer for answer in every]

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            raise UserError(
                f"A continuation to be scored has {longest} tokens and the model takes {self.max_length}; lm-eval cuts "
                "what comes before it, never the continuation itself."
            )
        return super()._loglikelihood_tokens(requests, self._quiet(disable_tqdm), override_bs)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] of right-padded ids [B, T]; attention is causal, so padding changes nothing before it."""
        return self.tensor_parallel(inps)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        if not self.virtual:
            # So that a tie, or a rounding, cannot split the ranks.
            same = self.tensor_parallel.ranks.of_first
            options["logits_processor"] = LogitsProcessorList([lambda _, scores: same(scores.contiguous())])
        return super()._model_generate(context, max_length, stop, **options)


def _check_arguments(unknown: dict[str, Any], **given: Any) -> None:
    """Raises UserError for model arguments that cannot be, before a model is loaded; lm-eval's command takes any."""
    known = [name for name in inspect.signature(SpdLM.__init__).parameters if name not in ("self", "unknown")]
    for name in unknown:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(known)}."
        raise UserError(f"The model spd takes no {name}; {hint}")
    if given["pretrained"] is None:
        raise UserError("The model spd needs pretrained=<folder or hub id>.")
    for name in ("tp_size", "max_batch_size", "max_length"):
        if given[name] is not None and not _is_whole(given[name], least=1):
            raise UserError(f"{name}={given[name]} is not possible; give 1 or more.")
    if not (_is_whole(size := given["batch_size"], least=1) or re.fullmatch(r"auto(:\d+)?|[1-9]\d*", str(size))):
        raise UserError(f"batch_size={size} is not possible; give 1 or more, or auto.")
    if not isinstance(given["add_bos_token"], bool | None):
        raise UserError(f"add_bos_token={given['add_bos_token']} is not possible; give True or False.")
    if given["prefix_token_id"] is not None and not _is_whole(given["prefix_token_id"], least=0):
        raise UserError(f"prefix_token_id={given['prefix_token_id']} is no id of a token; give 0 or more.")
    for name in ("pretrained", "answers"):
        if not isinstance(value := given[name], TensorParallelLM | Answers | str | Path | None):
            raise UserError(f"{name}={value} is no folder; give its path, ./{value} for instance.")
    if isinstance(given["pretrained"], TensorParallelLM):
        if beside := [name for name in ("tp_size", "plan", "dtype", "device") if given[name] is not None]:
            raise UserError(f"{' and '.join(beside)} cannot be given beside a model, which has its own.")
    elif given["ranks"] == "processes":
        _check_agreed(size)
    elif (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise UserError(
            f"Each of {processes} processes would evaluate the whole model; write ranks=processes, or start one alone."
        )


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check_agreed(batch_size: int | str) -> None:
    if str(batch_size).startswith("auto"):
        raise UserError("batch_size=auto is found by each rank for itself, and real ranks must agree; give a number.")
