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

import numpy as np
import pandas as pd
import torch
import yaml

from spd.checkpoint import read_architecture
from spd.config import ROOT
from spd.families import family_of
from spd.gpu.limits import Rates, events_ms
from spd.gpu.model import Arm, GraphModel

MODELS = ("llama2_7b", "llama2_70b", "opt_6.7b", "qwen2.5_7b")


def measure(name: str, tp_size: int, batch: int, prompt: int, cache: int, replays: int, limits: Rates) -> list[dict]:
    """A row for prefill and decoding, with nothing and with everything dropped."""
    given = yaml.safe_load((ROOT / f"conf/model/{name}.yaml").read_text())
    config = read_architecture(given["architecture"])
    begun = time.perf_counter()
    family = family_of(config)
    model = GraphModel(config, family, tp_size, 0, batch_size=batch, prompt_length=prompt, cache_length=cache)
    built = time.perf_counter()
    model.prompt.random_(0, config.vocab_size)
    arms = {"TP": Arm(), "100 %": Arm(frozenset(range(model.num_blocks)))}
    graphs, pool = {}, torch.cuda.graph_pool_handle()
    phases = (False, True) if prompt < cache // 2 else (False,)
    for decode in phases:
        for arm, of in arms.items():
            graphs[decode, arm] = model.capture(of, decode=decode, reach=384, pool=pool)
    torch.cuda.synchronize()
    captured = time.perf_counter()
    weights = sum(block.bytes for block in model.blocks) + model.head.numel() * model.head.element_size()
    rows = []
    for decode in phases:
        times: dict[str, list[float]] = {arm: [] for arm in arms}
        model.position.fill_(256)
        graphs[decode, "TP"]()
        enough = max(6, min(replays, int(2e3 / events_ms(graphs[decode, "TP"], 1))))  # two seconds an arm
        for replay in range(enough):
            for arm in list(arms)[:: 1 if replay % 2 else -1]:
                model.position.fill_(256)
                times[arm].append(events_ms(graphs[decode, arm], 1))
        floor = limits.floor_ms(*model.work(256 if decode else None))
        for arm, taken in times.items():
            low, median, high = np.percentile(taken[enough // 10 :], [10, 50, 90]).round(4)
            rows.append({
                "model": name, "tp_size": tp_size, "batch_size": batch, "prompt_length": prompt,
                "phase": "decode at 256" if decode else "prefill", "arm": arm, "median_ms": median, "p10_ms": low,
                "p90_ms": high, "floor_ms": round(floor, 4), "over_floor": round(median / floor, 3),
                "weights_gb": round(weights / 1e9, 3), "bandwidth_tb_per_s": round(limits.bandwidth / 1e12, 3),
                "tflop_per_s": round(limits.flops / 1e12), "build_s": round(built - begun, 1),
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
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--tp-size", type=int, default=2)
    parser.add_argument("--shapes", nargs="+", default=["1x128", "1x2048", "16x128"], help="batch size x prompt tokens")
    parser.add_argument("--replays", type=int, default=60)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--table", type=Path, help="print the table of such a record, and measure nothing")
    options = parser.parse_args()
    if options.table:
        print(table(pd.read_csv(options.table)))
        raise SystemExit
    limits, found = Rates.measured(torch.bfloat16), []
    for name in options.models:
        for shape in options.shapes:
            batch, prompt = map(int, shape.split("x"))
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            torch.compiler.reset()
            found += measure(name, options.tp_size, batch, prompt, max(512, prompt + 64), options.replays, limits)
            if options.record:
                pd.DataFrame(found).to_csv(options.record, index=False)
