"""Where the residuals go in a dropped block: six designs and their perplexities (the ablation in the paper's appendix).

    python -m experiments.residual_design.ablation

evaluates every design with 0 to L blocks dropped, for every reference model at tp 4 and 8, on one thread, and writes
residual_design.csv, residual_design.json, residual_design.png and the tables in README.md beside this file.

Legend: B batch, T tokens, D hidden size, L blocks, N ranks, i and j ranks; X_i rank i's block input, out_i its output,
P_i = Attention_i(norm1(X_i)), b and b2 the output biases, added once. All ranks hold the same X_i = X unless the
attention residual is added after the sync point; the embeddings are the same on every rank.

    MLP input      attention residual
    X + P_i + b    before   out   = X + b + sum_j(P_j + MLP_j(norm2(X + P_j + b))) + b2         the method
    X + P_i + b    absent   out   = X + b + sum_j(MLP_j(norm2(X + P_j + b))) + b2
    X + P_i + b    after    out_i = X_i + b + sum_j(MLP_j(norm2(X_j + P_j + b))) + b2 + P_i     differs by rank
    P_i + b        before   out   = X + b + sum_j(P_j + MLP_j(norm2(P_j + b))) + b2
    P_i + b        absent   out   = X + b + sum_j(MLP_j(norm2(P_j + b))) + b2
    P_i + b        after    out_i = X_i + b + sum_j(MLP_j(norm2(P_j + b))) + b2 + P_i           differs by rank

Blocks that are not dropped are TP blocks, on each rank's own hidden state: U_i = X_i + sum_j(P_j) + b and
out_i = U_i + sum_j(MLP_j(norm2(U_j))) + b2. Ranks that differ once differ to the end: no sync point sums hidden states.

**Open** is whose logits count where ranks differ, each having its own. Chosen: rank 0's (`perplexity`), as an engine
that samples on rank 0 would; beside it the exponential of the loss averaged over ranks (`perplexity_over_ranks`), which
is what a rank drawn at random loses. Blocks are dropped in the suffix order of the method's own block.
"""

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

import spd
from experiments.residual_design.report import plot, write_tables
from spd.block import Block
from spd.perplexity import next_token_loss, perplexity, to_perplexity
from spd.results import environment

HERE = Path(__file__).parent
REFERENCE = HERE.parent / "reference"
MODELS, TP_SIZES = ("ref_llama", "ref_opt", "ref_qwen2"), (4, 8)
SAMPLES, SEQUENCE_LENGTH, BATCH_SIZE = 32, 256, 8


class Design(NamedTuple):
    """Where the residuals of a dropped block go."""

    mlp_input: str
    """`X + P_i + b` or `P_i + b`."""
    attention_residual: str
    """When P_i is added: before the sync point, after it, or absent."""


METHOD = Design("X + P_i + b", "before")
DESIGNS = [Design(*names) for names in itertools.product(("X + P_i + b", "P_i + b"), ("before", "absent", "after"))]


def perplexities(
    model: spd.TensorParallelLM, design: Design, samples: Tensor, order: Sequence[int]
) -> list[tuple[float, float]]:
    """Perplexity of rank 0 and over ranks on samples [S, T], with the first 0, ..., L blocks of `order` dropped."""
    blocks = [(block, order.index(i)) for i, block in enumerate(model.blocks)]
    loss = torch.zeros(len(order) + 1, 2, dtype=torch.float64)
    with torch.inference_mode():
        for ids in samples.split(BATCH_SIZE):
            x, inputs = model.embed(ids)
            for count, out in last_outputs(blocks, design, x.unsqueeze(0), inputs, range(len(order) + 1)):
                losses = [next_token_loss(model.head(its), ids) for its in out]
                loss[count] += torch.tensor([losses[0], sum(losses) / len(losses)], dtype=torch.float64)
    tokens = samples.shape[0] * (samples.shape[1] - 1)
    return [(to_perplexity(rank0, tokens), to_perplexity(ranks, tokens)) for rank0, ranks in loss.tolist()]


