"""Folders that are not what they should be, refused before anything is computed."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import spd
from spd.checkpoint import Checkpoint, fingerprint, read_tokenizer, resolve


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of a good checkpoint, to be spoilt."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def refused(folder: Path | str, message: str) -> None:
    with pytest.raises(spd.UserError, match=message):
        spd.load(folder, tp_size=2)


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "no folder .*nothing")


def test_a_hub_id_that_cannot_be_had_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused("nobody/nothing", "'nobody/nothing' is neither a folder here nor")


def test_a_hub_id_is_found_in_the_hubs_cache(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    commit = "0" * 40
    kept = tmp_path / "models--somebody--tiny"
    shutil.copytree(tiny_llama, kept / "snapshots" / commit)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    ids = torch.arange(4, 12)[None]
    assert torch.equal(spd.load("somebody/tiny", tp_size=2)(ids), spd.load(tiny_llama, tp_size=2)(ids))


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "has no config.json"),
        ("tokenizer.json", "has no tokenizer .*tokenizer.save_pretrained"),
        ("model.safetensors", "has no weights"),
    ],
)
def test_a_folder_without_one_of_its_parts_is_refused(folder: Path, missing: str, message: str) -> None:
    (folder / missing).unlink()
    refused(folder, message)


def test_pickled_weights_are_refused_and_never_opened(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, r"pickled weights only \(pytorch_model.bin\).*save_pretrained")


def test_a_truncated_weight_file_is_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(folder, "model.safetensors is damaged or was cut short")


def test_a_weight_file_the_index_names_but_that_is_missing_is_refused(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "model-00002-of-00002.safetensors is named by the weight index but missing")


def test_a_tensor_that_is_missing_is_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, "1 tensors of the model are not in its weights, 'model.layers.1.mlp.up_proj.weight' first")


def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(31)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, r"'model.norm.weight' is \[31\] in the file and \[32\] by the config")


def test_an_unknown_family_names_those_known_and_how_to_add_one(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    refused(folder, "'gpt2' is not known; known are llama, opt, qwen2.*one row in spd/families.py")


def test_a_family_that_transformers_does_not_know_either_is_refused_alike(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mine"}))
    refused(folder, "'mine' is not known; known are llama, opt, qwen2")


def test_quantised_weights_are_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.int8)}, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, f"1 tensors are stored as I8, '{name}' first; quantised weights are not supported")
    config = json.loads((folder / "config.json").read_text())
    quantised = config | {"quantization_config": {"quant_method": "fp8"}}
    (folder / "config.json").write_text(json.dumps(quantised))
    refused(folder, "This checkpoint is quantised")


def test_a_stray_output_bias_in_the_file_is_ignored_as_transformers_does(folder: Path, tiny_llama: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.bias"] = torch.ones(32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ids = torch.arange(4, 12)[None]
    assert torch.equal(spd.load(folder, tp_size=2)(ids), spd.load(tiny_llama, tp_size=2)(ids))


def test_a_tokenizer_file_that_is_damaged_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(spd.UserError, match=r"tokenizer in .* cannot be used"):
        read_tokenizer(folder)


def test_a_config_that_is_no_json_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    refused(folder, "config.json.* cannot be used")


def test_remote_code_is_never_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "mine.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    spd.load(folder, tp_size=2)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("family", ["opt"])
def test_post_norm_opt_is_refused(checkpoint: Callable[..., Path], family: str) -> None:
    refused(checkpoint(family, do_layer_norm_before=False), "pre-norm blocks only")


def test_sliding_window_attention_is_refused(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    refused(folder, "sliding-window attention")


@pytest.mark.parametrize(("tp_size", "sizes"), [(3, "1, 2, 4, 8"), (16, "1, 2, 4, 8"), (0, "1, 2, 4, 8")])
def test_a_tp_size_that_does_not_divide_says_which_sizes_do(tiny_llama: Path, tp_size: int, sizes: str) -> None:
    with pytest.raises(spd.UserError, match=f"tp_size={tp_size} .*8 heads.*width of 48. Sizes that do: {sizes}"):
        spd.load(tiny_llama, tp_size=tp_size)


def test_a_tp_size_that_divides_the_heads_but_not_the_mlp_is_refused(checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(spd.UserError, match=r"Sizes that do: 1, 2\.$"):
        spd.load(checkpoint("llama", intermediate_size=50), tp_size=4)


def test_an_unknown_dtype_or_kind_of_ranks_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(spd.UserError, match="dtype 'int8' is not known"):
        spd.load(tiny_llama, dtype="int8")
    with pytest.raises(spd.UserError, match="ranks='threads' is not known"):
        spd.load(tiny_llama, ranks="threads")
    with pytest.raises(spd.UserError, match="device='gpu' is not known; write cpu"):
        spd.load(tiny_llama, device="gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(spd.UserError, match="no GPU here"):
        spd.load(tiny_llama, device="cuda")


def test_slices_are_the_rows_and_columns_of_the_tensor(tiny_llama: Path) -> None:
    checkpoint, name = Checkpoint(resolve(tiny_llama)), "model.layers.0.mlp.down_proj.weight"
    whole = load_file(tiny_llama / "model.safetensors")[name]
    assert torch.equal(checkpoint.read(name), whole)
    assert torch.equal(checkpoint.read(name, slice(3, 7)), whole[3:7])
    assert torch.equal(checkpoint.read(name, slice(None), slice(6, 12)), whole[:, 6:12])


def test_a_checkpoint_of_the_bare_decoder_is_found_without_its_prefix(tiny_opt: Path, tmp_path: Path) -> None:
    # As early OPT checkpoints were saved.
    folder = Path(shutil.copytree(tiny_opt, tmp_path / "bare"))
    tensors = {name.removeprefix("model."): t for name, t in load_file(tiny_opt / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ids = torch.arange(4, 12)[None]
    assert torch.equal(spd.load(folder, tp_size=2)(ids), spd.load(tiny_opt, tp_size=2)(ids))


def test_unchanged_weights_are_hashed_once_in_a_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fingerprint(folder)
    monkeypatch.setattr(hashlib, "file_digest", None)
    assert fingerprint(folder) == first


def test_the_fingerprint_changes_with_a_single_weight(folder: Path, tiny_llama: Path) -> None:
    assert fingerprint(folder) == fingerprint(tiny_llama)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(folder) != fingerprint(tiny_llama)
