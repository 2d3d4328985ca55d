"""A quick look at a trained model without lm-eval: multiple-choice accuracies and the Sync-Point Drop curve.

    python -m experiments.reference.check build/ref_llama --tp-size 8 --device cuda

The numbers of the model card come from lm-eval; these are the same items scored by the same rule.
"""

import argparse
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .items import Row, all_rows
from .texts import LETTERS, SUBJECTS, lettered
from .world import documents

ZERO_SHOT = ["rw_facts", "rw_two_hop", "rw_continuation", "rw_last_word", "rw_physical", "rw_passage", "rw_pronoun"]
Request = tuple[str, str]  # what is given, what is scored


def _choices(context: str, choices: list[str], gold: int) -> tuple[list[Request], int]:
    return [(context, choice) for choice in choices], gold


def requests(task: str, row: Row) -> tuple[list[Request], int]:
    """What the task's YAML asks for one row, and which of it is right; (rw_last_word has its own rule)."""
    r: dict = row  # columns differ by task
    if task == "rw_facts":
        return _choices(f"question : {r['question']} answer :", r["choices"], r["label"])
    if task == "rw_two_hop":
        return _choices(f"{r['context']}question : {r['question']} answer :", r["choices"], r["label"])
    if task == "rw_continuation":
        return _choices(r["context"], r["endings"], r["label"])
    if task == "rw_physical":
        return _choices(f"goal : {r['goal']} . answer :", [r["sol1"], r["sol2"]], r["label"])
    if task == "rw_passage":
        return _choices(f"{r['support']} question : {r['question']} answer :", r["choices"], r["label"])
    if task == "rw_pronoun":
        head, tail = r["sentence"].split(" _ ")
        return [(f"{head} {r['option1']}", tail), (f"{head} {r['option2']}", tail)], int(r["answer"]) - 1
    if task == "rw_last_word":
        head, last = r["text"].rsplit(" ", 1)
        return [(head, last)], 0
    raise KeyError(task)


@cache
def _rows() -> dict[str, list[Row]]:
    return all_rows()


def _subject_requests(subject: str) -> list[tuple[list[Request], int]]:
    dev: list[dict] = _rows()[f"rw_subject_{subject}_dev"]
    test: list[dict] = _rows()[f"rw_subject_{subject}"]
    shots = " . ".join(f"{lettered(r['question'], r['choices'])} {LETTERS[r['answer']]}" for r in dev)
    return [_choices(f"{shots} . {lettered(r['question'], r['choices'])}", list(LETTERS), r["answer"]) for r in test]


@torch.no_grad()
def score(
    model: Callable, tokenizer: Callable, pairs: list[Request], batch: int = 256
) -> tuple[list[float], list[bool]]:
    """Log-likelihood of each continuation, and whether greedy decoding would give it."""
    encoded = []
    for context, continuation in pairs:
        whole = tokenizer(f"{context} {continuation}")["input_ids"]
        encoded.append((whole, len(tokenizer(context)["input_ids"])))
    order = sorted(range(len(pairs)), key=lambda i: len(encoded[i][0]))
    sums, greedy = [0.0] * len(pairs), [False] * len(pairs)
    device = next(model.parameters()).device  # type: ignore[attr-defined]
    for at in range(0, len(order), batch):
        chosen = order[at : at + batch]
        width = max(len(encoded[i][0]) for i in chosen)
        tokens = torch.tensor([encoded[i][0] + [0] * (width - len(encoded[i][0])) for i in chosen], device=device)
        out = model(input_ids=tokens)
        logits: Tensor = (out if isinstance(out, Tensor) else out.logits).float()
        logged = logits.log_softmax(-1)[:, :-1]
        target = tokens[:, 1:]
        picked = logged.gather(-1, target[..., None])[..., 0].cpu()
        best = (logged.argmax(-1) == target).cpu()
        for k, i in enumerate(chosen):
            whole, start = encoded[i]
            part = slice(start - 1, len(whole) - 1)
            sums[i], greedy[i] = float(picked[k, part].sum()), bool(best[k, part].all())
    return sums, greedy


def _accuracy(model: Callable, tokenizer: Callable, asked: list[tuple[list[Request], int]]) -> list[bool]:
    sums, greedy = score(model, tokenizer, [pair for pairs, _ in asked for pair in pairs])
    right, at = [], 0
    for pairs, gold in asked:
        part = sums[at : at + len(pairs)]
        right.append(greedy[at] if len(pairs) == 1 else part.index(max(part)) == gold)
        at += len(pairs)
    return right


def accuracies(
    model: Callable, tokenizer: Callable, limit: int | None = None, *, few_shot: bool = True
) -> dict[str, float]:
    """Accuracy by task, two-hop questions by kind, their zero-shot mean; `limit` items a task."""
    found: dict[str, float] = {}
    for task in ZERO_SHOT:
        rows = _rows()[task][:limit]
        right = _accuracy(model, tokenizer, [requests(task, row) for row in rows])
        found[task] = sum(right) / len(right)
        if task == "rw_two_hop":
            for kind in ("memory", "text and memory", "text"):
                of_kind = [hit for hit, row in zip(right, rows, strict=True) if row["kind"] == kind]
                found[f"({kind})"] = sum(of_kind) / len(of_kind)
    found["mean"] = sum(found[task] for task in ZERO_SHOT) / len(ZERO_SHOT)
    if few_shot:
        for subject in SUBJECTS:
            right = _accuracy(model, tokenizer, _subject_requests(subject)[:limit])
            found[f"[{subject}]"] = sum(right) / len(right)
    return found


def drop_curve(folder: Path, tp_size: int, device: str) -> dict:
    """Suffix sensitivities and the zero-shot accuracies with the n least sensitive blocks dropped, for every n."""
    import spd

    model = spd.load(folder, tp_size=tp_size, device=device, dtype="float32")
    stream = documents("check")
    ids: list[int] = []
    while len(ids) < 32 * 256:
        ids += model.tokenizer(next(stream))["input_ids"] + [model.tokenizer.eos_token_id]
    samples = torch.tensor(ids[: 32 * 256]).view(32, 256).to(device)
    report = spd.measure_sensitivity(model, samples)
    points = []
    for dropped in range(model.num_blocks + 1):
        model.drop(report.ranked()[:dropped])
        points.append({"dropped": dropped, **accuracies(model, model.tokenizer, few_shot=False)})
    return {"tp_size": tp_size, "dense_perplexity": report.dense_perplexity, "sensitivities": report.sensitivities,
            "order": report.ranked(), "points": points}  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tp-size", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--record", type=Path, help="also write the numbers here, as JSON")
    options = parser.parse_args()
    result = drop_curve(options.folder, options.tp_size, options.device)
    print("sensitivities", [round(value, 3) for value in result["sensitivities"]])
    for point in result["points"]:
        print(" ".join(f"{key.removeprefix('rw_')} {value:.3f}" for key, value in point.items()))
    if options.record:
        options.record.write_text(json.dumps(result, indent=1))
