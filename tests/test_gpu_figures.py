"""What is drawn of a latency on GPUs; the numbers here are invented."""

import itertools
import json
from pathlib import Path

import pandas as pd
import pytest

from experiments.gpu_latency import figure7, probe
from experiments.gpu_latency.draw import CEILING, draw_speedups, draw_timelines, kind_of
from experiments.gpu_latency.measure import arms_of, column

MODELS = {"llama2_7b": 32, "llama2_70b": 80, "opt_66b": 64}


def invented_rows() -> pd.DataFrame:
    rows = []
    phases = [("ttft_ms", 1, 128, 256), ("ttft_ms", 1, 2048, None), ("tpot_ms", 1, 128, 256)]
    for tp_size, (model, blocks), (link, most), phase in itertools.product(
        (2, 4), MODELS.items(), {"native": 8, "lbw": 25}.items(), phases
    ):
        of = dict(zip(("metric", "batch_size", "prompt_length", "decode_at"), phase, strict=True))
        for arm in [*arms_of(blocks), CEILING]:
            drop = int(arm) / blocks if arm.isdigit() else None
            saved = (most if drop is None else 0.97 * most * drop) - blocks / 80
            spread = {"low": saved - 0.4, "median": saved, "high": saved + 0.6}
            numbers = {f"speedup_percent_{name}": value for name, value in spread.items()}
            rows.append(
                {"model": model, "tp_size": tp_size, "interconnect": link, "arm": arm, "drop": drop, **of, **numbers}
            )
    return pd.DataFrame(rows)


def invented_timeline() -> dict:
    def kernels(names: list[str]) -> list[dict]:
        return [
            {"name": name, "start_us": 20 * i, "end_us": 20 * i + 18, "communicates": name.startswith("nccl")}
            for i, name in enumerate(names)
        ]

    tp = ["triton_red_fused_0", "nvjet_tst_64x8", "flash_fwd_kernel", "gemv2T", "ncclDevKernel_AllReduce", "triton_poi",
          "nvjet_tst_64x8", "triton_poi", "nvjet_tst", "ncclDevKernel_AllReduce"]  # fmt: skip
    return {"0": kernels(tp), "32": kernels([name for i, name in enumerate(tp) if i != 4])}


def test_every_model_phase_and_interconnect_is_drawn(tmp_path: Path) -> None:
    rows = invented_rows()
    figure = draw_speedups(rows, tmp_path / "speedup.png")
    assert (tmp_path / "speedup.png").stat().st_size > 20_000
    assert len(figure.axes) == 3 * 4  # phases; tp sizes by interconnects
    drawn = {
        tuple(round(y, 6) for y in container.lines[0].get_ydata())
        for axes in figure.axes
        for container in axes.containers
    }
    of_lines = rows[rows["arm"] != CEILING].groupby(["model", "tp_size", "interconnect", "metric", "prompt_length"])
    assert {tuple(line.round(6)) for _, line in of_lines["speedup_percent_median"]} == drawn
    assert all(len(axes.containers) == len(MODELS) for axes in figure.axes)


@pytest.mark.parametrize("models", [1, 3, 5])
def test_figure_7_has_a_panel_for_each_model(models: int, tmp_path: Path) -> None:
    rows = invented_rows().assign(gpu="NVIDIA H100 80GB HBM3")
    more = [rows[rows["model"] == "llama2_70b"].assign(model=f"model{i}") for i in range(models - 1)]
    figure = figure7.draw(pd.concat([rows[rows["model"] == "llama2_70b"], *more]), tmp_path / "figure7.png")
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == ["llama2_70b", *(f"model{i}" for i in range(models - 1))]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[:4] == [f"tp {size}, {link}, H100" for size in (2, 4) for link in ("lbw", "native")]
    assert "published: tp 8, lbw, A100" in labels
    assert (tmp_path / "figure7.png").stat().st_size > 15_000


def test_a_measurement_that_two_folders_have_is_not_drawn_as_one_line(tmp_path: Path) -> None:
    rows = invented_rows().assign(gpu="none")
    for folder, some in (("a", rows), ("b", rows[rows["model"] == "opt_66b"]), ("c", rows.assign(gpu="another"))):
        (tmp_path / folder).mkdir()
        some.to_csv(tmp_path / folder / "latency.csv", index=False)
    with pytest.raises(SystemExit, match=r"opt_66b: in two folders of .*; keep one of them"):
        figure7.read(tmp_path)
    (tmp_path / "b/latency.csv").unlink()
    assert len(figure7.read(tmp_path)) == 2 * len(rows)