def last_outputs(
    blocks: Sequence[tuple[Block, int]], design: Design, x: Tensor, inputs: dict[str, Any], counts: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    """Each number of dropped blocks in `counts` and the last block's output [R, B, T, D] with so many dropped.

    What several numbers have in common is computed once: `counts` are those that agree on all blocks so far.

    Args:
        blocks: those that are to come, each with its place in the order of dropping.
        x: their input [R, B, T, D], where R is 1 while all ranks hold the same hidden state and N once they differ.
        inputs: what a block needs beside it.
    """
    if not blocks:
        (count,) = counts  # any two differ in some block
        yield count, x
        return
    (block, place), *rest = blocks
    partials = attention(block, x, inputs)
    kept, dropped = [n for n in counts if n <= place], [n for n in counts if n > place]
    if kept:
        yield from last_outputs(rest, design, tp(block, x, partials), inputs, kept)
    if dropped:
        yield from last_outputs(rest, design, spd_of(design, block, x, partials), inputs, dropped)


def attention(block: Block, x: Tensor, inputs: dict[str, Any]) -> Tensor:
    """`P_i` [N, B, T, D] of every rank from hidden states [R, B, T, D]."""
    if len(x) == 1:
        return block.partials(block.attention(x[0], **inputs))
    return torch.stack([block.partials(block.attention(its, **inputs))[i] for i, its in enumerate(x)])


def tp(block: Block, x: Tensor, partials: Tensor) -> Tensor:
    """Output [R, B, T, D] of a block that is not dropped."""
    u = x + _plus(partials.sum(0), block.attention_bias)
    normed = block.norm2(u)
    output = block.mlp_output.total(block.mlp(normed[0] if len(u) == 1 else normed))
    return u + _plus(output, block.mlp_bias)


def spd_of(design: Design, block: Block, x: Tensor, partials: Tensor) -> Tensor:
    """Output [R or N, B, T, D] of a dropped block of that design."""
    residual = _plus(x, block.attention_bias)
    mlp_inputs = residual + partials if design.mlp_input == "X + P_i + b" else _plus(partials, block.attention_bias)
    output = block.mlp_output.total(block.mlp(block.norm2(mlp_inputs)))
    if design.attention_residual == "before":
        output = output + partials.sum(0)
    out = residual + _plus(output, block.mlp_bias)
    return out + partials if design.attention_residual == "after" else out


def _plus(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias


def measure(name: str, tp_size: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of the table for one model and tp size, and how they came about."""
    model = spd.load(REFERENCE / "models" / name, tp_size=tp_size, dtype="float32")
    calibration, heldout = (
        spd.load_samples(REFERENCE / f"data/{text}.txt", model.tokenizer, SAMPLES, SEQUENCE_LENGTH, seed=0)
        for text in ("calibration", "heldout")
    )
    report = spd.measure_sensitivity(model, calibration)
    order, rows = report.ranked(), []
    for design in DESIGNS:
        for count, (rank0, ranks) in enumerate(perplexities(model, design, heldout, order)):
            values = {"num_dropped": count, "perplexity": rank0, "perplexity_over_ranks": ranks}
            rows.append({"model": name, "tp_size": tp_size} | design._asdict() | values)
            if design == METHOD:
                model.drop(order[:count])
                assert rank0 == ranks == perplexity(model, heldout), "the method's design is not spd's own block"
    how = {"model": name, "tp_size": tp_size, "fingerprint": model.fingerprint, "vocabulary": model.config.vocab_size}
    return rows, how | {"order": order, "suffix_sensitivities": report.sensitivities, "tokens": report.tokens}


def main() -> None:
    """Measures everything and writes the table, its record, the figure and the README's tables."""
    torch.set_num_threads(1)
    record: dict[str, Any] = {"environment": environment(), "threads": 1, "samples": [SAMPLES, SEQUENCE_LENGTH]}
    start, rows, record["runs"] = time.perf_counter(), [], []
    for name, tp_size in itertools.product(MODELS, TP_SIZES):
        its_rows, how = measure(name, tp_size)
        rows += its_rows
        record["runs"].append(how)
        print(f"{name} at tp {tp_size} is done after {time.perf_counter() - start:.0f} s", flush=True)
    record["environment"]["seconds"] = round(time.perf_counter() - start)
    record["cpu_seconds"] = round(time.process_time())  # the machine may have been shared
    (HERE / "residual_design.json").write_text(json.dumps(record, indent=2) + "\n")
    pd.DataFrame(rows).to_csv(HERE / "residual_design.csv", index=False, float_format="%.6f")
    table = pd.read_csv(HERE / "residual_design.csv")  # what is drawn and told is what is kept
    plot(table, record, HERE / "residual_design.png")
    write_tables(table, record, HERE / "README.md")


if __name__ == "__main__":
    main()
