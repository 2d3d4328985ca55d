"""Memory and time of distilling one block of the LLaMA2-70B shape, with random weights, on one GPU.

    python -m experiments.recovery.large_block --device cuda --record experiments/recovery/large_block.json

The block is distilled by `spd.apply` itself, at tp 8, from a checkpoint of that one block. An epoch is 128 samples of
2048 tokens, as published; 18 more are held out. `--small` is a shape that any machine can run, to see that it does.
"""

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import spd
from spd.config import DistillationConfig
from spd.plan import ModelIdentity
from spd.results import environment
from spd.sensitivity import SensitivityReport

LLAMA2_70B: dict[str, Any] = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
SAMPLES, HELDOUT, TOKENS = 128, 18, 2048


def checkpoint(shape: dict[str, Any], length: int, folder: Path, device: str) -> Path:
    """One block with random weights, bfloat16, and a vocabulary that does not matter."""
    torch.manual_seed(0)
    config = LlamaConfig(**shape, num_hidden_layers=1, vocab_size=1000, max_position_embeddings=length)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.cpu().save_pretrained(folder)  # type: ignore[arg-type]
    words = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))  # a model folder has a tokenizer; none is used here
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    return folder


def measure(small: bool, device: str, epochs: int, batch_size: int, strategy: str, limit_gb: float | None) -> dict:
    """Peak memory, seconds an epoch, and the losses."""
    if limit_gb is not None:
        torch.cuda.set_per_process_memory_fraction(limit_gb * 1e9 / torch.cuda.mem_get_info()[1])
    shape, tokens, samples = (SMALL, 64, 16) if small else (LLAMA2_70B, TOKENS, SAMPLES)
    heldout = 2 if small else HELDOUT
    with tempfile.TemporaryDirectory() as folder:
        model = spd.load(checkpoint(shape, tokens, Path(folder), device), tp_size=8, device=device)
        report = SensitivityReport("suffix", 8, [1.0], 1.0, 1, ModelIdentity.of(model))
        plan = spd.make_plan(report, drop=1.0, strategy=strategy)
        ids = torch.randint(1000, (samples + heldout, tokens), generator=torch.Generator().manual_seed(0))
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        moments = [time.perf_counter()]

        def epoch_done(done: int, total: int) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            moments.append(time.perf_counter())

        settings = DistillationConfig(epochs=epochs, batch_size=batch_size)
        spd.apply(model, plan, ids, distillation=settings, on_progress=epoch_done)
        assert model.plan is not None
        outcome = model.plan.outcomes[0]
    on_gpu = device == "cuda"
    peak = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None
    reserved = torch.cuda.max_memory_reserved() / 1e9 if on_gpu else None
    return {
        "shape": shape,
        "tp_size": 8,
        "strategy": strategy,
        "samples": [samples, tokens],
        "batch_size": batch_size,
        "limit_gb": limit_gb,
        "peak_memory_gb": peak,
        "peak_reserved_gb": reserved,
        # The first also reads and embeds, runs the original block and judges it.
        "epoch_s": [round(after - before, 2) for before, after in itertools.pairwise(moments)],
        "outcome": outcome,
        "environment": environment(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=DistillationConfig.batch_size)
    parser.add_argument("--strategy", default="zs_b2b")
    parser.add_argument("--limit-gb", type=float, help="what the allocator may reserve; beyond it, out of memory")
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    found = measure(
        options.small, options.device, options.epochs, options.batch_size, options.strategy, options.limit_gb
    )
    print(json.dumps({name: found[name] for name in ("peak_memory_gb", "epoch_s", "outcome")}, indent=1))
    if options.record:
        options.record.write_text(json.dumps(found, indent=1) + "\n")
