"""What the ranks of tests/test_processes.py run: real ranks against virtual ones, in every rank."""

from typing import Any

import torch

import spd


@torch.inference_mode()
def compare_with_virtual_ranks(arguments: dict[str, Any], on_progress: Any) -> dict[str, Any]:
    """Largest difference of logits, relative to their scale, and whether generated tokens agree; by case."""
    differences: dict[str, Any] = {}
    for family, folder in arguments["folders"].items():
        real = spd.load(folder, tp_size=arguments["tp_size"], ranks="processes", dtype="float32")
        virtual = spd.load(folder, tp_size=arguments["tp_size"], dtype="float32")
        assert len(real.blocks[0].shards) == 1
        ids = torch.tensor(arguments["input_ids"])
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        for dropped in ([], [1], [0, 1, 2]):
            real.drop(dropped)
            virtual.drop(dropped)
            logits = virtual(ids, attention_mask=mask)
            difference = (real(ids, attention_mask=mask) - logits).abs().max() / logits.abs().max()
            tokens = [m.generate(ids, attention_mask=mask, max_new_tokens=8).tolist() for m in (real, virtual)]
            differences[f"{family} {dropped}"] = [difference.item(), tokens[0] == tokens[1]]
        if real.num_blocks > 3:  # one sensitivity is enough a family
            continue
        reports = [spd.measure_sensitivity(m, ids, batch_size=1) for m in (real, virtual)]
        pairs = zip(reports[0].sensitivities, reports[1].sensitivities, strict=True)
        scale = reports[1].dense_perplexity + max(map(abs, reports[1].sensitivities))
        differences[f"{family} sensitivity"] = [max(abs(a - b) for a, b in pairs) / scale, True]
    return differences
