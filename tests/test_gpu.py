"""The engine on a GPU, against transformers on the same GPU. Needs neither hydra, lm-eval nor wandb.

python -m pytest tests/test_gpu.py
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from treated import plan_in, prepare

import spd

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU on this machine"),
]


@torch.inference_mode()
@pytest.mark.parametrize("tp_size", [1, 4, 8])
def test_dropping_nothing_equals_the_dense_model_on_a_gpu(
    checkpoint: Callable[..., Path], family: str, tp_size: int, input_ids: Tensor
) -> None:
    folder, ids = checkpoint(family), input_ids.cuda()
    expected = AutoModelForCausalLM.from_pretrained(folder).cuda().eval()(ids).logits
    model = spd.load(folder, tp_size=tp_size, device="cuda")
    assert (model(ids) - expected).abs().max() <= 2e-5 * expected.abs().max()
    on_cpu = spd.load(folder, tp_size=tp_size)
    for m in (model, on_cpu):
        m.drop([0, 2])
    dropped = on_cpu(input_ids)
    assert (model(ids).cpu() - dropped).abs().max() <= 2e-5 * dropped.abs().max()
    assert torch.equal(model.generate(ids, max_new_tokens=8).cpu(), on_cpu.generate(input_ids, max_new_tokens=8))


@torch.inference_mode()
def test_bfloat16_on_a_gpu_follows_float32(checkpoint: Callable[..., Path], family: str, input_ids: Tensor) -> None:
    folder = checkpoint(family)
    exact = spd.load(folder, tp_size=4, device="cuda")(input_ids.cuda())
    rounded = spd.load(folder, tp_size=4, device="cuda", dtype="bfloat16")(input_ids.cuda())
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() <= 0.05 * exact.norm()


def test_sensitivities_on_a_gpu_equal_those_on_the_cpu(tiny_llama: Path) -> None:
    samples = torch.randint(4, 64, (4, 12), generator=torch.Generator().manual_seed(3))
    reports = [spd.measure_sensitivity(spd.load(tiny_llama, tp_size=4, device=d), samples) for d in ("cuda", "cpu")]
    scale = reports[1].dense_perplexity + max(map(abs, reports[1].sensitivities))
    for on_gpu, on_cpu in zip(reports[0].sensitivities, reports[1].sensitivities, strict=True):
        assert abs(on_gpu - on_cpu) <= 1e-4 * scale


@pytest.mark.parametrize("strategy", ["zs_b2b_hg", "zs_correction_b2b"])
def test_blocks_are_treated_on_a_gpu_whether_the_model_is_there_or_on_the_cpu(tiny_llama: Path, strategy: str) -> None:
    for on, dtype in (("cuda", "bfloat16"), ("cpu", "float32")):
        model = spd.load(tiny_llama, tp_size=2, device=on, dtype=dtype)
        prepare(model, strategy, device="cuda")
        outcomes = plan_in(model).outcomes
        assert set(outcomes) == {1, 2}
        for outcome in outcomes.values():
            assert outcome["kept"] == "zs" or outcome["loss"][outcome["kept"].split("+")[-1]] < outcome["loss"]["zs"]
        assert model(torch.arange(4, 20, device=on)[None]).isfinite().all()
