"""Prepares a model as its plan says, one block at a time.

The calibration samples go through the original model block by block: the original block's output is both the target of
the treated block and the next block's input. So beside the model as it is, memory holds two blocks in float32 (original
and treated), of the treated one also its gradients, AdamW's two moments and the best weights so far, and the samples'
activations before and after one block. The normal equations of a `shift` correction take (4 N + 15) D^2 numbers in
float64. What is made of a block depends on that block alone and can be kept (`BlockCache`) for every drop fraction and
sweep.

Legend: S samples, T tokens, D hidden size.
"""

import copy
import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from spd.block import Block
from spd.config import CorrectionConfig, CorrectionKind, DistillationConfig
from spd.errors import UserError
from spd.launch import Progress
from spd.loading import find_device
from spd.model import TensorParallelLM
from spd.plan import DropPlan
from spd.ranks import VirtualRanks
from spd.strategies import b2b, correction, head_grouping
from spd.strategies.block_cache import BlockCache, Recovered
from spd.strategies.correction import Correction

PUBLISHED_LEARNING_RATES = {"opt": 1e-6}
"""model_type -> learning rate of the distillation; 5e-5 for the others (LLaMA2 in the paper)."""

SHORT_PRODUCTS_ON = ("cuda",)
"""Devices on which matrix products of a model in a shorter type are made in bfloat16; elsewhere in float32."""


@torch.inference_mode(False)
@torch.enable_grad()
def apply(
    model: TensorParallelLM,
    plan: DropPlan,
    calibration: Tensor | None = None,
    *,
    distillation: DistillationConfig | None = None,
    corrections: CorrectionConfig | None = None,
    seed: int | None = None,
    cache: BlockCache | None = None,
    device: str | torch.device | None = None,
    on_progress: Progress | None = None,
    say: Callable[[str], None] = print,
) -> TensorParallelLM:
    """Prepares the model as the plan says, in place, and returns it.

    Args:
        model: the original model, nothing applied to it yet; virtual ranks unless the plan is zero-shot.
        plan: made for this model at this tp size.
        calibration: token ids [S, T], S >= 8; zero-shot does not need them. The last eighth is held out.
        distillation, corrections: settings; by default those that the plan was applied with before (`plan.recovery`),
            else those of `spd.config`.
        seed: of the order in which distillation sees the samples, and of searches; by default likewise, else 0.
        cache: where treated blocks are kept and looked for.
        device: where blocks are treated; by default the model's.
        on_progress: called with (steps done, steps in all).
        say: takes one sentence for the user at a time.

    Raises:
        UserError: the plan is for another model, other weights or another tp size; blocks were treated already; too
            little calibration data, or other than the plan was applied with before.
    """
    if model.outcomes:
        raise UserError(
            f"Block {min(model.outcomes)} of this model was treated already; "
            "load the original model and apply this plan to that."
        )
    before = plan.recovery or {}
    distillation = distillation or DistillationConfig(**before.get("distillation", {}))
    if corrections is None:
        corrections = CorrectionConfig(**before.get("correction", {}))
        corrections.kind = CorrectionKind(corrections.kind)
    seed = before.get("seed", 0) if seed is None else seed
    distillation.check()
    corrections.check()
    treated = {i: steps.split("+") for i, steps in plan.treatment.items() if steps != "zs"}
    if treated:
        calibration = _checked(calibration, model, plan.strategy)
    plan.check_fits(model, weights=True)
    if calibration is not None and treated:
        where = find_device(device, "virtual") if device else model.device
        work = _Recovery(model, calibration, distillation, corrections, seed, where, say)
        if before and before["calibration"] != work.settings(set())["calibration"]:
            raise UserError(
                f"This plan was applied before with other calibration samples, {before['samples']} token ids of sha256 "
                f"{before['calibration'][:12]}; give the same ones, or make a new plan."
            )
        try:
            for done, (i, steps) in enumerate(sorted(treated.items())):
                within = None if on_progress is None else _within(on_progress, done, len(treated))
                recovered = work.recovered(i, steps, cache, within)
                if recovered.outcome["kept"] == "zs":
                    model.outcomes[i] = recovered.outcome
                else:
                    fixes = recovered.corrections
                    fix = Correction(fixes).to(model.device, model.dtype) if fixes else None
                    model.recover(i, model.read_block(i, recovered.tensors, fix), recovered.outcome)
                if within:
                    within(work.distillation.epochs, work.distillation.epochs)  # also of what was cached or not trained
        except BaseException:
            model.forget()
            raise
        settings = work.settings(set().union(*treated.values()))
        plan = dataclasses.replace(plan, recovery=settings, outcomes=dict(model.outcomes))
    model.drop(plan.dropped)
    model.plan = plan
    return model


