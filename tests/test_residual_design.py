"""The designs of the residual ablation against their equations, and its README against its table."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import spd
from experiments.residual_design.ablation import DESIGNS, METHOD, Design, attention, perplexities, spd_of, tp
from experiments.residual_design.report import plot, write_tables
from spd.perplexity import perplexity

FOLDER = Path(__file__).parent.parent / "experiments/residual_design"
ORDER = [1, 2, 0]
ids_of_design = pytest.mark.parametrize("design", DESIGNS, ids=" ".join)


@pytest.fixture
def samples() -> Tensor:
    """Random samples [3, 12]."""
    return torch.randint(4, 64, (3, 12), generator=torch.Generator().manual_seed(3))


def dense_perplexity(folder: Path, samples: Tensor) -> float:
    return perplexity(spd.load(folder), samples)


@torch.inference_mode()
@pytest.mark.parametrize("tp_size", [1, 2, 8])
def test_the_methods_design_is_spds_own_block(
    checkpoint: Callable[..., Path], family: str, tp_size: int, input_ids: Tensor
) -> None:
    model = spd.load(checkpoint(family), tp_size=tp_size)
    x, inputs = model.embed(input_ids)
    for block in model.blocks:
        heads, ranks = block.attention(x, **inputs), x.unsqueeze(0)
        partials = block.partials(heads)
        torch.testing.assert_close(attention(block, ranks, inputs), partials)
        torch.testing.assert_close(spd_of(METHOD, block, ranks, partials), block.spd(x, heads).unsqueeze(0))
        torch.testing.assert_close(tp(block, ranks, partials), block.tp(x, heads).unsqueeze(0))


def test_the_methods_perplexities_are_spds_own(checkpoint: Callable[..., Path], family: str, samples: Tensor) -> None:
    model = spd.load(checkpoint(family), tp_size=4)
    for count, measured in enumerate(perplexities(model, METHOD, samples, ORDER)):
        model.drop(ORDER[:count])
        assert measured == pytest.approx([perplexity(model, samples)] * 2, rel=1e-5)


@ids_of_design
def test_with_nothing_dropped_every_design_is_the_dense_model(
    checkpoint: Callable[..., Path], family: str, design: Design, samples: Tensor
) -> None:
    folder = checkpoint(family)
    measured = perplexities(spd.load(folder, tp_size=4), design, samples, ORDER)
    assert measured[0] == pytest.approx([dense_perplexity(folder, samples)] * 2, rel=1e-5)


@ids_of_design
def test_on_one_rank_only_designs_with_both_residuals_are_the_dense_model(
    checkpoint: Callable[..., Path], family: str, design: Design, samples: Tensor
) -> None:
    folder = checkpoint(family)
    one_rank = perplexities(spd.load(folder), design, samples, ORDER)[-1]
    both = design.mlp_input == "X + P_i + b" and design.attention_residual != "absent"
    assert (one_rank == pytest.approx([dense_perplexity(folder, samples)] * 2, rel=1e-5)) == both


def columns_of(weight: Tensor, rank: int) -> Tensor:
    """An output weight [D, F] of which all but one of four ranks' columns are zero."""
    masked = torch.zeros_like(weight)
    its = slice(rank * weight.shape[1] // 4, (rank + 1) * weight.shape[1] // 4)
    masked[:, its] = weight[:, its]
    return masked


@torch.inference_mode()
@ids_of_design
def test_designs_are_their_equations(tiny_opt: Path, design: Design, samples: Tensor) -> None:
    """One hidden state a rank throughout, with everything spelled out; block 1 is a TP block between two dropped."""
    model = spd.load(tiny_opt, tp_size=4)
    x, inputs = model.embed(samples)
    xs = [x] * 4
    for i, block in enumerate(model.blocks):
        b, b2 = block.attention_bias, block.mlp_bias
        layer: Any = block.layer
        heads, mlp = layer.self_attn.out_proj, layer.fc2
        ps = []
        for rank, own in enumerate(xs):  # by the whole layer, with the other ranks' columns masked
            whole = heads.weight.data
            heads.weight.data = columns_of(whole, rank)
            ps.append(block.attention_output.total(block.attention(own, **inputs)))
            heads.weight.data = whole
        if i == 1:
            seen = [x + sum(ps) + b for x in xs]
        elif design.mlp_input == "P_i + b":
            seen = [p + b for p in ps]
        else:
            seen = [x + p + b for x, p in zip(xs, ps, strict=True)]
        mlps = []
        for rank, v in enumerate(seen):
            whole = mlp.weight.data
            mlp.weight.data = columns_of(whole, rank)
            mlps.append(block.mlp_output.total(block.mlp(block.norm2(v))))
            mlp.weight.data = whole
        if i == 1 or design.attention_residual == "before":
            added = [sum(ps)] * 4
        else:
            added = ps if design.attention_residual == "after" else [0] * 4
        xs = [x + p + b + sum(mlps) + b2 for x, p in zip(xs, added, strict=True)]
    logprobs = [model.head(x)[:, :-1].log_softmax(-1).gather(2, samples[:, 1:, None]) for x in xs]
    rank0, ranks = perplexities(model, design, samples, [0, 2, 1])[2]
    assert rank0 == pytest.approx((-logprobs[0].mean()).exp().item(), rel=1e-4)
    assert ranks == pytest.approx((-torch.stack(logprobs).mean()).exp().item(), rel=1e-4)
    assert (rank0 != ranks) == (design.attention_residual == "after")


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """What was measured."""
    return pd.read_csv(FOLDER / "residual_design.csv")


def number(perplexity: float) -> str:
    return f"{perplexity:.3f}" if perplexity < 100 else f"{perplexity:.0f}"


def test_the_readmes_tables_are_its_measurements(table: pd.DataFrame) -> None:
    readme = (FOLDER / "README.md").read_text()
    last = table["num_dropped"].max()
    for count in (last, last * 3 // 4):
        part = readme.split(f"**{count} of {last} blocks dropped**")[1]
        for (model, tp_size), its in table.groupby(["model", "tp_size"]):
            at = its[its["num_dropped"] == count].set_index(["mlp_input", "attention_residual"])
            cells = []
            for design in DESIGNS:
                cell = number(at.loc[design, "perplexity"])
                cell = f"**{cell}**" if at["perplexity"].idxmin() == design else cell
                if design.attention_residual == "after":
                    cell += f" ({number(at.loc[design, 'perplexity_over_ranks'])})"
                cells.append(cell)
            dense = its[its["num_dropped"] == 0]["perplexity"].iloc[0]
            assert f"| {model} | {tp_size} | {dense:.3f} | {' | '.join(cells)} |" in part


def test_the_methods_design_is_the_best_wherever_more_than_a_block_is_dropped(table: pd.DataFrame) -> None:
    dropped = table[table["num_dropped"] > 1]  # with a single one the differences are below a percent
    best = dropped.loc[dropped.groupby(["model", "tp_size", "num_dropped"])["perplexity"].idxmin()]
    assert set(zip(best["mlp_input"], best["attention_residual"], strict=True)) == {METHOD}


def test_after_is_between_before_and_absent_and_nearer_to_it_with_more_ranks(table: pd.DataFrame) -> None:
    its = table[(table["mlp_input"] == "X + P_i + b") & (table["num_dropped"] > 2)]
    log = np.log(
        its.pivot(index=["model", "tp_size", "num_dropped"], columns="attention_residual", values="perplexity")
    )
    way = ((log["after"] - log["before"]) / (log["absent"] - log["before"])).groupby(["model", "tp_size"])
    assert ((way.min() > 0) & (way.max() < 1)).all()
    assert (way.mean().xs(8, level="tp_size") > way.mean().xs(4, level="tp_size")).all()
    assert np.allclose(its["perplexity_over_ranks"], its["perplexity"], rtol=0.1)


def test_figure_and_tables_can_be_made_again(table: pd.DataFrame, tmp_path: Path) -> None:
    record = json.loads((FOLDER / "residual_design.json").read_text())
    readme = tmp_path / "README.md"
    readme.write_text((FOLDER / "README.md").read_text())
    write_tables(table, record, readme)
    figure = plot(table, record, tmp_path / "residual_design.png")
    assert readme.read_text() == (FOLDER / "README.md").read_text()
    assert (tmp_path / "residual_design.png").stat().st_size > 10_000
    drawn = [len(line.get_xdata()) for axes in figure.axes for line in axes.lines if line.get_linestyle() != ":"]
    assert sum(drawn) == len(table)
