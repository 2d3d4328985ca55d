"""The engine that latency on GPUs is measured with: exact on any device, and captured on a GPU."""

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from gpu_models import FAMILIES, NEW, PROMPT, every_family, graph_model, greedy, prompts
from gpu_ranks import disagreements
from gpu_settings import on_gpu
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import spd
from spd import families
from spd.errors import UserError
from spd.families import family_of
from spd.gpu import all_reduce, graphs
from spd.gpu.halves import Stage
from spd.gpu.head import candidates_size
from spd.gpu.model import Arm, GraphModel

WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


class Meeting:
    """An all-reduce between threads of this process, each a rank."""

    def __init__(self, ranks: int) -> None:
        self.barrier, self.given, self.count = threading.Barrier(ranks, timeout=60), [None] * ranks, 0

    def of(self, rank: int) -> all_reduce.AllReduce:
        def reduce(local: Tensor) -> Tensor:
            self.given[rank] = local
            self.barrier.wait()
            total = torch.stack(self.given).sum(0)
            self.barrier.wait()
            self.count += rank == 0
            return total

        return reduce


def test_a_layer_with_parts_that_the_engine_does_not_use_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(families.FAMILIES, "qwen3", families.Family())
    config = AutoConfig.for_model("qwen3", **WIDTHS, num_hidden_layers=1, vocab_size=50, head_dim=16)
    with pytest.raises(UserError, match=r"does not know what self_attn\.k_norm of a Qwen3DecoderLayer does; write"):
        GraphModel(config, family_of(config), 2, 0, dtype=torch.float32, device="cpu", compiled=False)


@every_family
@pytest.mark.parametrize("batch", [1, 3])
def test_one_rank_gives_transformers_logits_at_every_step(folder: Path, batch: int) -> None:
    ids = prompts(folder, batch)
    tokens, logits = greedy(graph_model(folder, batch_size=batch), ids, Arm())
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        want = theirs(torch.cat([ids, tokens], 1)).logits[:, PROMPT - 1 : -1]
    torch.testing.assert_close(torch.stack(logits, 1), want, atol=2e-4, rtol=1e-4)


