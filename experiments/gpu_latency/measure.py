"""Latencies of `latency=gpu` as one CSV: shapes, interconnects, arms, ceilings, floors and shares of communication.

    python -m experiments.gpu_latency.measure out --models llama2_7b --tp-size 2 --interconnects native --launches 3
    python -m experiments.gpu_latency.measure out --launches 0      # out/latency.csv and the table of what is there

The models, interconnects, shapes and arms of `python run.py experiment=gpu_latency`, with fewer tokens and repeats and
decoding beside the shorter prompt alone, for machines that have neither Hydra nor lm-eval, and with all shapes in one
launch. Weights are random. `out/sessions.json` is written after every launch, and launches are added to what is in it:
a measurement can be stopped and go on, and a launch that fails loses nothing else; its ranks' output is in `out/logs`.
`out/power.csv` has what clock and power the GPUs had meanwhile.
A row of `out/latency.csv` is one arm of one phase: milliseconds and speed-ups with what `spd.gpu.summary.summarise`
says of them.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
import yaml

from experiments.gpu_latency.power import COLUMNS, sampled
from spd.checkpoint import read_architecture
from spd.errors import UserError
from spd.families import family_of
from spd.gpu.interconnect import ENVIRONMENT
from spd.gpu.latency import Shape, check_gpus, measure_gpu_latency, merged
from spd.gpu.memory import needed
from spd.gpu.summary import summarise
from spd.launch import RankFailed
from spd.paths import ROOT
from spd.results import gpu_engine

DROPS = (0.0, 0.25, 0.5, 0.7, 1.0)
SHAPES = {
    "1x128": Shape(1, 128, decode_at=256, repeats=20),
    "16x128": Shape(16, 128, decode_at=256, repeats=12),
    "1x2048": Shape(1, 2048, decode_at=None, repeats=20),
    "16x2048": Shape(16, 2048, decode_at=None, repeats=4),
}
"""Batch size x prompt tokens; the longer a forward takes, the less its time varies. Repeats are even: ABBA."""
LARGE = 2 * 10**10
"""Bytes of a rank's weights from which on shapes but 1 x 128 are repeated half as often, and 16 x 2048 tokens are
`Shape.long`."""
NEW_TOKENS = 4
ONCE = ("start", "links", "build")
"""What a launch does once for all of its shapes."""
WARMUP = 1
"""Rounds of all arms. In the first a GPU is cool, and until it runs into its power limit up to 8 % quicker."""
PHASES = {"ttft_ms": "prefill", "tpot_ms": "decode"}
POWER = ["model", "tp_size", "interconnect", "launch", "seconds", *COLUMNS.values()]
ARMS = {"no_attention_all_reduce": "no attention all-reduce", "no_all_reduce": "no all-reduce", "tp_plan": "tp_plan"}


def arms_of(blocks: int) -> dict[str, list[int]]:
    """Number of dropped blocks -> the last so many: of random weights, which are dropped costs no time."""
    numbers = sorted({int(drop * blocks + 0.5) for drop in DROPS})
    return {str(number): list(range(blocks - number, blocks)) for number in numbers}


def rows_of(session: dict[str, Any], blocks: int, **of_all: Any) -> list[dict[str, Any]]:
    """A row for every phase and arm of a session of a model of so many blocks, `of_all` in front of each.

    "confidence" is of every interval "low" to "high"; "all_reduce" names all that were chosen, where launches differ.
    """
    rows = []
    of_session = ("tp_size", "interconnect", "batch_size", "prompt_length", "decode_at", "launches", "repeats")
    of_all = of_all | {name: session[name] for name in of_session}
    for metric, arm in itertools.product(session["metrics"], [*session["arms"], *session["ceilings"]]):
        found = summarise(session, arm)
        faster, shares = found[metric.replace("_ms", "_speedup_percent")], found["communication"][metric]["after"] or {}
        chosen, link = [of[metric] for of in session["all_reduce"] if of and metric in of], found["link"] or {}
        alone = (found["blocks_ms"] or {}).get(metric, {})
        ceiling = found["fraction_of_ceiling"][metric] or {}
        tokens = (found["tokens_per_s"] or {}) if metric == "tpot_ms" else {}
        rows.append({
            **of_all,
            "confidence": found["confidence"],
            "metric": metric,
            "arm": ARMS.get(arm, arm),
            "drop": round(int(arm) / blocks, 4) if arm.isdigit() else None,
            **{f"{name}_ms": found[metric][name] for name in ("median", "low", "high", "p10", "p90")},
            **{f"blocks_alone_ms_{name}": alone.get(name) for name in ("median", "low", "high")},
            **{f"speedup_percent_{name}": faster[name] for name in ("median", "low", "high")},
            **{f"fraction_of_ceiling_{name}": ceiling.get(name) for name in ("median", "low", "high")},
            **{f"tokens_per_s_{name}": tokens.get(name) for name in ("median", "low", "high", "p10", "p90")},
            "gpu_bandwidth_gb_per_s": found["rates"]["bandwidth_gb_per_s"],
            "gpu_tflop_per_s": found["rates"]["tflop_per_s"],
            "floor_ms": found["floor_ms"][metric],
            "over_floor": found["over_floor"][metric],
            "communication_share": shares.get("share"),
            "communication_overlap": shares.get("overlap"),
            "kernels": json.dumps([launch[PHASES[metric]] for launch in session["kernels"]]),
            "all_reduce": ", ".join(dict.fromkeys(of["kind"] for of in chosen)) or None,
            "all_reduce_us": statistics.median(of["us"][of["kind"]] for of in chosen) if chosen else None,
            "fell_back": json.dumps({kind: why for of in chosen for kind, why in of["fell_back"].items()}),
            "link_small_message_us": link.get("small_message_us"),
            "link_bandwidth_gb_per_s": link.get("bandwidth_gb_per_s"),
            **{f"peak_memory_gb_{name}": value for name, value in found["peak_memory_gb"].items()},
        })  # fmt: skip
    if session["tp_plan"] is not None:
        theirs = summarise(session, "0")["tp_plan"]
        for metric in session["metrics"]:
            times = {f"{name}_ms": theirs[metric][name] for name in ("median", "low", "high", "p10", "p90")}
            slower = {f"times_ours_{name}": theirs["times_ours"][metric][name] for name in ("median", "low", "high")}
            rows.append(dict.fromkeys(rows[0]) | of_all | {"metric": metric, "arm": ARMS["tp_plan"], **times, **slower})
    return rows


def table(rows: pd.DataFrame) -> str:
    """What dropping saves, as Markdown: TP's milliseconds, in brackets how many times their floor that is, and percent
    of them saved by drop fraction and by the ceilings; with intervals over launches where there are three."""
    rows = rows[rows["arm"] != ARMS["tp_plan"]]
    rows = rows.assign(arm=[column(arm, drop) for arm, drop in zip(rows["arm"], rows["drop"], strict=True)])
    tp, *others = dict.fromkeys(rows["arm"])
    heads = ["model", "tp", "interconnect", "batch", "phase", "TP, ms (times its floor)", *others]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    keys = ["model", "tp_size", "interconnect", "batch_size", "prompt_length", "decode_at", "metric"]
    for (model, tp_size, link, batch, prompt, at, metric), some in rows.groupby(keys, sort=False, dropna=False):
        by_arm = some.set_index("arm")
        phase = phase_of(metric, prompt, at)
        cells = [f"{by_arm.loc[tp, 'median_ms']:.2f} ({by_arm.loc[tp, 'over_floor']:.2f})"]
        for arm in others:
            saved = by_arm.reindex([arm])[[f"speedup_percent_{name}" for name in ("median", "low", "high")]]
            cells.append(_with_interval(1, *saved.to_numpy(float)[0]))
        lines.append(f"| {model} | {tp_size} | {link} | {batch} | {phase} | {' | '.join(cells)} |")
    return "\n".join(lines)


def reached(rows: pd.DataFrame) -> str:
    """Percent of what leaving out the attention all-reduces saves that dropping all blocks does, as Markdown; with
    intervals over launches where there are three."""
    rows = rows[rows["drop"] == 1]
    shapes = rows[["metric", "prompt_length", "decode_at", "batch_size"]].itertuples(index=False, name=None)
    names = [f"fraction_of_ceiling_{name}" for name in ("median", "low", "high")]
    cells = [_with_interval(0, *part) for part in (100 * rows[names]).itertuples(index=False, name=None)]
    wide = rows.assign(phase=[f"{phase_of(*of)}, {batch}" for *of, batch in shapes], cell=cells).pivot_table(
        index=["model", "tp_size", "interconnect"], columns="phase", values="cell", aggfunc="first", sort=False
    )
    heads = ["model", "tp", "interconnect", *wide.columns]
    shown = [f"| {' | '.join(map(str, row))} |" for row in wide.fillna("").reset_index().to_numpy()]
    return "\n".join([f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *shown])


def _with_interval(digits: int, median: float, low: float, high: float) -> str:
    if pd.isna(median):
        return ""
    return f"{median:.{digits}f}" if pd.isna(low) else f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def phase_of(metric: str, prompt_length: int, decode_at: float) -> str:
    """How a table or figure names what was timed."""
    return f"prefill {prompt_length}" if metric == "ttft_ms" else f"decode at {decode_at:.0f}"


def column(arm: str, drop: float) -> str:
    """An arm's name in a table of models with different numbers of blocks: the nearest of the fractions asked for."""
    return arm if pd.isna(drop) else f"{100 * min(DROPS, key=lambda asked: abs(asked - drop)):g} %"


