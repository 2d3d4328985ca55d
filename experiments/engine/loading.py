"""How much memory loading takes: the peak of each process against the shard it ends up with.

    python -m experiments.engine.loading

makes a random checkpoint of 2.3 GB in a temporary folder, loads it with one rank a process and with virtual ranks, and
writes loading.json beside this file. Peaks are the kernel's (VmHWM, mapped files included), above what the process had
after its imports.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import spd
from spd.launch import run_ranks
from spd.results import environment

HERE = Path(__file__).parent
SMALL_MODEL = HERE.parent / "reference/models/ref_llama"
CONFIG = LlamaConfig(
    hidden_size=2048, intermediate_size=5632, num_hidden_layers=20, num_attention_heads=16, vocab_size=32000
)


def make_checkpoint(folder: Path) -> int:
    """Writes random bfloat16 weights of the config, one file a block; returns their bytes."""
    CONFIG.dtype = torch.bfloat16
    CONFIG.save_pretrained(folder)
    for tokenizer in SMALL_MODEL.glob("token*"):
        shutil.copy(tokenizer, folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(CONFIG).named_parameters()}
    files: dict[str, dict[str, torch.Size]] = {}
    for name, shape in shapes.items():
        block = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"model-{block}.safetensors", {})[name] = shape
    total = 0
    for file, tensors in files.items():
        weights = {name: torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02) for name, shape in tensors.items()}
        total += sum(weight.nbytes for weight in weights.values())
        save_file(weights, folder / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, tensors in files.items() for name in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def measure_rank(arguments: dict[str, Any], on_progress: Any) -> dict[str, Any]:
    """Loads the checkpoint in this process; bytes of its weights and of the peak above the start, for every rank."""
    # What a first load imports should not count as the checkpoint's memory.
    spd.load(arguments["small_model"], tp_size=1)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    model = spd.load(arguments["folder"], tp_size=arguments["tp_size"], ranks=arguments["ranks"])
    mine = torch.tensor([sum(p.nbytes for p in model.parameters()), _status("VmHWM") - before])
    if arguments["ranks"] == "virtual":
        return {"ranks": [mine.tolist()]}
    every = [torch.zeros_like(mine) for _ in range(arguments["tp_size"])]
    torch.distributed.all_gather(every, mine)
    return {"ranks": [pair.tolist() for pair in every]}


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    """Measures and writes loading.json."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        total = make_checkpoint(Path(folder))
        for ranks, tp_size, processes in (("processes", 2, 2), ("processes", 4, 4), ("virtual", 8, 1)):
            arguments = {"folder": folder, "tp_size": tp_size, "ranks": ranks, "small_model": str(SMALL_MODEL)}
            measured = run_ranks("experiments.engine.loading:measure_rank", arguments, tp_size=processes)
            for rank, (shard, peak) in enumerate(measured["ranks"]):
                row = {"ranks": ranks, "tp_size": tp_size, "rank": rank, "shard_gb": shard / 1e9, "peak_gb": peak / 1e9}
                rows.append(row | {"peak_over_shard": peak / shard})
                print({name: round(v, 3) if isinstance(v, float) else v for name, v in rows[-1].items()})
    record = {"checkpoint_gb": total / 1e9, "rows": rows, "environment": environment()}
    (HERE / "loading.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