@every_family
@pytest.mark.parametrize("tp_size", [2, 4, 8])
def test_ranks_that_sum_give_what_virtual_ranks_give_whatever_is_dropped(folder: Path, tp_size: int) -> None:
    ids, dropped = prompts(folder, 2), [0, 3, 7, 11]
    meeting, arm = Meeting(tp_size), Arm(frozenset(dropped))
    models = [graph_model(folder, tp_size, i, batch_size=2, all_reduce=meeting.of(i)) for i in range(tp_size)]
    found: dict[int, tuple[Tensor, list[Tensor]]] = {}

    def run(rank: int) -> None:
        found[rank] = greedy(models[rank], ids, arm)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(tp_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tokens = found[0][0]
    assert all(torch.equal(theirs, tokens) for theirs, _ in found.values())
    virtual = spd.load(folder, tp_size=tp_size, dtype="float32")
    virtual.drop(dropped)
    with torch.no_grad():
        want = virtual(torch.cat([ids, tokens], 1))[:, PROMPT - 1 : -1]
    logits = [torch.cat(parts, -1) for parts in zip(*(found[rank][1] for rank in range(tp_size)), strict=True)]
    torch.testing.assert_close(torch.stack(logits, 1), want, atol=2e-4, rtol=1e-4)
    assert torch.equal(torch.stack(logits, 1).argmax(-1), tokens)
    assert meeting.count == NEW * (2 * len(models[0].blocks) - len(dropped) + 1)


def test_the_ceilings_leave_out_the_all_reduces_that_they_name() -> None:
    counted = []

    def count(local: Tensor) -> Tensor:
        counted.append(tuple(local.shape))
        return local

    model = graph_model(FAMILIES[0], 2, 0, all_reduce=count)
    for arm, expected in [
        (Arm(), 24),
        (Arm(frozenset({1, 2, 3})), 21),
        (Arm(attention_all_reduce=False), 12),
        (Arm(attention_all_reduce=False, mlp_all_reduce=False), 0),
    ]:
        assert arm.all_reduces(12) == expected
        of_choice = [(2, 1, 4)] if arm.mlp_all_reduce else []
        counted.clear()
        model.prefill(arm)
        assert counted == [(1, PROMPT, 192)] * expected + of_choice
        counted.clear()
        model.decode(arm)
        assert counted == [(1, 1, 192)] * expected + of_choice


class InRoom(all_reduce.TwoShot):
    """In place of the sum over ranks, which needs GPUs: a few times what one rank has, in the room for it."""

    def __init__(self, largest: int, times: int = 3) -> None:
        super().__init__(torch.full((largest,), torch.nan), "")
        self.copied, self.count, self.times = 0, 0, times

    def __call__(self, local: Tensor) -> Tensor:
        shared = self.room(local.shape)
        self.count += 1
        if local.data_ptr() != shared.data_ptr():
            self.copied += 1
            shared.copy_(local)
        return shared.mul_(self.times)


@every_family
@pytest.mark.parametrize("arm", [Arm(), Arm(frozenset({0, 4, 11})), Arm(attention_all_reduce=False)], ids=str)
def test_products_left_where_they_are_summed_are_the_same_and_not_copied(folder: Path, arm: Arm) -> None:
    ids = prompts(folder, 2)
    sizes, of_choice = [ids.numel() * 192, len(ids) * 192], candidates_size(2, 2)
    thrice = all_reduce.BySize(dict.fromkeys(sizes, lambda local: 3 * local) | {of_choice: lambda local: local})
    tokens, want = greedy(graph_model(folder, 2, 0, batch_size=2, all_reduce=thrice), ids, arm)
    reduces = {size: InRoom(size) for size in sizes}
    choice = InRoom(of_choice, times=1)
    model = graph_model(folder, 2, 0, batch_size=2, all_reduce=all_reduce.BySize(reduces | {of_choice: choice}))
    same, found = greedy(model, ids, arm)
    torch.testing.assert_close(torch.stack(found), torch.stack(want), atol=2e-5, rtol=1e-5)
    assert torch.equal(same, tokens)
    assert (choice.count, choice.copied) == (NEW, NEW)
    assert [reduce.count for reduce in reduces.values()] == [arm.all_reduces(12), (NEW - 1) * arm.all_reduces(12)]
    assert not any(reduce.copied for reduce in reduces.values())
    by_size = all_reduce.BySize(reduces, copied=sizes[1])  # of one token of each sequence
    assert all_reduce.room(by_size, torch.Size((2, 1, 192))) is None
    assert all_reduce.room(by_size, torch.Size((2, PROMPT, 192))) is not None


def test_a_short_reach_and_another_size_change_no_logits() -> None:
    folder = FAMILIES[0]
    ids, arm = prompts(folder, 2), Arm(frozenset({2, 5}))
    model = graph_model(folder, batch_size=3, cache_length=40)
    model.resize(2, PROMPT, 64)
    _, want = greedy(model, ids, arm)
    step = model.capture(arm, decode=True, reach=PROMPT + NEW)
    model.capture(arm, decode=False)()
    found = [model.logits.clone()]
    for _ in range(NEW - 1):
        step()
        found.append(model.logits.clone())
    torch.testing.assert_close(torch.stack(found), torch.stack(want), atol=2e-5, rtol=1e-5)


@every_family
@pytest.mark.parametrize("batch", [1, 3])
def test_every_version_of_every_function_gives_the_same_logits(folder: Path, batch: int) -> None:
    ids, arm = prompts(folder, batch), Arm(frozenset({2, 5}))
    model = graph_model(folder, batch_size=batch)
    first = {phase: dict(kinds) for phase, kinds in model.kernels.items()}
    _, want = greedy(model, ids, arm)
    for phase, functions in model.halves.versions.items():
        assert set(first[phase]) == set(functions) == set(Stage._fields)
        for name, versions in functions.items():
            assert first[phase][name] == next(iter(versions))
            for version in list(versions)[1:]:
                model.kernels = first | {phase: first[phase] | {name: version}}
                _, found = greedy(model, ids, arm)
                torch.testing.assert_close(torch.stack(found), torch.stack(want), atol=2e-5, rtol=1e-5)


@every_family
def test_nothing_is_compiled_after_the_warm_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = torch.compile  # in a capture nothing can be; what is compiled does not depend on the back end
    monkeypatch.setattr(
        torch, "compile", lambda f, **given: compiler(f, backend="eager", fullgraph=True, dynamic=given["dynamic"])
    )
    model = graph_model(folder, 2, 0, compiled=True)
    for batch, summed in ((1, False), (3, False), (3, True)):
        sizes = [batch * PROMPT * 192, batch * 192, candidates_size(batch, 2)]
        in_room = all_reduce.BySize({size: InRoom(size, times=1) for size in sizes}, copied=192)
        model.all_reduce = in_room if summed else lambda local: local
        model.resize(batch, PROMPT, 64)
        for decode, reach in ((False, None), (True, 48)):
            model.capture(Arm(), decode=decode, reach=reach)
            with torch.compiler.set_stance("fail_on_recompile"):
                arms = [Arm(), Arm(frozenset({3})), Arm(frozenset(range(12))), Arm(attention_all_reduce=False)]
                for arm in (*arms, Arm(attention_all_reduce=False, mlp_all_reduce=False)):
                    for blocks_alone in (False, True):
                        model.position.fill_(PROMPT)
                        model.capture(arm, decode=decode, reach=reach, blocks_alone=blocks_alone)()


@pytest.mark.parametrize("quick", [0, 1])
def test_of_the_versions_of_a_function_the_quickest_is_taken(quick: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = graph_model(FAMILIES[0])
    versions = model._versions("decode")
    captured: list[dict[str, str]] = []

    def capture(run: object, *_: object) -> Callable[[], int]:
        captured.append(dict(model.kernels["decode"]))
        return partial(int, len(captured) - 1)

    def ms(replay: Callable[[], int], _: int) -> float:
        used = captured[replay()]
        return 1 + sum(used[name] != some[min(quick, len(some) - 1)] for name, some in versions.items())

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr("spd.gpu.model.events_ms", ms)
    assert model._quicker_kernels(64, versions) == {name: some[quick] for name, some in versions.items()}


@pytest.mark.parametrize("decode", [False, True])
def test_blocks_alone_sum_as_often_as_a_forward_and_choose_nothing(decode: bool) -> None:
    sums = []
    model = graph_model(FAMILIES[0], 2, 0, all_reduce=lambda local: sums.append(local.shape) or local)
    model.capture(Arm(frozenset({4})), decode=decode, blocks_alone=True)()
    assert sums == [(1, 1 if decode else PROMPT, 192)] * 23
    assert not model.logits.any()


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_random_weights_need_the_config_alone_and_only_this_ranks_part(tp_size: int) -> None:
    config = AutoConfig.for_model("llama", num_hidden_layers=2, vocab_size=50, **WIDTHS)
    model = GraphModel(config, family_of(config), tp_size, tp_size - 1, device="cpu", compiled=False)
    for block in model.blocks:
        assert block.qkv.shape == ((4 // tp_size + 2 * max(1, 2 // tp_size)) * 16, 64)
        assert block.attention_output.shape == (64, 64 // tp_size)
        assert block.mlp_input.shape == (2 * 128 // tp_size, 64)
        assert block.mlp_output.shape == (64, 128 // tp_size)
    assert not torch.equal(model.blocks[0].qkv, model.blocks[1].qkv)
    model.prefill(Arm())
    assert model.logits.isfinite().all()


def test_random_weights_are_the_same_on_all_ranks_where_they_are_whole_and_others_where_they_are_cut() -> None:
    config = AutoConfig.for_model("llama", num_hidden_layers=2, vocab_size=50, **WIDTHS)
    one, other = (GraphModel(config, family_of(config), 2, rank, device="cpu", compiled=False) for rank in (0, 1))
    assert torch.equal(one.embedding, other.embedding)
    for i in range(2):
        for a, b in zip(one.blocks[i], other.blocks[i], strict=True):
            assert a is None or torch.equal(a, b) == (a.dim() == 1)  # norms are whole
    assert not torch.equal(one.head, other.head)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(("dropped", "batch"), [((), 2), ((0, 5, 11), 1)])
@every_family
def test_captured_graphs_give_the_uncaptured_models_logits_and_64_tokens(
    folder: Path, dropped: tuple, batch: int
) -> None:
    arm, ids = Arm(frozenset(dropped)), prompts(folder, batch, "cuda")
    options = {"batch_size": batch, "cache_length": 128, "device": "cuda"}
    exact, plain = graph_model(folder, **options), graph_model(folder, **options, dtype=torch.bfloat16)
    captured = graph_model(folder, **options, dtype=torch.bfloat16, compiled=True)
    first, step = captured.capture(arm, decode=False), captured.capture(arm, decode=True, reach=PROMPT + 64)
    for model in (exact, plain, captured):
        model.prompt.copy_(ids)
    difference, rounding, unsure = [], [], []
    for i in range(64):
        if i:
            step()
        else:
            first()
        for model in (exact, plain):
            model.decode(arm) if i else model.prefill(arm)
        difference.append((captured.logits - plain.logits).abs().max().item())
        rounding.append((exact.logits - plain.logits).abs().max().item())
        unsure += disagreements(plain.logits, plain.token, captured.token)
        for model in (exact, captured):  # where two tokens are as likely, all go on with the same
            model.token.copy_(plain.token)
    # Both round, so they differ by as much as two roundings do.
    assert max(difference) <= 2 * max(rounding)
    assert all(0 <= gap <= 2 * max(rounding) for gap in unsure)
    assert len(unsure) <= 64 * batch / 8


@pytest.mark.gpu
@on_gpu
def test_a_captured_float32_model_chooses_the_same_64_tokens() -> None:
    folder = FAMILIES[2]
    ids, arm = prompts(folder, 1, "cuda"), Arm(frozenset({3, 4}))
    options = {"cache_length": 128, "device": "cuda"}
    captured = graph_model(folder, **options, compiled=True)
    first, step = captured.capture(arm, decode=False), captured.capture(arm, decode=True)
    want, _ = greedy(graph_model(folder, **options), ids, arm, 64)
    captured.prompt.copy_(ids)
    first()
    tokens = [captured.token.clone()]
    for _ in range(63):
        step()
        tokens.append(captured.token.clone())
    assert torch.equal(torch.cat(tokens, 1), want)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("batch", [1, 3])
def test_every_version_compiled_for_a_gpu_gives_the_same_logits(batch: int) -> None:
    folder = FAMILIES[2]
    ids, arm = prompts(folder, batch, "cuda"), Arm(frozenset({2, 5}))
    options = {"batch_size": batch, "device": "cuda"}
    _, want = greedy(graph_model(folder, **options), ids, arm)
    model = graph_model(folder, **options, compiled=True)
    model.prompt.copy_(ids)
    model.capture(arm, decode=False), model.capture(arm, decode=True)  # compiles, and chooses
    chosen = {phase: dict(kinds) for phase, kinds in model.kernels.items()}
    for phase in chosen:
        for name, versions in model._versions(phase).items():
            for version in versions:
                model.kernels = chosen | {phase: chosen[phase] | {name: version}}
                first, step = model.capture(arm, decode=False), model.capture(arm, decode=True)
                first()
                for i in range(NEW):
                    if i:
                        step()
                    torch.testing.assert_close(model.logits, want[i], atol=2e-3, rtol=1e-3)