def fitting(architecture: dict[str, Any], tp_size: int, names: list[str]) -> dict[str, Shape]:
    """Those of the shapes for which a rank's part fits into a GPU of this machine; says which do not."""
    config, whole = read_architecture(architecture), torch.cuda.get_device_properties(0).total_memory
    found = {}
    for name in names:
        shape = SHAPES[name]
        asked = needed(config, family_of(config), tp_size, **shape.sizes(NEW_TOKENS), dtype=torch.bfloat16)
        if asked.fits(whole):
            fewer: dict[str, Any] = {"repeats": max(2, shape.repeats // 4 * 2), "long": name == "16x2048"}
            found[name] = shape._replace(**fewer) if asked.weights > LARGE and name != "1x128" else shape
        else:
            print(f"{name} does not fit: {asked}", flush=True)
    return found


def add_launch(
    entry: dict[str, Any],
    launch: int,
    shapes: dict[str, Shape],
    link: str,
    options: argparse.Namespace,
    timeout_s: float,
) -> None:
    """Adds one launch of some shapes to what `sessions.json` has of a model and interconnect.

    Raises:
        UserError: what is there was measured with another GPU, versions or settings; or as `measure_gpu_latency` does.
        spd.launch.RankFailed: a rank died, or the launch took too long.
    """
    now, before, sessions = here(), entry["here"] or {}, entry["sessions"]
    asked = {name: shape._replace(blocks_alone=name in options.blocks_alone) for name, shape in shapes.items()}
    differs = [(name, before[name], now[name]) for name in before if name != "date" and now[name] != before[name]]
    for shape in set(asked) & set(sessions):
        wanted = asked[shape]._asdict() | {"new_tokens": NEW_TOKENS, "warmup": WARMUP, "tp_plan": options.tp_plan}
        there = sessions[shape] | {"tp_plan": sessions[shape]["tp_plan"] is not None}
        given = ((name, there.get(name), value) for name, value in wanted.items())
        differs += [(f"{shape}: {name}", was, value) for name, was, value in given if was != value]
    if differs:
        said = ", ".join(f"{name} {there}, here {here}" for name, there, here in differs)
        raise UserError(f"{options.folder} has launches of it with {said}; take another folder")
    with sampled() as samples:
        found = measure_gpu_latency(
            architecture_of(entry["model"]),
            options.tp_size,
            arms_of(entry["blocks"]),
            list(asked.values()),
            dtype="bfloat16",
            new_tokens=NEW_TOKENS,
            launches=1,
            first_launch=launch,
            warmup=WARMUP,
            all_reduce="auto",
            interconnect=link,
            tp_plan=options.tp_plan,
            timeout_s=timeout_s,
            log_dir=options.folder / "logs",
        )
    for name, session in zip(asked, found, strict=True):
        sessions[name] = merged(sessions[name], session) if name in sessions else session
    dates = {now["date"], *before.get("date", now["date"]).split(", ")}
    entry["here"] = now | {"date": ", ".join(sorted(dates))}
    if samples:
        of_launch = {"model": entry["model"], "tp_size": options.tp_size, "interconnect": link, "launch": launch}
        file = options.folder / "power.csv"
        pd.concat(samples).assign(**of_launch)[POWER].to_csv(file, mode="a", header=not file.exists(), index=False)


def architecture_of(model: str) -> dict[str, Any]:
    """That of `conf/model`."""
    found: dict[str, Any] = yaml.safe_load((ROOT / f"conf/model/{model}.yaml").read_text())["architecture"]
    return found


def done(entry: dict[str, Any], shape: str) -> int:
    """How many launches there are of a shape."""
    launches: int = entry["sessions"].get(shape, {"launches": 0})["launches"]
    return launches


def seconds_of(entry: dict[str, Any], shapes: dict[str, Shape]) -> float | None:
    """How long a launch of some shapes should take, by the last one of each; None where there was none."""
    if not set(shapes) <= set(entry["sessions"]):
        return None
    last = [entry["sessions"][name]["seconds"][-1] for name in shapes]
    once = max(sum(of.get(step, 0) for step in ONCE) for of in last)
    return once + sum(taken for of in last for step, taken in of.items() if step not in ONCE)


def here() -> dict[str, Any]:
    """What this machine measures with."""
    smi = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name(0),
        "gpus": torch.cuda.device_count(),
        "driver": subprocess.run(smi, capture_output=True, text=True, check=True).stdout.strip(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),  # type: ignore[attr-defined]
        "nccl_nvls": os.environ.get("NCCL_NVLS_ENABLE", "by default"),
        "cudnn": torch.backends.cudnn.version(),
        "triton": version("triton"),
        "engine": gpu_engine(),
    }


def main(arguments: list[str] | None = None) -> None:
    """Adds the launches that are missing, then writes the CSV and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where sessions.json is, or shall be")
    models = sorted(path.stem for path in (ROOT / "conf/model").glob("*.yaml") if "architecture:" in path.read_text())
    parser.add_argument("--models", nargs="+", default=["llama2_7b", "llama2_70b"], choices=models)
    parser.add_argument("--tp-size", type=int, default=2)
    parser.add_argument("--interconnects", nargs="+", default=["native", "lbw"], choices=list(ENVIRONMENT))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument(
        "--launches", type=int, default=3, help="how many there shall be, those that are there included"
    )
    parser.add_argument(
        "--blocks-alone", nargs="*", default=[], choices=list(SHAPES), help="shapes whose blocks are timed alone too"
    )
    parser.add_argument("--tp-plan", action="store_true", help="transformers' own tensor parallelism as an arm")
    parser.add_argument("--timeout", type=float, default=500, help="seconds that one launch may take")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no launch that would end later")
    options = parser.parse_args(arguments)
    if options.launches:
        check_gpus(options.tp_size)
    options.folder.mkdir(parents=True, exist_ok=True)
    file, began, failed, failures = options.folder / "sessions.json", time.monotonic(), 0, 0
    found: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    for launch, name, link in itertools.product(range(options.launches), options.models, options.interconnects):
        key = f"{name} tp{options.tp_size} {link}"
        new = {"model": name, "here": None, "sessions": {}, "blocks": architecture_of(name)["num_hidden_layers"]}
        entry = found.get(key, new)
        missing = [shape for shape in options.shapes if done(entry, shape) == launch]
        if not missing or not (shapes := fitting(architecture_of(name), options.tp_size, missing)):
            continue
        left = options.seconds - (time.monotonic() - began)
        like = [entry, *(other for other in found.values() if other["model"] == name)]
        if next(filter(None, (seconds_of(other, shapes) for other in like)), 0) > left:
            print(f"{key}, launch {launch}: not begun, it would end after {options.seconds:g} s", flush=True)
            continue
        try:
            add_launch(entry, launch, shapes, link, options, min(options.timeout, left))
        except (UserError, RankFailed) as error:  # what was measured before is not lost with it
            print(f"{key}, launch {launch}: {error}", flush=True)
            # What is refused costs no time and says nothing of the next.
            failed, failures = failed + isinstance(error, RankFailed), failures + 1
            if failed == 2:
                print("two failed one after the other: no more are begun", flush=True)
                break
            continue
        failed, found[key] = 0, entry
        took = {shape: entry["sessions"][shape]["seconds"][-1] for shape in shapes}
        print(f"{key}, launch {launch}: {time.monotonic() - began:.0f} s until here, of them {took}", flush=True)
        draft = file.with_suffix(".draft")
        draft.write_text(json.dumps(found))
        draft.replace(file)
    if not found:
        raise SystemExit("nothing was measured")
    rows = pd.DataFrame([
        row
        for entry in found.values()
        for session in entry["sessions"].values()
        for row in rows_of(session, entry["blocks"], **entry["here"], model=entry["model"])
    ]).round(4)  # fmt: skip
    rows.to_csv(options.folder / "latency.csv", index=False)
    print(table(rows), reached(rows), sep="\n\n")
    if failures:
        raise SystemExit(f"{failures} launches failed")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"Error: {error}") from error
