"""The steps of one point, each computed when first asked for and cached by what determines it.

sensitivity (shared) -> plan -> apply -> perplexity, accuracy (virtual ranks) -> latency (real ranks, shared)
"""

import gc
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch

from spd import checkpoint
from spd.config import DType, LatencyKind, RunConfig, Thresholds, to_dict
from spd.families import family_of
from spd.gpu.latency import check_gpus
from spd.gpu.step import gpu_latency
from spd.inputs import file_digests, optional_path, samples_of
from spd.keys import determining, machine
from spd.latency import measure_latency, summarise
from spd.loading import load
from spd.model import TensorParallelLM
from spd.paths import find_path
from spd.perplexity import perplexity
from spd.plan import STRATEGIES, DropPlan, ModelIdentity, blocks_at, make_plan
from spd.progress import Display
from spd.results import Results, digest, held, made_by
from spd.sensitivity import SensitivityReport, measure_sensitivity
from spd.strategies.block_cache import BlockCache
from spd.strategies.correction import CORRECTION_FILE
from spd.strategies.recovery import apply


class Steps:
    """What one point computes, and the key that it has by what determines it."""

    def __init__(self, config: RunConfig, results: Results, display: Display) -> None:
        self.config, self.results, self.display = config, results, display
        if config.latency.name is LatencyKind.gpu:
            _on_gpus(config, display)
        self.folder = checkpoint.resolve(find_path(config.model.path) or config.model.path)
        self.weights = checkpoint.fingerprint(self.folder)
        self.files = file_digests(config, self.folder)
        self.key = self._key()

    def _key(self) -> str:
        parts = {**made_by(), "config": determining(to_dict(self.config)), "weights": self.weights, "files": self.files}
        if self.config.latency.name is not LatencyKind.none:
            parts["machine"] = machine(self.config)
        return digest(parts)

    def steps(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields (name in the record, value), in the order they are computed."""
        yield "sensitivity", self.sensitivity
        yield "plan", self.applied_plan
        yield "perplexity", self.perplexity
        if self.config.eval.tasks:
            yield "accuracy", self.accuracy
        self.keep_model()
        if self.config.latency.name is not LatencyKind.none:
            yield "latency", self.latency

    def keep_model(self) -> None:
        """Writes the prepared model to the point's folder, where that is asked for and it is not there."""
        folder = self.results.folder(self.key) / "model"
        if not self.config.save_model or folder.exists():
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        with held(folder.with_suffix(".lock"), self.display.say, "saves the same model"):
            if not folder.exists():
                model = self.prepared
                self.display.step(f"saving the prepared model in {folder}")
                model.save_pretrained(folder)

    @property
    def _model_parts(self) -> dict[str, Any]:
        model, files = self.config.model, self.files
        return {
            "weights": self.weights,
            "tokenizer": files["tokenizer"],
            "tp_size": self.config.parallel.tp_size,
            "dtype": model.dtype.name,
            "device": model.device.name,
        }

    @property
    def _samples_parts(self) -> dict[str, Any]:
        data = self.config.data
        return {"samples": data.samples, "sequence_length": data.sequence_length, "seed": self.config.seed}

    @property
    def _dropped_parts(self) -> dict[str, Any]:
        return self._treatment_parts(self.plan(self.config.drop))

    def _treatment_parts(self, plan: DropPlan) -> dict[str, Any]:
        """What the dropped blocks are: the same for two strategies that treat them alike."""
        treatment = plan.treatment
        if set(treatment.values()) <= {"zs"}:
            return {"treatment": treatment}
        config = to_dict(self.config)
        return {
            "treatment": treatment,
            "distillation": config["model"]["distillation"],
            "correction": config["strategy"]["correction"],
            "calibration": [
                self.files["calibration"],
                config["data"]["recovery_samples"],
                config["data"]["sequence_length"],
                self.config.seed,
            ],
        }

    @cached_property
    def model(self) -> TensorParallelLM:
        return self._load()

    def _load(self) -> TensorParallelLM:
        self.display.step(f"loading {self.config.model.name} for {self.config.parallel.tp_size} virtual ranks")
        model = self.config.model
        return load(
            self.folder,
            tp_size=self.config.parallel.tp_size,
            ranks="virtual",
            dtype=model.dtype.name,
            device=model.device.name,
        )

    @cached_property
    def sensitivity(self) -> dict[str, Any]:
        order = self.config.strategy.order.name

        def measure() -> dict[str, Any]:
            samples, model = samples_of(self.config, "path", self.folder), self.model
            self.display.step("measuring sensitivities")
            return measure_sensitivity(model, samples, order=order, on_progress=self.display).to_dict()

        parts = {**self._model_parts, **self._samples_parts, "order": order, "text": self.files["calibration"]}
        return self.results.cached("sensitivity", parts, measure)

    def plan(self, drop: float) -> DropPlan:
        strategy = self.config.strategy
        return make_plan(
            SensitivityReport.from_dict(self.sensitivity),
            drop=drop,
            strategy=strategy.name.name,
            tau1=strategy.tau1,
            tau2=strategy.tau2,
            thresholds=strategy.thresholds.name,
        )

    @property
    def applied_plan(self) -> dict[str, Any]:
        """The plan, with what came of the blocks it treats."""
        plan = self.plan(self.config.drop)
        alike = (
            name
            for name, steps in STRATEGIES.items()
            if all(steps[plan.classes[block]] == its for block, its in plan.treatment.items())
        )
        if plan.dropped and (simplest := next(alike)) != plan.strategy:
            given = self.config.strategy.thresholds is Thresholds.tau
            more = "lower ones treat more" if given else "found where sensitivities jump"
            self.display.say(
                f"{plan.strategy} is {simplest} here: no dropped block is sensitive enough to be treated otherwise "
                f"(strategy.tau1={plan.tau1:g}, strategy.tau2={plan.tau2:g}; {more})."
            )
        if set(plan.treatment.values()) <= {"zs"}:
            return plan.to_dict()  # nothing to do, so nothing to load

        def prepare() -> dict[str, Any]:
            assert self.prepared.plan is not None
            return self.prepared.plan.to_dict()

        return self.results.cached(
            "plan", {**self._model_parts, **self._dropped_parts, "plan": plan.to_dict()}, prepare
        )

    @cached_property
    def prepared(self) -> TensorParallelLM:
        """The model with the plan applied."""
        return self._apply(self.model, self.plan(self.config.drop))

    def _apply(self, model: TensorParallelLM, plan: DropPlan) -> TensorParallelLM:
        """Treated blocks are kept, for every other point that needs the same."""
        config, calibration = self.config, None
        if set(plan.treatment.values()) - {"zs"}:
            calibration = samples_of(config, "path", self.folder, config.data.recovery_samples)
            self.display.step(f"treating blocks ({plan.strategy})")
        return apply(
            model,
            plan,
            calibration,
            distillation=config.model.distillation,
            corrections=config.strategy.correction,
            seed=config.seed,
            cache=BlockCache(self.results.output_dir / "cache" / "blocks"),
            on_progress=self.display,
            say=self.display.say,
        )

    @property
    def perplexity(self) -> dict[str, Any]:
        def measure() -> dict[str, Any]:
            samples, model = samples_of(self.config, "heldout_path", self.folder), self.prepared
            self.display.step("measuring perplexity")
            return {"value": perplexity(model, samples), "tokens": samples.shape[0] * (samples.shape[1] - 1)}

        parts = {
            **self._model_parts,
            **self._samples_parts,
            **self._dropped_parts,
            "text": self.files["heldout"],
        }
        return self.results.cached("perplexity", parts, measure)

    @property
    def accuracy(self) -> dict[str, Any]:
        settings, seed = self.config.eval, self.config.seed
        asked: dict[str, Any] = {"limit": settings.limit, "num_fewshot": settings.num_fewshot, "seed": seed}

        def measure() -> dict[str, Any]:
            model = self.prepared
            self.display.step("evaluating")
            from spd.evaluation import evaluate  # imports lm-eval: slow, and not needed where no task is asked for

            return evaluate(
                model,
                tasks=settings.tasks,
                include_path=optional_path(settings.include_path, "eval.include_path"),
                data_root=optional_path(settings.data_root, "eval.data_root"),
                batch_size=settings.batch_size,
                answers=self.results.output_dir / "cache" / "answers",
                on_progress=self.display,
                **asked,
            )

        parts = {
            **self._model_parts,
            **self._dropped_parts,
            **asked,
            "tasks": settings.tasks,
            "files": self.files["tasks"],
        }
        return self.results.cached("accuracy", parts, measure)

    @property
    def latency(self) -> dict[str, Any]:
        if self.config.latency.name is LatencyKind.gpu:
            return self._gpu_latency()
        settings, parallel = self.config.latency, self.config.parallel
        plans = [self.plan(drop).dropped for drop in (0.0, self.config.drop, *settings.drops)]
        # By number of blocks: fractions that come to the same blocks are one arm.
        arms = {str(len(dropped)): dropped for dropped in sorted(plans, key=len)}
        asked: dict[str, Any] = {
            "dtype": self.config.model.dtype.name,
            "prompt_length": settings.prompt_length,
            "new_tokens": settings.new_tokens,
            "batch_size": settings.batch_size,
            "launches": settings.launches,
            "repeats": settings.repeats,
            "warmup": settings.warmup,
            "realtime": settings.realtime,
        }

        # What distillation and head grouping change costs no time; corrections do.
        widest = self.plan(max(0.0, self.config.drop, *settings.drops))
        corrected = any("correction" in steps for steps in widest.treatment.values())

        def measure() -> dict[str, Any]:
            corrections = self.results.folder(self.key) / CORRECTION_FILE if corrected else None
            if corrections:
                self._apply(self._load(), widest).save_corrections(corrections)
                if not corrections.is_file():  # none was kept
                    corrections = None
            self.display.step(f"measuring latency, launches: {settings.launches}, ranks: {parallel.tp_size}")
            return measure_latency(
                self.folder,
                parallel.tp_size,
                arms,
                port=parallel.port,
                timeout_s=settings.timeout_s,
                corrections=corrections,
                log_dir=self.results.folder(self.key) / "latency",
                on_progress=self.display,
                say=self.display.say,
                **asked,
            )

        parts = {
            **asked,
            "weights": self.weights,
            "tp_size": parallel.tp_size,
            "arms": arms,
            "interconnect": self.config.interconnect.name.name,
            "machine": machine(self.config),
            "corrections": self._treatment_parts(widest) if corrected else None,
        }
        ours = str(len(self.plan(self.config.drop).dropped))
        return summarise(self.results.cached("latency", parts, measure), arm=ours, baseline="0")

    def _gpu_latency(self) -> dict[str, Any]:
        # What strategies change in a block costs no time, but the virtual ranks may stand on a GPU that is timed.
        dropped = {drop: self.plan(drop).dropped for drop in (0.0, self.config.drop, *self.config.latency.drops)}
        for name in ("model", "prepared"):
            self.__dict__.pop(name, None)
        gc.collect()
        torch.cuda.empty_cache()
        return gpu_latency(
            self.config,
            self.results,
            self.display,
            self.folder,
            dropped.__getitem__,
            self.results.folder(self.key) / "latency",
            weights=self.weights,
            machine=machine(self.config),
        )


class RandomSteps:
    """What a point with weights=random computes: a latency, from its model's architecture alone."""

    def __init__(self, config: RunConfig, results: Results, display: Display) -> None:
        self.config, self.results, self.display = config, results, display
        _on_gpus(config, display)
        self.hf: Any = checkpoint.read_architecture(config.model.architecture)
        family_of(self.hf)
        self.weights = f"random {digest(config.model.architecture)}"
        parts = {"config": determining(to_dict(config)), "weights": self.weights, "machine": machine(config)}
        self.key = digest({**made_by(), **parts})

    def steps(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """As `Steps.steps`."""
        self.display.say("weights=random: nothing but latency is measured.")
        yield "plan", self.plan(self.config.drop).to_dict()
        yield (
            "latency",
            gpu_latency(
                self.config,
                self.results,
                self.display,
                self.config.model.architecture,
                lambda drop: self.plan(drop).dropped,
                self.results.folder(self.key) / "latency",
                weights=self.weights,
                machine=machine(self.config),
            ),
        )

    def plan(self, drop: float) -> DropPlan:
        """Drops the last blocks: random ones are all alike, and which are dropped costs no time."""
        blocks = self.hf.num_hidden_layers
        dropped = list(range(blocks - blocks_at(drop, blocks), blocks))
        return DropPlan(
            tp_size=self.config.parallel.tp_size,
            strategy="zs",
            drop=drop,
            dropped=dropped,
            treatment=dict.fromkeys(dropped, "zs"),
            classes={},
            tau1=None,
            tau2=None,
            order=None,
            source=ModelIdentity(self.hf.model_type, blocks, self.hf.hidden_size, self.weights),
        )


def _on_gpus(config: RunConfig, display: Display) -> None:
    """Refuses where there are too few; says that a type is not what one serves with."""
    check_gpus(config.parallel.tp_size)
    if config.model.dtype is DType.float32:
        display.say("latency=gpu in float32; what serves a model takes model.dtype=bfloat16.")