def _within(on_progress: Progress, done: int, blocks: int) -> Progress:
    """The progress of one block's epochs as a part of all blocks', of which `done` are ready."""
    return lambda epoch, epochs: on_progress(done * epochs + epoch, blocks * epochs)


def _checked(calibration: Tensor | None, model: TensorParallelLM, strategy: str) -> Tensor:
    if not isinstance(model.ranks, VirtualRanks):
        raise UserError(f"strategy={strategy} prepares a model by virtual ranks; load it with ranks='virtual'.")
    if calibration is None:
        raise UserError(f"strategy={strategy} needs calibration samples: token ids [S, T], as spd.load_samples gives.")
    if calibration.ndim != 2 or calibration.shape[0] < 8 or calibration.shape[1] < 2:
        raise UserError(
            f"Calibration samples are {list(calibration.shape)}, too little to treat blocks with and to judge the "
            "result by (an eighth is held out); give [S, T] with S >= 8 and T >= 2 (published: 128 of 2048 tokens)."
        )
    if calibration.is_floating_point() or not 0 <= calibration.min() <= calibration.max() < model.config.vocab_size:
        raise UserError(f"Calibration samples must be token ids from 0 to {model.config.vocab_size - 1}.")
    if calibration.shape[1] > (longest := model.config.max_position_embeddings):
        raise UserError(
            f"Calibration samples have {calibration.shape[1]} tokens and the model takes {longest}; give shorter ones."
        )
    train, heldout = calibration[: -_heldout(calibration)], calibration[-_heldout(calibration) :]
    if (heldout[:, None] == train[None]).all(-1).any():
        raise UserError(
            "Some of the last eighth of the calibration samples, which judges the treated blocks, are also among the "
            "others, which they are treated with; give fewer samples or a longer text."
        )
    return calibration


def _heldout(calibration: Tensor) -> int:
    """How many samples, the last ones, judge."""
    return len(calibration) // 8


