"""One rank of a tensor-parallel model by itself, without any all-reduce: the engine against the floor of its GPU.

    python -m experiments.gpu_latency.alone --record experiments/gpu_latency/alone.csv

    python -m experiments.gpu_latency.alone --table experiments/gpu_latency/alone.csv      # the README's table

This is the ceiling *no all-reduce at all*, which one GPU suffices for. A floor is what reading the weights, and in
decoding the keys and values of 256 tokens, takes at the copy bandwidth measured in the same run, or what the matrix
products take at the measured rate, whichever is longer. Arms are interleaved (ABBA); a row is the median of the replays
with their 10th and 90th percentile, in milliseconds.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import AutoConfig

from spd.families import family_of
from spd.gpu.model import Arm, GraphModel

SHAPES: dict[str, dict[str, Any]] = {
    "llama2_7b": {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                  "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
    "llama2_70b": {"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                   "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000},
    "opt_6.7b": {"model_type": "opt", "hidden_size": 4096, "ffn_dim": 16384, "num_hidden_layers": 32,
                 "num_attention_heads": 32, "vocab_size": 50272, "word_embed_proj_dim": 4096},
    "qwen2.5_7b": {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                   "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
                   "tie_word_embeddings": False},
}  # fmt: skip


def events_ms(run: Any, times: int) -> float:
    """Milliseconds of one of `times` runs on the GPU, between two events."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / times


def rates() -> tuple[float, float]:
    """Bytes a second that a copy reads and writes, and floating-point operations a second of a bf16 product."""
    big = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    to = torch.empty_like(big)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    to.copy_(big)
    a @ b
    copy_ms = min(events_ms(lambda: to.copy_(big), 5) for _ in range(3))
    product_ms = min(events_ms(lambda: a @ b, 10) for _ in range(3))
    return 2 * big.numel() / copy_ms * 1e3, 2 * 8192**3 / product_ms * 1e3


def measure(name: str, tp_size: int, batch: int, prompt: int, cache: int, replays: int, limits: Any) -> list[dict]:
    """A row for prefill and decoding, with nothing and with everything dropped."""
    config = AutoConfig.for_model(**SHAPES[name])
    begun = time.perf_counter()
    model = GraphModel(
        config, family_of(config), tp_size, 0, batch_size=batch, prompt_length=prompt, cache_length=cache
    )
    built = time.perf_counter()
    model.prompt.random_(0, config.vocab_size)
    arms = {"TP": Arm(), "100 %": Arm(frozenset(range(model.num_blocks)))}
    graphs, pool = {}, torch.cuda.graph_pool_handle()
    phases = (False, True) if prompt < cache // 2 else (False,)
    for decode in phases:
        for arm, of in arms.items():
            graphs[decode, arm] = model.capture(of, decode=decode, pool=pool)
    torch.cuda.synchronize()
    captured = time.perf_counter()
    weights = sum(block.bytes for block in model.blocks) + model.head.numel() * model.head.element_size()
    bandwidth, flops = limits
    rows = []
    for decode in phases:
        times: dict[str, list[float]] = {arm: [] for arm in arms}
        graphs[decode, "TP"].replay()
        enough = max(6, min(replays, int(2e3 / events_ms(graphs[decode, "TP"].replay, 1))))  # two seconds an arm
        for replay in range(enough):
            for arm in list(arms)[:: 1 if replay % 2 else -1]:
                model.position.fill_(256 if decode else prompt)
                times[arm].append(events_ms(graphs[decode, arm].replay, 1))
        tokens = batch * (1 if decode else prompt)
        in_blocks = sum(block.bytes for block in model.blocks)
        products = (in_blocks * tokens + (weights - in_blocks) * batch) / 2 * 2
        keys_and_values = 2 * sum(k[:, :, :256].numel() * k.element_size() for k, _ in model.cache) if decode else 0
        floor = 1e3 * max((weights + keys_and_values) / bandwidth, products / flops)
        for arm, taken in times.items():
            low, median, high = np.percentile(taken[enough // 10 :], [10, 50, 90]).round(4)
            rows.append({
                "model": name, "tp_size": tp_size, "batch_size": batch, "prompt_length": prompt,
                "phase": "decode at 256" if decode else "prefill", "arm": arm, "median_ms": median, "p10_ms": low,
                "p90_ms": high, "floor_ms": round(floor, 4), "over_floor": round(median / floor, 3),
                "weights_gb": round(weights / 1e9, 3), "bandwidth_tb_per_s": round(bandwidth / 1e12, 3),
                "tflop_per_s": round(flops / 1e12), "build_s": round(built - begun, 1),
                "compile_and_capture_s": round(captured - built, 1),
                "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
            })  # fmt: skip
            print(*rows[-1].values(), flush=True)
    return rows


def table(rows: pd.DataFrame) -> str:
    """Milliseconds of the two arms and the floor, as Markdown."""
    heads = ["model", "batch", "phase", "floor", "TP", "over floor", "all dropped", "over floor"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    keys = ["model", "batch_size", "prompt_length", "phase"]
    for (model, batch, prompt, phase), two in rows.groupby(keys, sort=False):
        cells = [f"{row.median_ms:.2f} | {row.over_floor:.2f}" for row in two.itertuples()]
        what = f"prefill {prompt}" if phase == "prefill" else phase
        lines.append(f"| {model} | {batch} | {what} | {two['floor_ms'].iloc[0]:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SHAPES))
    parser.add_argument("--tp-size", type=int, default=2)
    parser.add_argument("--shapes", nargs="+", default=["1x128", "1x2048", "16x128"], help="batch size x prompt tokens")
    parser.add_argument("--replays", type=int, default=60)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--table", type=Path, help="print the table of such a record, and measure nothing")
    options = parser.parse_args()
    if options.table:
        print(table(pd.read_csv(options.table)))
        raise SystemExit
    limits, found = rates(), []
    for name in options.models:
        for shape in options.shapes:
            batch, prompt = map(int, shape.split("x"))
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            torch.compiler.reset()
            found += measure(name, options.tp_size, batch, prompt, max(512, prompt + 64), options.replays, limits)
            if options.record:
                pd.DataFrame(found).to_csv(options.record, index=False)
