"""Latencies of `latency=gpu` as one CSV: shapes, interconnects, arms, ceilings, floors and shares of communication.

    python -m experiments.gpu_latency.measure --models llama2_7b --tp-size 2 --interconnects native --record x.csv

    python -m experiments.gpu_latency.measure --table x.csv      # as Markdown

What `python run.py experiment=gpu_latency` measures, for machines that have neither Hydra nor lm-eval, and with all
shapes in one launch. Weights are random. A row is one arm of one phase: milliseconds and speed-ups with what
`spd.gpu.latency.summarise` says of them. Rows are written as they come, and a session that failed is missing from them.
"""

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
import yaml

from spd.checkpoint import read_architecture
from spd.config import ROOT
from spd.errors import UserError
from spd.families import family_of
from spd.gpu.latency import Shape, measure_gpu_latency, summarise
from spd.gpu.memory import needed
from spd.latency import METRICS
from spd.launch import RankFailed

DROPS = (0.0, 0.25, 0.5, 0.7, 1.0)
SHAPES = {
    "1x128": Shape(1, 128, decode_at=256, repeats=20, blocks_alone=True),
    "16x128": Shape(16, 128, decode_at=256, repeats=10),
    "1x2048": Shape(1, 2048, decode_at=2048, repeats=10),
    "16x2048": Shape(16, 2048, decode_at=2048, repeats=4),
}
"""Batch size x prompt tokens; the longer a forward takes, the less its time varies."""
NEW_TOKENS = 8
ARMS = {"no_attention_all_reduce": "no attention all-reduce", "no_all_reduce": "no all-reduce", "tp_plan": "tp_plan"}


def arms_of(blocks: int) -> dict[str, list[int]]:
    """Number of dropped blocks -> the last so many: of random weights, which are dropped costs no time."""
    numbers = sorted({int(drop * blocks + 0.5) for drop in DROPS})
    return {str(number): list(range(blocks - number, blocks)) for number in numbers}


def rows_of(session: dict[str, Any], blocks: int, **of_all: Any) -> list[dict[str, Any]]:
    """A row for every phase and arm of a session of a model of so many blocks, `of_all` in front of each."""
    rows = []
    of_session = ("tp_size", "interconnect", "batch_size", "prompt_length", "decode_at", "launches", "repeats")
    of_all = of_all | {name: session[name] for name in of_session}
    for metric, arm in itertools.product(METRICS, [*session["arms"], *session["ceilings"]]):
        found = summarise(session, arm)
        faster, shares = found[metric.replace("_ms", "_speedup_percent")], found["communication"][metric]["after"] or {}
        chosen, link = (found["all_reduce"] or {}).get(metric) or {}, found["link"] or {}
        alone = (found["blocks_ms"] or {}).get(metric, {})
        rows.append({
            **of_all,
            "metric": metric,
            "arm": ARMS.get(arm, arm),
            "drop": round(int(arm) / blocks, 4) if arm.isdigit() else None,
            **{f"{name}_ms": found[metric][name] for name in ("median", "low", "high", "p10", "p90")},
            "blocks_alone_ms": alone.get("median"),
            **{f"speedup_percent_{name}": faster[name] for name in ("median", "low", "high")},
            "fraction_of_ceiling": found["fraction_of_ceiling"][metric],
            "floor_ms": found["floor_ms"][metric],
            "over_floor": found["over_floor"][metric],
            "communication_share": shares.get("share"),
            "communication_overlap": shares.get("overlap"),
            "all_reduce": chosen.get("kind"),
            "all_reduce_us": chosen["us"][chosen["kind"]] if chosen else None,
            "fell_back": json.dumps(chosen.get("fell_back", {})),
            "link_small_message_us": link.get("small_message_us"),
            "link_bandwidth_gb_per_s": link.get("bandwidth_gb_per_s"),
            "tokens_per_s": found["tokens_per_s"]["median"] if metric == "tpot_ms" else None,
            "peak_memory_gb": found["peak_memory_gb"]["median"],
        })  # fmt: skip
    if session["tp_plan"] is not None:
        theirs = summarise(session, "0")["tp_plan"]
        for metric in METRICS:
            times = {f"{name}_ms": theirs[metric][name] for name in ("median", "low", "high")}
            rows.append(dict.fromkeys(rows[0]) | of_all | {"metric": metric, "arm": ARMS["tp_plan"], **times})
    return rows


