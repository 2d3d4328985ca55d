"""Train a reference model on the generated world: one GPU, a few minutes.

    python -m experiments.reference.train ref_llama --out build            # the published recipe
    python -m experiments.reference.train ref_llama --steps 20 --batch 2 --device cpu --out build   # does it run?

Writes `<out>/<model>/` (a Hugging Face folder, float16 weights) and `<out>/<model>.json`, the record of the run.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from .check import accuracies
from .tokenizer import BOS, CONTEXT, EOS, PAD, build_tokenizer, encode
from .world import documents

WIDTH, BLOCKS, HEADS = 192, 12, 8
LEARNING_RATE, WARMUP_STEPS, CURRICULUM = 1.5e-3, 200, 0.15
ROWS_PER_SHARD = 1600

MODELS = ["ref_llama", "ref_opt", "ref_qwen2"]


def build_model(
    name: str,
    vocabulary_size: int,
    *,
    blocks: int = BLOCKS,
    width: int = WIDTH,
    opt_activation: str = "gelu",
    opt_ffn: int = 768,
    opt_dropout: float = 0.0,
    opt_embedding_std: float = 0.02,
) -> PreTrainedModel:
    """An untrained reference model of about 5.5 million parameters, by name; the rest is what was tried on ref_opt."""
    shared: dict[str, Any] = {
        "vocab_size": vocabulary_size, "hidden_size": width, "num_hidden_layers": blocks,
        "num_attention_heads": HEADS, "max_position_embeddings": CONTEXT, "tie_word_embeddings": True,
        "attention_dropout": 0.0, "pad_token_id": PAD, "eos_token_id": EOS,
        "bos_token_id": None if name == "ref_qwen2" else BOS,
    }  # fmt: skip
    config: PretrainedConfig
    if name == "ref_llama":
        config = LlamaConfig(**shared, intermediate_size=512, num_key_value_heads=HEADS)
        return LlamaForCausalLM(config)
    if name == "ref_qwen2":
        config = Qwen2Config(**shared, intermediate_size=576, num_key_value_heads=4)
        return Qwen2ForCausalLM(config)
    config = OPTConfig(**shared, ffn_dim=opt_ffn, word_embed_proj_dim=width, dropout=opt_dropout,
                       activation_function=opt_activation, do_layer_norm_before=True, enable_bias=True)  # fmt: skip
    model = OPTForCausalLM(config)
    with torch.no_grad():
        for embeddings in (model.model.decoder.embed_tokens, model.model.decoder.embed_positions):
            embeddings.weight.mul_(opt_embedding_std / config.init_std)
    return model


def shard(job: tuple[str, int, int, float, int]) -> np.ndarray:
    """Rows of CONTEXT token ids [rows, CONTEXT]; each begins with a new document and is filled with whole ones.

    The last document of a row is cut off.
    """
    name, seed, index, hard, rows = job
    stream = documents(f"train {seed} {index}", hard)
    filled = np.empty((rows, CONTEXT), dtype=np.uint16)
    for row in filled:
        tokens: list[int] = []
        while len(tokens) < CONTEXT:
            tokens += [*encode(name, next(stream)), EOS]
        row[:] = tokens[:CONTEXT]
    return filled


def batches(
    name: str, seed: int, steps: int, batch: int, workers: int, curriculum: float = CURRICULUM
) -> Iterator[np.ndarray]:
    """Fresh rows [batch, CONTEXT] for every step, written by `workers` processes; nothing is seen twice.

    Texts get harder over the first `curriculum` of the steps.
    """
    per_shard = max(1, ROWS_PER_SHARD // batch)
    shards = math.ceil(steps / per_shard)
    hard = [min(1.0, i / (curriculum * shards)) if curriculum else 1.0 for i in range(shards)]
    jobs = [(name, seed, i, hard[i], per_shard * batch) for i in range(shards)]
    pool = get_context("fork").Pool(workers)  # here and not in the generator: before CUDA starts

    def rows() -> Iterator[np.ndarray]:
        with pool:
            for written in pool.imap(shard, jobs):
                yield from written.reshape(per_shard, batch, CONTEXT)

    return islice(rows(), steps)


def optimizer_of(model: PreTrainedModel, weight_decay: float, fused: bool) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), fused=fused)


def train(
    name: str,
    *,
    steps: int,
    batch: int,
    seed: int,
    weight_decay: float,
    device: str,
    workers: int,
    minutes: float,
    out: Path,
    learning_rate: float,
    **shape: Any,
) -> None:
    """Train, save the model and its record. `minutes` is a safety net: the schedule then ends early, and says so."""
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    tokenizer = build_tokenizer(name)
    texts = batches(name, seed, steps, batch, workers)
    model = build_model(name, len(tokenizer), **shape)
    model.to(device)  # type: ignore[arg-type]
    forward = torch.compile(model) if device == "cuda" else model
    optimizer = optimizer_of(model, weight_decay, fused=device == "cuda")
    curve: list[dict[str, float]] = []
    growth: list[dict[str, float]] = []
    started, begun, step = datetime.now(UTC), time.perf_counter(), 0
    recent = torch.zeros((), device=device)
    for step, rows in enumerate(texts, start=1):
        progress = max(step / steps, (time.perf_counter() - begun) / (60 * minutes))
        if progress > 1:
            break
        rate = learning_rate * min(1.0, step / WARMUP_STEPS) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        tokens: Tensor = torch.from_numpy(rows.astype(np.int64)).to(device, non_blocking=True)
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = forward(input_ids=tokens, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent += loss.detach()
        every = max(1, min(100, steps // 10))
        if step % every == 0:
            seconds = time.perf_counter() - begun
            curve.append({"step": step, "loss": recent.item() / every, "learning_rate": rate, "seconds": seconds})
            recent.zero_()
        if step % 1000 == 0 or step == steps:
            model.eval()
            scores = accuracies(model, tokenizer, limit=100)
            model.train()
            growth.append({"step": step, **scores})
            shown = " ".join(f"{task.removeprefix('rw_')} {value:.2f}" for task, value in scores.items())
            print(f"{name} {step}: loss {curve[-1]['loss']:.3f} {seconds:.0f}s | {shown}", flush=True)
    seconds = time.perf_counter() - begun
    folder = out / name
    save(model, tokenizer, folder)
    record = {
        "model": name, "seed": seed, "steps": step, "planned_steps": steps, "cut_short": progress > 1,
        "batch": batch, "tokens": step * batch * CONTEXT, "learning_rate": learning_rate, "shape": shape,
        "weight_decay": weight_decay, "curriculum": CURRICULUM,
        "parameters": model.num_parameters(), "seconds": round(seconds, 1), "started": started.isoformat(),
        "hardware": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "cpu",
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__, "numpy": np.__version__},
        "curve": curve, "growth": growth,
    }  # fmt: skip
    (out / f"{name}.json").write_text(json.dumps(record, indent=1))
    print(f"{name}: {step} steps in {seconds:.0f} s, final loss {curve[-1]['loss']:.4f}", flush=True)


def save(model: PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerFast, folder: Path) -> None:
    """A Hugging Face folder with float16 weights: 11 MB; the published scores are those of the rounded weights."""
    model.to("cpu", torch.float16)  # type: ignore[arg-type]
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id, eos_token_id=EOS, pad_token_id=PAD, do_sample=False
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a reference model.")
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--steps", type=int, default=9_000)
    parser.add_argument("--batch", type=int, default=48, help=f"rows of {CONTEXT} tokens a step")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=8, help="processes that write text")
    parser.add_argument("--minutes", type=float, default=10.0, help="at most this long")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    tried = parser.add_argument_group("tried on ref_opt; the card says what came of it")
    tried.add_argument("--blocks", type=int, default=BLOCKS)
    tried.add_argument("--width", type=int, default=WIDTH)
    tried.add_argument("--opt-activation", default="gelu", help="a name of transformers' ACT2FN")
    tried.add_argument("--opt-ffn", type=int, default=768)
    tried.add_argument("--opt-dropout", type=float, default=0.0)
    tried.add_argument("--opt-embedding-std", type=float, default=0.02, help="of the initial embeddings")
    options = vars(parser.parse_args())
    train(options.pop("model"), **options)
