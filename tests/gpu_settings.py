"""What the tests of latency=gpu share: models, a shape and the settings of a session."""

from types import SimpleNamespace

import pytest
import torch
import yaml

from spd.gpu.latency import CEILINGS, Shape
from spd.paths import ROOT

REFERENCE = ROOT / "experiments/reference/models/ref_llama"
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU on this machine")


def on_gpus(number: int) -> pytest.MarkDecorator:
    return pytest.mark.skipif(torch.cuda.device_count() < number, reason=f"torch sees no {number} GPUs on this machine")


def architecture(name: str) -> dict:
    return yaml.safe_load((ROOT / f"conf/model/{name}.yaml").read_text())["architecture"]


SMALL = {
    "llama": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 8,
              "num_key_value_heads": 2, "vocab_size": 50},
    "qwen2": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 4, "vocab_size": 50, "tie_word_embeddings": True},
    "opt": {"hidden_size": 64, "ffn_dim": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50,
            "word_embed_proj_dim": 64, "max_position_embeddings": 64},
}  # fmt: skip

SETTINGS = {
    "dtype": "bfloat16", "new_tokens": 4, "launches": 1, "warmup": 1, "all_reduce": "auto", "interconnect": "native",
    "timeout_s": 300,
}  # fmt: skip
SHAPE = Shape(batch_size=2, prompt_length=32, decode_at=64, repeats=4, blocks_alone=True)
INVENTED = Shape(batch_size=4, prompt_length=128, decode_at=256, repeats=3)


def invented_session(launches: int = 5, shape: Shape = INVENTED, most: str = "6") -> dict:
    """Times without noise but for a launch's own pace: arm `most` saves 10 %, the ceiling 20 %."""
    paces = [1 + launch / 10 for launch in range(launches)]
    of = {"0": 10.0, most: 9.0, "no_attention_all_reduce": 8.0, "no_all_reduce": 6.0}
    times = {arm: [[pace * ms * wobble for wobble in (0.9, 1, 1.1)] for pace in paces] for arm, ms in of.items()}
    each = {metric: {arm: ms / 2 for arm, ms in of.items()} for metric in shape.metrics}
    shares = {m: {arm: {"share": ms / 100, "overlap": 0.0, "busy": 1.0} for arm, ms in of.items()} for m in each}
    return shape._asdict() | {
        "source": "measured",
        "backend": "nccl",
        "device": "cuda",
        "dtype": "bfloat16",
        "tp_size": 2,
        "new_tokens": 8,
        "interconnect": "native",
        "launches": launches,
        "arms": {"0": [], most: list(range(int(most)))},
        "metrics": list(shape.metrics),
        "ceilings": list(CEILINGS),
        **dict.fromkeys(shape.metrics, times),
        "tp_plan": None,
        **{name: [None] * launches for name in ("link", "all_reduce", "nccl_environment", "timeline", "launch_s")},
        "rates": [{"bandwidth_gb_per_s": 4000.0, "tflop_per_s": 800.0}] * launches,
        "kernels": [{"prefill": {}, "decode": {}}] * launches,
        "seconds": [{"time": 1.0}] * launches,
        "peak_memory_gb": [7.0] * launches,
        "floor_ms": [each] * launches,
        "communication": [shares] * launches,
    }


def has_memory(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every GPU of this machine has so many bytes."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=size))