def table(rows: pd.DataFrame) -> str:
    """Milliseconds of every arm, with what they are over the floor, as Markdown; arms by drop fraction."""
    rows = rows.assign(arm=[column(arm, drop) for arm, drop in zip(rows["arm"], rows["drop"], strict=True)])
    arms = list(dict.fromkeys(rows["arm"]))
    heads = ["model", "tp", "interconnect", "batch", "phase", "floor", *arms]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    keys = ["model", "tp_size", "interconnect", "batch_size", "prompt_length", "decode_at", "metric"]
    for (model, tp, link, batch, prompt, at, metric), some in rows.groupby(keys, sort=False):
        by_arm = some.set_index("arm")
        phase = f"prefill {prompt}" if metric == "ttft_ms" else f"decode at {at}"
        cells = []
        for arm in arms:
            if arm not in by_arm.index:  # a family that transformers has no plan for
                cells.append("")
                continue
            row = by_arm.loc[arm]
            over = "" if pd.isna(row["over_floor"]) else f" ({row['over_floor']:.2f})"
            cells.append(f"{row['median_ms']:.2f}{over}")
        lines.append(
            f"| {model} | {tp} | {link} | {batch} | {phase} | {by_arm['floor_ms'].iloc[0]:.2f} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def column(arm: str, drop: float) -> str:
    """An arm's name in a table of models with different numbers of blocks: the nearest of the fractions asked for."""
    return arm if pd.isna(drop) else f"{100 * min(DROPS, key=lambda asked: abs(asked - drop)):g} %"


def fitting(architecture: dict[str, Any], tp_size: int, names: list[str]) -> list[Shape]:
    """Those of the shapes for which a rank's part fits into a GPU of this machine; says which do not."""
    config, free = read_architecture(architecture), torch.cuda.mem_get_info(0)[0]
    found = []
    for name in names:
        shape = SHAPES[name]
        cache = shape.cache_length(NEW_TOKENS)
        asked = needed(config, family_of(config), tp_size, shape.batch_size, shape.prompt_length, cache, torch.bfloat16)
        if asked.total < free:
            found.append(shape)
        else:
            print(f"{name} does not fit: {asked}", flush=True)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama2_7b", "llama2_70b"])
    parser.add_argument("--tp-size", type=int, default=2)
    parser.add_argument("--interconnects", nargs="+", default=["native", "lbw"])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--launches", type=int, default=3)
    parser.add_argument("--tp-plan", action="store_true", help="transformers' own tensor parallelism as an arm")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--timelines", type=Path, help="JSON for the kernels of one block, TP and SPD")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no session after so many")
    parser.add_argument("--table", type=Path, help="print the table of such a record, and measure nothing")
    options = parser.parse_args()
    if options.table:
        print(table(pd.read_csv(options.table, dtype={"arm": str})))
        raise SystemExit
    here = {
        "date": time.strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),  # type: ignore[attr-defined]
    }
    rows: list[dict[str, Any]] = []
    timelines: list[dict[str, Any]] = []
    began = time.monotonic()
    for name, link in itertools.product(options.models, options.interconnects):
        if time.monotonic() - began > options.seconds:
            print(f"{name} {link}: not begun, the time is up", flush=True)
            continue
        architecture = yaml.safe_load((ROOT / f"conf/model/{name}.yaml").read_text())["architecture"]
        blocks = architecture["num_hidden_layers"]
        try:
            sessions = measure_gpu_latency(
                architecture,
                options.tp_size,
                arms_of(blocks),
                fitting(architecture, options.tp_size, options.shapes),
                dtype="bfloat16",
                new_tokens=NEW_TOKENS,
                launches=options.launches,
                warmup=1,
                all_reduce="auto",
                interconnect=link,
                tp_plan=options.tp_plan and architecture["model_type"] != "opt",
                timeout_s=600,
            )
        except (UserError, RankFailed) as error:  # what was measured before is not lost with it
            print(f"{name} {link}: {error}", flush=True)
            continue
        for session in sessions:
            rows += rows_of(session, blocks, **here, model=name)
            batch, prompt = session["batch_size"], session["prompt_length"]
            of = {"model": name, "tp_size": options.tp_size, "interconnect": link, "blocks": blocks}
            of |= {"batch_size": batch, "prompt_length": prompt, "decode_at": session["decode_at"]}
            timelines.append(of | {"timeline": session["timeline"][0]})
            print(name, link, f"{batch}x{prompt}", session["launch_s"], session["seconds"], session["capture_s"])
        if options.record:
            pd.DataFrame(rows).round(4).to_csv(options.record, index=False)
        if options.timelines:
            options.timelines.write_text(json.dumps(timelines))
    print(table(pd.DataFrame(rows)))
