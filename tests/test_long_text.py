"""The measures of experiments/long_text, on a tiny model."""

import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from treated import tokens

import spd
from experiments.long_text.draw import PANELS, draw, ends
from experiments.long_text.measure import BIN, continuations, likeliest, losses, rows_of
from spd.perplexity import perplexity


def test_the_loss_by_position_averages_to_the_perplexity(tiny_llama: Path) -> None:
    model, windows = spd.load(tiny_llama, tp_size=2), tokens(5, 40)
    found = losses(model, windows, batch_size=2)
    assert found.shape == (5, 39)
    assert math.exp(found.mean()) == pytest.approx(perplexity(model, windows), rel=1e-5)


def test_the_likeliest_tokens_given_a_models_own_continuation_are_that_continuation(tiny_llama: Path) -> None:
    model, prompts = spd.load(tiny_llama, tp_size=2), tokens(6, 8)
    continued = continuations(model, prompts, 20, batch_size=4)
    assert continued.shape == (6, 20)
    assert not (continued == model.hf.generation_config.eos_token_id).any()
    assert torch.equal(likeliest(model, prompts, continued, batch_size=4), continued)
    model.drop([0, 1, 2])
    assert not torch.equal(likeliest(model, prompts, continued), continued)


def test_a_row_is_the_mean_of_a_bin_with_its_error_over_windows() -> None:
    values = torch.arange(BIN + 8).expand(3, -1) + torch.tensor([[0.0], [1.0], [2.0]])
    first, second = rows_of("loss", values)
    assert (first["position"], second["position"]) == ((1 + BIN) / 2, BIN + 4.5)
    assert first["value"] == (BIN - 1) / 2 + 1
    assert first["stderr"] == pytest.approx(1 / 3**0.5, abs=1e-5)


def test_the_figure_and_the_table_show_every_strategy(tmp_path: Path) -> None:
    rows = [
        {"model": "m", "strategy": strategy, "drop": drop, "what": what, "position": at, "value": 0.5, "stderr": 0.1}
        for strategy in ("zs", "zs_b2b")
        for drop in (0.5, 1.0)
        for what in PANELS
        for at in (16.5, 48.5)
    ]
    table = pd.DataFrame(rows)
    figure = draw(table[table["drop"] == 1.0], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    for axes in figure.axes:
        assert {line.get_label() for line in axes.lines} >= {"zs", "zs_b2b"}
        assert len(axes.collections) == 2  # their bands
    assert ends(table).count("0.500 ± 0.100, 0.500 ± 0.100") == 2 * (len(PANELS) - 1)  # perplexity is drawn alone