def test_blocks_are_drawn_kernel_by_kernel(tmp_path: Path) -> None:
    of = {"model": "llama2_7b", "tp_size": 2, "interconnect": "lbw", "batch_size": 1, "prompt_length": 128}
    sessions = [of | {"decode_at": 256, "timeline": [{"ttft_ms": invented_timeline(), "tpot_ms": invented_timeline()}]}]
    figure = draw_timelines(json.loads(json.dumps(sessions)), tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").stat().st_size > 15_000
    assert len(figure.axes) == 2  # prefill and decoding
    for axes in figure.axes:
        bars = [bar.get_paths()[0].get_extents() for bar in axes.collections]
        assert [bar.x0 for bar in bars] == [20 * i for kernels in (10, 9) for i in range(kernels)]
        assert {round(bar.width) for bar in bars} == {18}


def invented_all_reduces() -> pd.DataFrame:
    """Rows as of two and four GPUs: a time that does not depend on the size, and a bandwidth."""
    of = {("native", "nccl"): (9, 200), ("native", "one_shot"): (7, 120), ("lbw", "nccl"): (14, 28)}
    return pd.DataFrame([
        {"tp_size": ranks, "interconnect": link, "kind": kind, "bytes": size, "launch": launch,
         "us": (least + size / rate / 1e3) * (1 + launch / 50) * ranks / 2}
        for ranks in (2, 4)
        for (link, kind), (least, rate) in of.items()
        for size in probe.BYTES
        if size < 2**25 or kind == "nccl"
        for launch in range(3)
    ])  # fmt: skip


def test_all_reduces_are_drawn_and_shown_by_size_kind_and_interconnect(tmp_path: Path) -> None:
    rows = invented_all_reduces()
    probe.draw(rows, tmp_path / "all_reduce.png")
    assert (tmp_path / "all_reduce.png").stat().st_size > 20_000
    shown = probe.table(rows).splitlines()
    assert shown[0] == "| tp | message | native nccl | native one_shot | lbw nccl |"
    assert shown[2] == "| 2 | 8 KiB | 9.2 | 7.2 | 14.6 |"
    assert shown[-1].startswith("| 4 | 262144 KiB | ")
    assert "|  |" in shown[-1]  # symmetric memory is not tried there
    assert len(shown) == 2 + 2 * len(probe.BYTES)


def test_ranks_probe_their_all_reduce_and_rows_of_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"gpu": "none", "engine": "00012345", "date": "2026-11-27"}
    monkeypatch.setattr(probe, "here", lambda: here)
    sizes = [2**10, 2**13]
    for arguments in (["--launches", "2"], ["--launches", "1"], ["--launches", "1", "--interconnects", "lbw"]):
        command = [str(tmp_path), *(["--interconnects", "native"] if len(arguments) == 2 else []), *arguments]
        probe.main(command, devices=["cpu", "cpu"], sizes=sizes)
    rows = pd.read_csv(tmp_path / "all_reduce.csv")
    assert sorted(zip(rows["interconnect"], rows["launch"], rows["bytes"], strict=True)) == [
        *(("lbw", 0, size) for size in sizes),
        *(("native", launch, size) for launch in (0, 1) for size in sizes),
    ]
    assert (rows["us"] > 0).all()
    assert rows["bandwidth_gb_per_s"].to_numpy() == pytest.approx(
        (rows["bytes"] / rows["us"] / 1e3).to_numpy(), abs=1e-3
    )
    assert set(rows["gpu"]) == {"none"}
    here["gpu"] = "another"
    with pytest.raises(SystemExit, match=r"all_reduce.csv has rows of another GPU, .*; take another folder"):
        probe.main([str(tmp_path)], devices=["cpu", "cpu"], sizes=sizes)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_128x64_64x8_1x2_h_bz_TNT", "matrix product"),
        ("triton_red_fused__to_copy_add_mean_mm_mul_pow_rsqrt_t_view_1", "matrix product"),
        ("triton_red_fused_mm_mul_silu_split_t_view_0", "matrix product"),
        ("triton_red_fused__to_copy_add_mean_pow_0", "the rest"),
        ("triton_poi_fused__scaled_dot_product_cudnn_attention_add_cat_copy_copy__mul_0", "the rest"),
        ("triton_tem_fused_add_cat_flex_attention_mul_neg_split_split_with_sizes_transpose_view_2", "attention"),
        ("triton_poi_fused_add_cat_flex_attention_mul_neg_split_split_with_sizes_transpose_view_4", "attention"),
        ("triton_poi_fused__unsafe_view_index_copy_mm_split_with_sizes_transpose_view_2", "the rest"),
        ("triton_per_fused__to_copy__unsafe_view_add_cat_mm_mul_neg_split_sum_transpose_unsqueeze_view_4", "attention"),
        ("triton_red_fused__softmax_bitwise_not_exp_masked_fill_mul_sub_sum_unsqueeze_6", "attention"),
        ("void flash::flash_fwd_kernel<...>", "attention"),
        ("void gemv2T_kernel_val<int, ...>", "matrix product"),
    ],
)
def test_kernels_are_told_apart_by_name(name: str, kind: str) -> None:
    assert kind_of({"name": name, "communicates": False}) == kind
    assert kind_of({"name": name, "communicates": True}) == "all-reduce"


def test_fractions_asked_for_are_numbers_of_blocks() -> None:
    assert list(arms_of(80)) == ["0", "20", "40", "56", "80"]
    assert list(arms_of(28)) == ["0", "7", "14", "20", "28"]
    assert [column(arm, int(arm) / 28) for arm in arms_of(28)] == ["0 %", "25 %", "50 %", "70 %", "100 %"]
    assert column("no all-reduce", float("nan")) == "no all-reduce"
