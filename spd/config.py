"""The typed schema of everything in conf/: a docstring under each field gives unit, allowed values and why the default.

`spd.compose` makes a RunConfig of what Hydra composed. Neither imports torch, so that a refused configuration costs a
second and not ten; and this one not Hydra, as the engine takes settings too.
"""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import yaml

from spd.errors import UserError


class DType(Enum):
    """Floating point type of weights and activations."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Device(Enum):
    """Where the virtual ranks run (sensitivity, perplexity, accuracy)."""

    cpu = "cpu"
    cuda = "cuda"


class Interconnect(Enum):
    """What carries the all-reduces of the latency measurement."""

    native = "native"
    lbw = "lbw"
    socket = "socket"


class AllReduceKind(Enum):
    """Who sums over the ranks of latency=gpu."""

    auto = "auto"
    nccl = "nccl"
    one_shot = "one_shot"
    two_shot = "two_shot"


class Weights(Enum):
    """Where a model's weights come from."""

    checkpoint = "checkpoint"
    random = "random"


class Strategy(Enum):
    """What is done to dropped blocks, by their class (spd.plan.STRATEGIES)."""

    zs = "zs"
    zs_b2b = "zs_b2b"
    zs_b2b_hg = "zs_b2b_hg"
    zs_hg = "zs_hg"
    zs_correction = "zs_correction"
    zs_correction_b2b = "zs_correction_b2b"


class Order(Enum):
    """Which blocks are dropped together when a block's sensitivity is measured."""

    suffix = "suffix"
    alone = "alone"
    front = "front"


class Thresholds(Enum):
    """How sensitivities are split into the classes ISB, SB and ESB."""

    tau = "tau"
    jumps = "jumps"


class CorrectionKind(Enum):
    """What predicts the attention that a rank lacks (spd.strategies.correction has the equations)."""

    constant = "constant"
    scale = "scale"
    linear_x = "linear_x"
    linear_p = "linear_p"
    linear = "linear"
    shift = "shift"


class LatencyKind(Enum):
    """How latency is obtained."""

    none = "none"
    cpu = "cpu"
    gpu = "gpu"


class Tracker(Enum):
    """Where records are mirrored."""

    wandb = "wandb"
    none = "none"


def _need(condition: bool, sentence: str) -> None:
    if not condition:
        raise UserError(sentence)


@dataclass
class DistillationConfig:
    learning_rate: float | None = None
    """AdamW's peak learning rate; null takes the published one of the family: 1e-6 for OPT, 5e-5 for the others."""
    epochs: int = 10
    """Passes over the calibration samples. 10 as published."""
    batch_size: int = 4
    """Samples a step. The paper does not say."""
    after_final_norm: bool = False
    """Compare the last block's outputs after the model's final norm, as the head sees them. False as published."""

    def check(self) -> None:
        rate = self.learning_rate
        _need(
            rate is None or (math.isfinite(rate) and rate > 0),
            f"model.distillation.learning_rate={rate} moves nothing; give a positive one, 5e-5 for instance.",
        )
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            _need(value >= 1, f"model.distillation.{name}={value} is too small; give 1 or more.")


@dataclass
class CorrectionConfig:
    kind: CorrectionKind = CorrectionKind.shift
    """constant | scale | linear_x | linear_p | linear | shift, from the cheapest to the best."""
    rank: int = 32
    """Rank r of the linear maps; a rank multiplies r (features + D) numbers more a token."""
    ridge: float = 1e-4
    """Ridge penalty, relative to the mean variance of each kind of feature: norm1(X), P_i, the token before."""

    def check(self) -> None:
        _need(self.rank >= 1, f"strategy.correction.rank={self.rank} leaves no map; give 1 or more (32 by default).")
        _need(
            math.isfinite(self.ridge) and self.ridge > 0,
            f"strategy.correction.ridge={self.ridge} cannot be; give a positive number, 1e-4 for instance.",
        )


@dataclass
class ModelConfig:
    name: str = "model"
    """Name in tables, figures and W&B. Any text; it does not take part in what is computed."""
    path: str = ""
    """Hugging Face model folder (config, tokenizer, safetensors) or hub id `owner/name`. Relative folders are looked
    for in the working directory, then in the repository."""
    dtype: DType = DType.float32
    """float32 | float16 | bfloat16. float32 by default: exact on CPUs, where half types are slow."""
    device: Device = Device.cpu
    """cpu | cuda, for the virtual ranks. The processes of latency=cpu run on the CPU in any case, those of latency=gpu
    on GPUs."""
    architecture: dict[str, Any] = field(default_factory=dict)
    """Fields of its Hugging Face config, `model_type` among them: all that weights=random needs. {} leaves it to the
    checkpoint (default)."""
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    """How its blocks are distilled, where the strategy asks for it: learning rates differ by model."""

    def check(self) -> None:
        _need(bool(self.name.strip()), "model.name is empty; give the name that tables should show.")
        self.distillation.check()