class _Recovery:
    """The treatment of single blocks of one model with one set of settings."""

    def __init__(
        self,
        model: TensorParallelLM,
        calibration: Tensor,
        distillation: DistillationConfig,
        corrections: CorrectionConfig,
        seed: int,
        device: torch.device,
        say: Callable[[str], None],
    ) -> None:
        self.model, self.calibration, self.seed, self.device, self.say = model, calibration, seed, device, say
        rate = distillation.learning_rate
        if rate is None:
            rate = PUBLISHED_LEARNING_RATES.get(model.config.model_type, 5e-5)
        self.distillation = dataclasses.replace(distillation, learning_rate=rate)
        self.learning_rate, self.batch, self.corrections = rate, distillation.batch_size, corrections
        self.heldout = _heldout(calibration)
        self._inputs = self._walk()
        self._at = -1
        self._here: tuple[Tensor, Tensor, dict[str, Any], Block] | None = None

    def settings(self, steps: set[str]) -> dict[str, Any]:
        """What determines the result of these steps beside the model, and what the plan records."""
        ids = self.calibration.cpu().contiguous().numpy().tobytes()
        found: dict[str, Any] = {
            "seed": self.seed,
            "samples": list(self.calibration.shape),
            "heldout_samples": self.heldout,
            "calibration": hashlib.sha256(ids).hexdigest(),
        }
        if "b2b" in steps:
            found["distillation"] = dataclasses.asdict(self.distillation)
        if "correction" in steps:
            found["correction"] = dataclasses.asdict(self.corrections) | {"kind": self.corrections.kind.name}
        return found

    def recovered(self, i: int, steps: list[str], cache: BlockCache | None, on_epoch: Progress | None) -> Recovered:
        """Block `i` treated with the steps, from the cache if it is there."""
        parts = {
            "weights": self.model.fingerprint,
            "block": i,
            "tp_size": self.model.tp_size,
            "dtype": str(self.model.dtype),
            "steps": steps,
            "products": "bfloat16" if self._short else "float32",
            "settings": self.settings(set(steps)),
        }
        if cache is None:
            return self._treat(i, steps, on_epoch)
        with cache.lock(parts, self.say):
            found = cache.find(parts, self.say)
            if found is None:
                found = self._treat(i, steps, on_epoch)
                cache.keep(parts, found)
        return found

    def _walk(self) -> Iterator[tuple[Tensor, Tensor, dict[str, Any], Block]]:
        """For every block in turn: inputs and outputs [S, T, D] of the original one, what goes with them, the block.

        Weights, residuals and losses are float32: a shorter type would round away what the treated block is to learn.
        On a GPU the matrix products of a model in a shorter type are bfloat16.
        """
        x, inputs = self._embedded()
        for i in range(self.model.num_blocks):
            block = self.model.read_block(i, dtype=torch.float32, device=self.device)
            y = self._original_outputs(block, x, inputs)
            yield x, y, inputs, block
            x = y

    @torch.no_grad()
    def _embedded(self) -> tuple[Tensor, dict[str, Any]]:
        pieces = [self.model.embed(ids) for ids in self.calibration.to(self.model.device).split(self.batch)]
        x = torch.cat([piece for piece, _ in pieces]).to(self.device, torch.float32)
        return x, {name: _moved(value, self.device) for name, value in pieces[0][1].items()}

    @torch.no_grad()
    def _original_outputs(self, block: Block, x: Tensor, inputs: dict[str, Any]) -> Tensor:
        y = torch.empty_like(x)
        with self._autocast():
            for some, out in zip(x.split(self.batch), y.split(self.batch), strict=True):
                out.copy_(block.tp(some, block.attention(some, **inputs)))
        return y

    @property
    def _short(self) -> bool:
        return self.model.dtype is not torch.float32 and self.device.type in SHORT_PRODUCTS_ON

    def _autocast(self) -> torch.autocast:
        # Without its cache: that would go on using the weights as they were cast before the first step.
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._short, cache_enabled=False)

    def _treat(self, i: int, steps: list[str], on_epoch: Progress | None) -> Recovered:
        while self._at < i:  # blocks before it may have come from the cache
            self._here = next(self._inputs)
            self._at += 1
        assert self._here is not None
        with self._autocast():
            return self._treat_here(i, steps, on_epoch)

    def _treat_here(self, i: int, steps: list[str], on_epoch: Progress | None) -> Recovered:
        assert self._here is not None
        x, y, inputs, original = self._here
        settings, rate = self.distillation, self.learning_rate
        batch, train = self.batch, len(x) - self.heldout
        seen = self._seen(i, steps)
        if seen is not b2b.AS_IT_IS:
            y = torch.cat([seen(some) for some in y.split(batch)])
        judged = (x[train:], y[train:], inputs, batch, seen)
        losses: dict[str, float] = {"zs": b2b.block_loss(original, *judged)}
        kept: list[str] = []
        outcome: dict[str, Any] = {"loss": losses, "seconds": {}, "notes": []}
        tensors, fix = self.model.layer_tensors(original), None

        def read(tensors: dict[str, Tensor], fix: Correction | None) -> Block:
            return self.model.read_block(i, tensors, fix, dtype=torch.float32, device=self.device)

        for step in steps:
            stopped = None
            before, started = losses[kept[-1]] if kept else losses["zs"], time.perf_counter()
            if step == "hg":
                grouped, outcome["hg"] = self._group(i, original, x[:train], inputs, tensors)
                candidate, new = read(grouped, None), None
            elif step == "correction":
                new = correction.fit(read(tensors, None), x[:train], inputs, self.corrections, batch)
                candidate = read(tensors, new)
                outcome["correction"] = {"cost": new.cost()}
            else:
                candidate, new = read(tensors, fix and copy.deepcopy(fix).float()), fix
                outcome["b2b"] = b2b.distill(
                    candidate, x, y, inputs, settings, rate, self.heldout, self.seed + i, on_epoch, seen
                )
                stopped = outcome["b2b"]["stopped"]
                if stopped:
                    outcome["notes"].append(f"Distillation stopped: {stopped}.")
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            outcome["seconds"][step] = round(time.perf_counter() - started, 3)
            # Judged as it will be kept: with weights rounded to the model's type.
            rounded = {name: t.to(self.model.dtype) for name, t in self.model.layer_tensors(candidate).items()}
            if new is not None:
                new = new.to(self.model.dtype)
            losses[step] = b2b.block_loss(read(rounded, new and copy.deepcopy(new).float()), *judged)
            if step == "hg" or (not stopped and math.isfinite(losses[step]) and losses[step] < before):
                kept.append(step)
                tensors, fix = rounded, new
            else:
                outcome["notes"].append(
                    f"{step} was not kept: held-out loss {losses[step]:.4g}, {before:.4g} without it."
                )
        if kept and not losses[kept[-1]] < losses["zs"] and "b2b" in steps:
            outcome["notes"].append(
                f"Kept zero-shot: held-out loss {losses[kept[-1]]:.4g}, {losses['zs']:.4g} zero-shot."
            )
            kept, tensors, fix = [], self.model.layer_tensors(original), None
        for note in outcome["notes"]:
            self.say(f"Block {i}: {note}")
        outcome["kept"] = "+".join(kept) or "zs"
        host = {name: tensor.to("cpu", self.model.dtype).contiguous() for name, tensor in tensors.items()}
        fixes = {name: tensor.cpu() for name, tensor in fix.tensors().items()} if fix else {}
        return Recovered(host, fixes, outcome)

    def _seen(self, i: int, steps: list[str]) -> nn.Module:
        """What follows block `i`, after which its outputs are compared."""
        if i < self.model.num_blocks - 1 or "b2b" not in steps or not self.distillation.after_final_norm:
            return b2b.AS_IT_IS
        return copy.deepcopy(self.model.final_norm).to(self.device, torch.float32).requires_grad_(False)

    def _group(
        self, i: int, block: Block, x: Tensor, inputs: dict[str, Any], tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The layer's tensors with its heads grouped anew, and what that came to."""
        family, config, n = self.model.family, self.model.config, self.model.tp_size
        _, kv_heads = family.heads(config)
        batch, cut = self.batch, self.model.cut
        distances = head_grouping.head_distances(block, x, inputs, batch)
        groups = head_grouping.scatter_heads(distances, kv_heads, n, self.seed)
        scattered = head_grouping.permute_heads(tensors, groups, kv_heads, cut)
        # The groups stand in order on the ranks now, each beside the partition of its number.
        candidate = self.model.read_block(i, scattered, dtype=torch.float32, device=self.device)
        values = head_grouping.mlp_norms(candidate, x, inputs, batch)
        order = head_grouping.match(values, neighbours=max(1, n // kv_heads))
        groups = [groups[g] for g in order]
        size = len(groups[0])
        contiguous = [tuple(range(at, at + size)) for at in range(0, n * size, size)]
        random = [
            head_grouping.spread(
                distances, head_grouping.scatter_heads(distances, kv_heads, n, s, head_grouping.random_groups)
            )
            for s in range(100)
        ]
        return head_grouping.permute_heads(tensors, groups, kv_heads, cut), {
            "groups": groups,
            "spread": head_grouping.spread(distances, groups),
            "spread_contiguous": head_grouping.spread(distances, contiguous),
            "spread_random": sum(random) / len(random),
            "norms": values[order, range(n)].sum().item(),
            "norms_unmatched": values.trace().item(),
        }


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(_moved(item, device) for item in value)
    return value.to(device) if isinstance(value, Tensor) else value
