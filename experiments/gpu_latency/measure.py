"""Latencies of `latency=gpu` as one CSV: shapes, interconnects, arms, ceilings, floors and shares of communication.

    python -m experiments.gpu_latency.measure --models llama2_7b --tp-size 2 --interconnects native --record x.csv

    python -m experiments.gpu_latency.measure --table x.csv      # as Markdown

What `python run.py experiment=gpu_latency` measures, for machines that have neither Hydra nor lm-eval. Weights are
random. A row is one arm of one phase: milliseconds and speed-ups with what `spd.gpu.latency.summarise` says of them.
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

from spd.config import ROOT
from spd.gpu.latency import measure_gpu_latency, summarise
from spd.latency import METRICS

DROPS = (0.0, 0.25, 0.5, 0.7, 1.0)
ARMS = {"no_attention_all_reduce": "no attention all-reduce", "no_all_reduce": "no all-reduce", "tp_plan": "tp_plan"}


def rows_of(session: dict[str, Any], **of_all: Any) -> list[dict[str, Any]]:
    """A row for every phase and arm of a session, `of_all` in front of each."""
    rows = []
    for metric, arm in itertools.product(METRICS, [*session["arms"], *session["ceilings"]]):
        found = summarise(session, arm)
        faster, shares = found[metric.replace("_ms", "_speedup_percent")], found["communication"][metric]["after"] or {}
        chosen, link = (found["all_reduce"] or {}).get(metric) or {}, found["link"] or {}
        rows.append({
            **of_all,
            **{name: session[name] for name in ("tp_size", "interconnect", "batch_size", "prompt_length", "decode_at")},
            "metric": metric,
            "arm": ARMS.get(arm, arm),
            **{f"{name}_ms": found[metric][name] for name in ("median", "low", "high", "p10", "p90")},
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
            "peak_memory_gb": found["peak_memory_gb"],
            "launches": session["launches"],
            "repeats": session["repeats"],
        })  # fmt: skip
    if session["tp_plan"] is not None:
        theirs = summarise(session, "0")["tp_plan"]
        for metric in METRICS:
            like = next(row for row in rows if row["metric"] == metric)
            times = {f"{name}_ms": theirs[metric][name] for name in ("median", "low", "high")}
            blank = dict.fromkeys(name for name in like if name not in of_all and name not in session)
            rows.append(like | blank | {"metric": metric, "arm": ARMS["tp_plan"], **times})
    return rows


def table(rows: pd.DataFrame) -> str:
    """Milliseconds of every arm, with what they are over the floor, as Markdown."""
    arms = list(dict.fromkeys(rows["arm"]))
    heads = [
        "model",
        "tp",
        "interconnect",
        "batch",
        "phase",
        "floor",
        *(f"{arm} dropped" if arm.isdigit() else arm for arm in arms),
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    keys = ["model", "tp_size", "interconnect", "batch_size", "prompt_length", "decode_at", "metric"]
    for (model, tp, link, batch, prompt, at, metric), some in rows.groupby(keys, sort=False):
        by_arm = some.set_index("arm")
        phase = f"prefill {prompt}" if metric == "ttft_ms" else f"decode at {at}"
        cells = []
        for arm in arms:
            row = by_arm.loc[arm]
            over = "" if pd.isna(row["over_floor"]) else f" ({row['over_floor']:.2f})"
            cells.append(f"{row['median_ms']:.2f}{over}")
        lines.append(
            f"| {model} | {tp} | {link} | {batch} | {phase} | {by_arm['floor_ms'].iloc[0]:.2f} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama2_7b", "llama2_70b"])
    parser.add_argument("--tp-size", type=int, default=2)
    parser.add_argument("--interconnects", nargs="+", default=["native", "lbw"])
    parser.add_argument("--shapes", nargs="+", default=["1x128", "16x128", "1x2048"], help="batch size x prompt tokens")
    parser.add_argument("--launches", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tp-plan", action="store_true", help="transformers' own tensor parallelism as an arm")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--sessions", type=Path, help="folder for the whole sessions, timelines included")
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
    for name, link, shape in itertools.product(options.models, options.interconnects, options.shapes):
        architecture = yaml.safe_load((ROOT / f"conf/model/{name}.yaml").read_text())["architecture"]
        blocks = architecture["num_hidden_layers"]
        batch, prompt = map(int, shape.split("x"))
        numbers = sorted({int(drop * blocks + 0.5) for drop in DROPS})
        session = measure_gpu_latency(
            architecture,
            options.tp_size,
            {str(n): list(range(blocks - n, blocks)) for n in numbers},
            dtype="bfloat16",
            prompt_length=prompt,
            decode_at=256,
            new_tokens=32,
            batch_size=batch,
            launches=options.launches,
            repeats=options.repeats,
            warmup=2,
            all_reduce="auto",
            interconnect=link,
            tp_plan=options.tp_plan,
            timeout_s=600,
        )
        rows += rows_of(session, **here, model=name)
        if options.record:
            pd.DataFrame(rows).round(4).to_csv(options.record, index=False)
        if options.sessions:
            (options.sessions / f"{name}_{link}_{shape}.json").write_text(json.dumps(session))
        print(name, link, shape, session["launch_s"], session["seconds"], flush=True)
    print(table(pd.DataFrame(rows)))