@dataclass
class ParallelConfig:
    tp_size: int = 4
    """Tensor-parallel ranks N, at least 1; must divide the model's attention heads and MLP width."""
    port: int = 0
    """TCP port at which the ranks of the latency measurement meet; 0 picks a free one (the default: sweeps and
    neighbours on one machine then never collide)."""

    def check(self) -> None:
        _need(self.tp_size >= 1, f"parallel.tp_size={self.tp_size} is no number of ranks; give 1 or more (1, 2, 4, 8).")
        _need(
            self.port == 0 or 1024 <= self.port <= 65535,
            f"parallel.port={self.port} cannot be used; give 0 (pick a free port) or one in 1024..65535.",
        )


@dataclass
class InterconnectConfig:
    name: Interconnect = Interconnect.native
    """native: the all-reduces run over what the machine has | lbw: not over the GPUs' direct links but through host
    memory (NCCL_P2P_DISABLE=1), the paper's low-bandwidth setting | socket: through sockets (NCCL_SHM_DISABLE=1 as
    well). What it measured is in the record."""


@dataclass
class StrategyConfig:
    name: Strategy = Strategy.zs
    """zs: dropped blocks keep their original weights (zero-shot, paper section 4) | zs_b2b: sensitive ones are
    distilled | zs_b2b_hg: and the extremely sensitive ones have their heads grouped anew before | zs_hg: grouped anew
    only | zs_correction: sensitive ones are corrected in closed form | zs_correction_b2b: corrected, then distilled."""
    order: Order = Order.suffix
    """suffix: block i with all later ones (the paper's Algorithm 1, default) | alone: block i only | front: block i
    with all earlier ones."""
    thresholds: Thresholds = Thresholds.tau
    """tau: classes by tau1 and tau2 (default, as published) | jumps: where the sorted sensitivities jump."""
    tau1: float = 0.05
    """Perplexity. Blocks up to tau1 are in-sensitive (ISB). Published value."""
    tau2: float = 10.0
    """Perplexity. Blocks above tau2 are extremely sensitive (ESB), those between sensitive (SB). Published value."""
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    """Of zs_correction and zs_correction_b2b."""

    def check(self) -> None:
        for name, value in (("tau1", self.tau1), ("tau2", self.tau2)):
            _need(math.isfinite(value), f"strategy.{name}={value} is not finite (published: tau1=0.05, tau2=10).")
        _need(
            self.tau1 <= self.tau2,
            f"strategy.tau1={self.tau1:g} is above strategy.tau2={self.tau2:g}; "
            "tau1 bounds the in-sensitive blocks and must not exceed tau2 (published: 0.05 and 10).",
        )
        self.correction.check()


@dataclass
class EvalConfig:
    name: str = "none"
    """Name of the option in conf/eval."""
    tasks: list[str] = field(default_factory=list)
    """lm-eval task names; [] evaluates no task (perplexity is still measured)."""
    include_path: str | None = None
    """Folder of task YAML files (and their data) beside lm-eval's own; relative as model.path. null: its own only."""
    data_root: str | None = None
    """Folder laid out like the hub, <data_root>/<owner>/<data set>/, from which the tasks' data sets are read, for
    machines without a network; relative as model.path. null takes them from the hub or its cache (default)."""
    num_fewshot: int | None = None
    """Examples shown before each item; null leaves it to each task's own YAML (default)."""
    limit: int | None = None
    """Items per task, the first ones; null takes all (default)."""
    batch_size: int | str = 32
    """Items per forward; auto takes the most, up to 64, that fit in a GPU's memory (a CPU, which does not tell, takes
    64). 32 keeps a CPU busy; scores do not depend on it beyond rounding."""

    def check(self) -> None:
        size = self.batch_size
        _need(
            size == "auto" or (isinstance(size, int) and size >= 1),
            f"eval.batch_size={size} is no batch; give 1 or more, or auto.",
        )
        _need(
            self.limit is None or self.limit >= 1,
            f"eval.limit={self.limit} leaves no items; give 1 or more, or null for all.",
        )
        _need(
            self.num_fewshot is None or self.num_fewshot >= 0,
            f"eval.num_fewshot={self.num_fewshot} is below 0; give 0 or more, or null for each task's own number.",
        )
        twice = sorted({task for task in self.tasks if self.tasks.count(task) > 1})
        _need(not twice, f"eval.tasks names {', '.join(twice)} twice; name each task once.")


