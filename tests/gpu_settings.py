"""What the tests of latency=gpu share: models, a shape and the settings of a session."""

import pytest
import torch
import yaml

from spd.config import ROOT
from spd.gpu.latency import Shape

REFERENCE = ROOT / "experiments/reference/models/ref_llama"
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU on this machine")


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
