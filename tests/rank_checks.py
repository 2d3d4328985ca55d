"""What the ranks of tests/test_processes.py run: real ranks against virtual ones."""

import time
from typing import Any

import torch

import spd

Asked = list[tuple[str, Any]]
"""Kind of request and its arguments."""


@torch.inference_mode()
def compare_with_virtual_ranks(arguments: dict[str, Any], on_progress: Any) -> dict[str, Any]:
    """Largest difference of logits, relative to their scale, and whether generated tokens agree; by case.

    Every rank runs the real model; rank 0 alone runs the virtual one beside it and compares.
    """
    differences: dict[str, Any] = {}
    ids = torch.tensor(arguments["input_ids"])
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for name, folder in arguments["folders"].items():
        real = spd.load(folder, tp_size=arguments["tp_size"], ranks="processes", dtype="float32")
        assert real.cut.ranks == 1
        compares = torch.distributed.get_rank() == 0
        models = [real, spd.load(folder, tp_size=arguments["tp_size"], dtype="float32")] if compares else [real]
        last = real.num_blocks - 1
        for dropped in ([], [min(1, last)], list(range(min(2, last) + 1))):
            for model in models:
                model.drop(dropped)
            logits = [model(ids, attention_mask=mask) for model in models]
            tokens = [model.generate(ids, attention_mask=mask, max_new_tokens=4).tolist() for model in models]
            if compares:
                difference = (logits[0] - logits[1]).abs().max() / logits[1].abs().max()
                differences[f"{name} {dropped}"] = [difference.item(), tokens[0] == tokens[1]]
        if real.num_blocks > 3:  # sensitivities of the small models are enough
            continue
        reports = [spd.measure_sensitivity(model, ids, batch_size=1) for model in models]
        if compares:
            pairs = zip(reports[0].sensitivities, reports[1].sensitivities, strict=True)
            scale = reports[1].dense_perplexity + max(map(abs, reports[1].sensitivities))
            differences[f"{name} sensitivity"] = [max(abs(a - b) for a, b in pairs) / scale, True]
    return differences


def evaluate(arguments: dict[str, Any], on_progress: Any) -> dict[str, Any]:
    """Scores on every rank; with "noise", rank 1 sees other numbers than rank 0, as other hardware might."""
    from spd.evaluation import evaluate

    model = spd.load(arguments["folder"], tp_size=arguments["tp_size"], ranks="processes", dtype="float32")
    model.drop(arguments["dropped"])
    if arguments["noise"] and torch.distributed.get_rank() == 1:
        head = model.hf.get_output_embeddings()
        head.register_forward_hook(lambda module, args, logits: logits + torch.randn_like(logits))
    answers = arguments["answers"] and f"{arguments['answers']}/{torch.distributed.get_rank()}"
    scores = evaluate(model, arguments["tasks"], arguments["include_path"], batch_size=4, answers=answers)
    every: list[Any] = [None] * arguments["tp_size"]
    torch.distributed.all_gather_object(every, scores)
    return {"scores": every}


def answers(model: Any, asked: Asked) -> list[Any]:
    """The answers of an lm-eval model, in the order of what was asked."""
    from lm_eval.api.instance import Instance

    found: list[Any] = [None] * len(asked)
    for kind in dict.fromkeys(kind for kind, _ in asked):
        places = [i for i, (one, _) in enumerate(asked) if one == kind]
        requests = [Instance(kind, {}, tuple(asked[i][1]), i, ("task", i, 1)) for i in places]
        for i, answer in zip(places, getattr(model, kind)(requests, disable_tqdm=True), strict=True):
            found[i] = list(answer) if isinstance(answer, tuple) else answer
    return found


def answer(arguments: dict[str, Any], on_progress: Any) -> dict[str, Any]:
    """Answers of every rank to what is asked, by model and batch size."""
    from spd.harness import SpdLM

    found: dict[str, Any] = {}
    for name, folder in arguments["folders"].items():
        model = spd.load(folder, tp_size=2, ranks="processes", dtype="float32")
        for batch_size in (1, 8):
            every: list[Any] = [None] * 2
            torch.distributed.all_gather_object(every, answers(SpdLM(model, batch_size=batch_size), arguments["asked"]))
            found.setdefault(name, {})[batch_size] = every
    return found


def generate_with_noise(arguments: dict[str, Any], on_progress: Any) -> dict[str, Any]:
    """What every rank generates where rank 1 sees other numbers than rank 0."""
    from spd.harness import SpdLM

    model = spd.load(arguments["folder"], tp_size=2, ranks="processes", dtype="float32")
    if torch.distributed.get_rank() == 1:
        head = model.hf.get_output_embeddings()
        head.register_forward_hook(lambda module, args, logits: torch.randn_like(logits))
    texts: list[Any] = [None] * 2
    torch.distributed.all_gather_object(texts, answers(SpdLM(model, batch_size=4), arguments["asked"]))
    return {"texts": texts}


def evaluate_and_fail(arguments: dict[str, Any], on_progress: Any) -> dict[str, Any]:
    """An evaluation in which rank 1 raises while rank 0 waits for it."""
    from spd.evaluation import evaluate
    from spd.harness import SpdLM

    call, calls = SpdLM._model_call, []

    def fails_at_third_call(self: SpdLM, *args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3 and torch.distributed.get_rank() == 1:
            raise ArithmeticError(f"at {time.time()} of all times")
        return call(self, *args, **options)

    SpdLM._model_call = fails_at_third_call
    model = spd.load(arguments["folder"], tp_size=arguments["tp_size"], ranks="processes", dtype="float32")
    return evaluate(model, arguments["tasks"], arguments["include_path"], batch_size=4)