@dataclass
class DataConfig:
    path: str = ""
    """Calibration text for the sensitivities, .txt or .jsonl; relative as model.path."""
    heldout_path: str = ""
    """Text for the reported perplexity; should share nothing with `path`."""
    dataset: str | None = None
    """Hub name of a data set with a "text" column, read in place of the two files; null reads the files (default)."""
    dataset_config: str | None = None
    """Which of the data set's configs; null where it has but one."""
    split: str = "train"
    """Split of the data set in place of `path`, as one running text, its rows joined by empty lines."""
    heldout_split: str = "test"
    """Split of the data set in place of `heldout_path`."""
    data_root: str | None = None
    """Where the data set is; as eval.data_root, which data=wikitext2 takes it from."""
    samples: int = 32
    """Sequences drawn from each text, for sensitivities and perplexity."""
    recovery_samples: int = 128
    """Sequences drawn from the calibration text for distillation, head grouping and correction, of which the last
    eighth is held out to judge them. 128 as published."""
    sequence_length: int = 256
    """Tokens per sequence. The paper's 128 samples of 2048 tokens (data=wikitext2) are for models of billions of
    parameters."""

    def check(self) -> None:
        _need(self.samples >= 1, f"data.samples={self.samples} is no number of sequences; give 1 or more.")
        _need(
            self.recovery_samples >= 8,
            f"data.recovery_samples={self.recovery_samples} is too little to hold an eighth out; give 8 or more.",
        )
        _need(
            self.sequence_length >= 2,
            f"data.sequence_length={self.sequence_length} leaves nothing to predict; give 2 tokens or more.",
        )
        _need(
            self.dataset is None or self.split != self.heldout_split,
            f"data.heldout_split={self.heldout_split} is data.split too, and should share nothing with it; "
            "give two splits, as train and test.",
        )


@dataclass
class LatencyConfig:
    name: LatencyKind = LatencyKind.none
    """none: not measured (null in the record) | cpu: real torchrun ranks over gloo on this machine | gpu: one torchrun
    rank a GPU, compiled and captured in CUDA graphs."""
    prompt_length: int = 128
    """Tokens of the prompt (time to first token). 128 as published."""
    new_tokens: int = 8
    """Tokens generated after the first (time between tokens)."""
    decode_at: int | None = None
    """latency=gpu: position of the first of these tokens, whatever the prompt; null for right after it (default)."""
    all_reduce: AllReduceKind = AllReduceKind.auto
    """latency=gpu: auto measures those that work and takes the quickest for each message size | nccl | one_shot,
    two_shot: symmetric memory over direct links."""
    blocks_alone: bool = False
    """latency=gpu: time the decoder blocks by themselves too, without embedding, head and choice."""
    tp_plan: bool = False
    """latency=gpu: time transformers' own tensor parallelism too (tp_plan="auto"), beside the arms."""
    batch_size: int = 1
    """Prompts at once. 1 as published."""
    launches: int = 3
    """Separate starts of all ranks: the unit of replication, as medians of launches differ more than repeats do. 3 is
    the least that gives an interval (of 75 % confidence), and what a first look has time for; 95 % takes 6."""
    repeats: int = 6
    """Timed repeats of every arm within a launch, interleaved."""
    warmup: int = 1
    """Untimed repeats before them."""
    realtime: bool = True
    """latency=cpu: schedule the timed parts of the ranks in real time where the system permits it: several times less
    spread."""
    drops: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.625, 0.75, 0.875, 1.0])
    """Drop fractions timed beside each other in one session, which all points of a sweep then share. 0 is always
    added: it is the baseline of the speed-ups. A point's own fraction is added if missing."""
    timeout_s: float = 300.0
    """Seconds a launch may take before its ranks are ended and the point fails."""

    def check(self) -> None:
        for name in ("prompt_length", "new_tokens", "batch_size", "launches", "repeats"):
            _need(getattr(self, name) >= 1, f"latency.{name}={getattr(self, name)} is too small; give 1 or more.")
        _need(
            self.decode_at is None or self.decode_at >= 1,
            f"latency.decode_at={self.decode_at} is no position after a prompt; give 1 or more, or null.",
        )
        _need(self.warmup >= 0, f"latency.warmup={self.warmup} is below 0; give 0 or more.")
        _need(
            self.timeout_s > 0, f"latency.timeout_s={self.timeout_s:g} leaves no time; give seconds, 300 for instance."
        )
        for drop in self.drops:
            _need(0 <= drop <= 1, f"latency.drops has {drop:g}; give fractions between 0 and 1, as in [0,0.5,1].")


@dataclass
class TrackerConfig:
    name: Tracker = Tracker.wandb
    """wandb: mirror records to Weights & Biases, offline unless you are logged in | none."""
    project: str = "spd"
    """W&B project."""
    entity: str | None = None
    """W&B user or team; null is your default."""


@dataclass
class RunConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    """Which checkpoint, in which type, on which device."""
    weights: Weights = Weights.checkpoint
    """checkpoint: of model.path (default) | random: made on the GPUs from model.architecture alone. A model that knows
    nothing has a latency and nothing else, so only that is measured."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How many ranks."""
    interconnect: InterconnectConfig = field(default_factory=InterconnectConfig)
    """What joins them."""
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    """How dropped blocks are chosen and treated."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """What accuracy means."""
    data: DataConfig = field(default_factory=DataConfig)
    """Texts for sensitivity and perplexity."""
    latency: LatencyConfig = field(default_factory=LatencyConfig)
    """What is timed, and how often."""
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    """Where records are mirrored."""
    drop: float = 0.0
    """Fraction n/L of the blocks whose attention sync point is dropped, 0..1, rounded to whole blocks."""
    seed: int = 0
    """Seeds the choice of text samples and few-shot examples, the order of distillation, and the search for groups of
    heads."""
    sweep: str = "default"
    """Name of the sweep: its folder under output_dir/sweeps and its group in W&B. By default the time of the start."""
    output_dir: str = "runs"
    """Where records, caches and sweeps go; relative to the working directory."""
    save_model: bool = False
    """Keep the prepared model beside the point's record, as a checkpoint for `spd.load` and lm-eval's --model spd."""

    def check(self) -> None:
        """Raises UserError for the first value out of range, here or in a section."""
        for section in (self.model, self.parallel, self.strategy, self.eval, self.data, self.latency):
            section.check()
        _need(
            0 <= self.drop <= 1,
            f"drop={self.drop:g} is no fraction of the blocks; give a number between 0 and 1, as in drop=0.5 for half.",
        )
        _need(0 <= self.seed < 2**63, f"seed={self.seed} is no seed; give 0 or more, below 2^63.")
        _need(
            re.fullmatch(r"[A-Za-z0-9][\w.+-]*", self.sweep) is not None,
            f"sweep={self.sweep!r} cannot name a folder; use letters, digits, and any of . _ + -",
        )
        self._check_together()
        _need(bool(self.output_dir.strip()), "output_dir is empty; give a folder, as in output_dir=runs.")

    def _check_together(self) -> None:
        """What no section can see by itself."""
        gpu, name = self.latency.name is LatencyKind.gpu, self.interconnect.name
        if self.weights is Weights.random:
            _need(gpu, "weights=random has a latency and nothing else to measure; write latency=gpu.")
            _need(
                bool(self.model.architecture),
                "weights=random needs model.architecture; take a model of conf/model that has one, as model=llama2_7b.",
            )
            _need(not self.save_model, "save_model=true with weights=random, which nothing is to be kept of.")
        else:
            _need(
                bool(self.model.path.strip()),
                "model.path is empty; give a Hugging Face model folder or a hub id, as in model.path=owner/name.",
            )
        if name is not Interconnect.native:
            _need(gpu, f"interconnect={name.name} is between GPUs; write latency=gpu, or interconnect=native.")
            _need(
                self.latency.all_reduce in (AllReduceKind.auto, AllReduceKind.nccl),
                f"latency.all_reduce={self.latency.all_reduce.name} goes over direct links, and "
                f"interconnect={name.name} is without; write latency.all_reduce=nccl.",
            )
        _need(gpu or not self.latency.tp_plan, "latency.tp_plan=true is an arm of GPUs; write latency=gpu.")
        _need(
            not (gpu and "correction" in self.strategy.name.name),
            f"strategy={self.strategy.name.name} with latency=gpu: that engine has no corrections; write latency=cpu.",
        )


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain JSON-able values, enums by name."""

    def plain(value: Any) -> Any:
        if isinstance(value, Enum):
            return value.name
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list) else value

    return {key: plain(value) for key, value in dataclasses.asdict(config).items()}


def dump_yaml(config: RunConfig) -> str:
    """The configuration as YAML that `run.py` can be given again."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)
