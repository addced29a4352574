"""Costs by hand, and the committed floor against the code that makes it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from compiled_apart import fits

from benchmarks import costs, floor, floor_page, machine_code, workloads
from benchmarks.chips import CHIPS, Chip
from benchmarks.jobs import Job
from benchmarks.jobs_attention_divergence import CAPPED
from benchmarks.launches import OPS
from benchmarks.machine_code import DTYPES, TARGETS, wanted
from benchmarks.workloads import (
    AttentionWorkload,
    HiddenWorkload,
    IndexerWorkload,
    LogitsWorkload,
)

BF16 = torch.bfloat16


def attention(tokens: int, dims: tuple[int, int], **other: Any) -> AttentionWorkload:
    """Two items and three heads, unless `other` says otherwise."""
    shape = {"batch": 2, "heads": 3, "kv_heads": (3, 3), **other}
    return AttentionWorkload("small", device_batch=0, tokens=tokens, dims=dims, **shape)


def test_bytes_of_attention() -> None:
    work = attention(5, (4, 8))
    # queries and keys of 2 x 3 x 5 rows; the student's read and their gradients written
    assert costs.attention_bytes(work, BF16) == 2 * (2 * 30 * 4 * 2 + 2 * 30 * 8)
    assert costs.attention_bytes(work, torch.float32) == 2 * costs.attention_bytes(work, BF16)
    # one key head of the student, three of the teacher: 10 rows instead of 30
    shared = attention(5, (4, 8), kv_heads=(1, 3))
    assert costs.attention_bytes(shared, BF16) == 2 * ((30 + 10) * 4 * 2 + 2 * 30 * 8)


def test_operations_of_score_mse() -> None:
    # two score matrices and two products, once, 2 x 3 heads
    one = 2 * 128 * 128 * 6
    assert costs.attention_score_mse(attention(128, (64, 64)), 1, BF16).flops == one * 4 * 64
    # causal: 256 * 257 / 2 of the scores
    causal = costs.attention_score_mse(attention(256, (64, 64), causal=True), 1, BF16)
    assert causal.flops == 2 * (256 * 257 // 2) * 6 * 4 * 64
    # 256 tokens take Grams: X^T X and Y^T Y in three blocks, and [rows, 30] x [30, 10] twice
    gram = costs.attention_score_mse(attention(256, (10, 20)), 1, BF16)
    rows = 2 * 256 * 3
    products = 2 * (2 * rows) * (100 + 200 + 400) + 2 * (2 * rows) * 30 * 10
    assert gram.flops == products
    # under a causal mask the same, and tiles in three chunks of 128 tokens and one of 16
    long = costs.attention_score_mse(attention(400, (10, 20), causal=True), 1, BF16)
    inside = 6 * (3 * 128 * 129 // 2 + 16 * 17 // 2)
    assert long.flops == products * 400 // 256 + 2 * inside * (30 + 2 * 10)


def test_costs_of_divergence() -> None:
    cost = costs.attention_divergence(attention(8, (4, 6)), 2, BF16)
    one_score, one_product = 2 * 8 * 8 * 6 * (4 + 6), 2 * 8 * 8 * 6 * 4
    assert cost.flops == 2 * (one_score + 2 * one_product)
    assert cost.bytes == 2 * costs.attention_bytes(attention(8, (4, 6)), BF16)
    # one of either side for each of 8 x 8 scores of 6 heads, for half of them with a causal mask
    assert cost.exponentials == 2 * 2 * 8 * 8 * 6
    causal = costs.attention_divergence(attention(8, (4, 6), causal=True), 1, BF16)
    assert causal.exponentials == 2 * 36 * 6
    assert costs.attention_score_mse(attention(8, (4, 6)), 2, BF16).exponentials == 0


def test_costs_of_the_indexer() -> None:
    work = IndexerWorkload("small", 2, 0, 3, 6, 2, 5, (4, 7))
    # 10 rows: queries, key and weights read and their gradients written; the teacher's read
    moved = 10 * (2 * (3 * 4 + 4 + 3) + (6 + 2) * 7)
    products = 2 * 15 * (2 * 6 * 7 + 5 * 3 * 4)
    # one of each of 6 heads and one of the indexer for each of the 15 keys that rows see
    cost = (2 * 2 * moved, 2 * 2 * products, 2 * 2 * 15 * 7)
    assert costs.indexer_divergence(work, 2, BF16) == cost
    every = costs.indexer_divergence(work._replace(causal=False), 2, BF16)
    assert every.flops * 15 == 2 * 2 * products * 25
    assert every.exponentials * 15 == cost[2] * 25


def test_costs_of_hidden_states() -> None:
    work = HiddenWorkload("small", 2, 0, 5, (3, 7))
    # 10 rows read on both sides, the student's gradient written; weight and bias read and written
    assert costs.hidden(work, 1, BF16) == (
        2 * (10 * (3 + 3 + 7) + 2 * (21 + 7)),
        3 * 2 * 10 * 21,
        0,
    )
    # the weight is shared
    assert costs.hidden(work, 4, BF16) == (2 * (40 * 13 + 2 * 28), 4 * 3 * 2 * 10 * 21, 0)
    same = HiddenWorkload("same", 2, 0, 5, (7, 7))
    assert costs.hidden(same, 1, BF16) == (2 * 10 * 21, 0, 0)


def test_costs_of_logits() -> None:
    work = LogitsWorkload("small", 1, 1, 5, (3, 7), 11)
    moved = 5 * (3 + 3 + 7) + 11 * (3 + 3 + 7)
    products = 5 * 11 * 3 + 5 * 11 * 7 + 2 * 5 * 11 * 3
    cost = costs.logits_divergence(work, 1, BF16)
    assert cost == (2 * moved, 2 * products, 2 * 5 * 11)
    # raw logits go through no softmax
    assert costs.of_kind(cost, "logits_divergence", "mse") == (2 * moved, 2 * products, 0)
    assert costs.of_kind(cost, "logits_divergence", "kl") == cost
    assert costs.of_kind(cost, "attention_divergence", "mse") == cost


def test_floor_is_the_largest_of_three_times() -> None:
    # 10 cycles a second, of which each takes 100 operations and 8 exponentials
    units = {"multiprocessors": 2, "flops_of_cycle": 50, "lanes": {"special": 4}}
    chip = Chip("toy", ("cuda", 80), bandwidth=100.0, rate=1000.0, source="none", **units)
    assert chip.exponentials == 80.0
    assert floor.floor_seconds(costs.Cost(200, 1000, 80), chip) == (2.0, "memory")
    assert floor.floor_seconds(costs.Cost(200, 4000, 80), chip) == (4.0, "products")
    assert floor.floor_seconds(costs.Cost(200, 4000, 400), chip) == (5.0, "exponentials")


def test_rates_of_the_chips() -> None:
    """Clocks of the data sheets: 1.41, 1.83, 1.86 and 2.1 GHz; 16 exponentials a cycle."""
    clocks = {chip.name: round(chip.clock / 1e9, 2) for chip in CHIPS}
    assert clocks == {"A100": 1.41, "H100": 1.83, "H200": 1.83, "B200": 1.86, "MI300X": 2.1}
    rates = {chip.name: round(chip.exponentials / 1e12, 2) for chip in CHIPS}
    assert rates == {"A100": 2.44, "H100": 3.87, "H200": 3.87, "B200": 4.39, "MI300X": 10.21}


def test_tensor_core_instructions_are_told_apart() -> None:
    """Fences, loads and waits of the same unit are no products."""
    hopper = """
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, 1, 1, 1, 0, 1;
    @%p1 wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r2}, %rd3, %rd4, 1, 1, 1, 0, 1;
        wgmma.wait_group.sync.aligned 0;
        // mma.sync in a comment
    """
    assert machine_code.instructions(hopper) == {"wgmma.mma_async": 2}
    blackwell = """
        tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 64;
        @%p8 tcgen05.mma.cta_group::1.kind::f16 [ %r5 + 0 ], %rd1, %rd2, %r7, %p9;
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1}, {%r2}, {%r3}, {%r4};
    """
    assert machine_code.instructions(blackwell) == {"tcgen05.mma": 1, "mma.sync": 1}
    amd = "\tv_mfma_f32_32x32x8_bf16_1k a[0:15], v[2:3], v[4:5], a[0:15]\n\tv_mul_f32 v1, v2, v3\n"
    assert machine_code.instructions(amd) == {"v_mfma": 1}
    assert machine_code.instructions("fma.rn.f32 %f1, %f2, %f3, %f4;") == {}


def test_ci_compiles_every_kernel_and_changes_the_kind() -> None:
    made = [Job(name, kernel, {}, {}) for name, kernel in (("a", len), ("b", len), ("c", max))]

    def names(dtype: torch.dtype, target: machine_code.Target, turn: int) -> dict[str, list[str]]:
        found = machine_code.quick_jobs({"x": made[:2], "y": made}, dtype, target, turn)
        return {name: [job.name for job in jobs] for name, jobs in found.items()}

    assert names(BF16, ("cuda", 90), 0) == {"x": ["a"], "y": ["b", "c"]}
    assert names(BF16, ("cuda", 90), 1) == {"x": ["b"], "y": ["a", "c"]}
    assert names(torch.float32, ("cuda", 80), 0) == {"x": ["a"], "y": ["c"]}
    assert names(torch.float32, ("cuda", 90), 0) == {}


def test_what_is_committed_is_not_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    one = next(iter(wanted(["hidden"], everything=False)))
    monkeypatch.setattr(machine_code, "wanted", lambda ops, everything: [one])
    known = {machine_code.known_key(one.label()): {"registers": 7}}
    made = machine_code.compile_all(["hidden"], everything=False, processes=1, known=known)
    assert list(made) == [{**one.label(), "registers": 7}]


def test_shares_that_fall_are_told() -> None:
    call = {"op": "a", "kind": "kl", "workload": "w", "pairs": 4, "chip": "H100"}
    before, after = call | {"share": 0.5}, call | {"share": 0.4}
    assert list(floor.slower([before], [after])) == ["a kl w 4 H100: share of the floor 0.5 -> 0.4"]
    assert list(floor.slower([after], [before])) == []
    assert list(floor.slower([], [after])) == []


def test_every_chip_has_a_compiled_target() -> None:
    assert {chip.target for chip in CHIPS} == set(TARGETS)


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    found = json.loads((floor.RESULTS / "floor.json").read_text(encoding="utf-8"))
    assert set(found) == {"triton", "floors", "predictions", "machine_code"}
    return dict(found)


AGAIN = "out of date: run `python -m benchmarks.floor --write`"


def test_committed_floors_are_those_of_the_code(committed: dict[str, Any]) -> None:
    assert committed["floors"] == floor.floors(), AGAIN


def test_committed_machine_code_is_of_the_launches(committed: dict[str, Any]) -> None:
    """Same kernels, of the same source, arguments, warps and stages."""
    labels = [one.label() for one in wanted(OPS, everything=True)]
    found = [
        {name: row.get(name, workload) for name in labels[0]}
        for row in committed["machine_code"]
        for workload in row["workloads"]
    ]
    assert sorted(map(str, found)) == sorted(map(str, labels)), AGAIN


def test_committed_predictions_are_those_of_the_code(committed: dict[str, Any]) -> None:
    assert committed["predictions"] == floor.predictions(committed["machine_code"]), AGAIN
    for row in committed["predictions"]:
        # a floor above what code takes at least would be none
        assert 0 < row["share"] <= 1, row


def test_committed_code_loads_wide_and_ahead(committed: dict[str, Any]) -> None:
    """What `test_kernels_compile.py` asks of a few workloads, of all."""
    codes = {machine_code.known_key(row): row for row in committed["machine_code"]}
    checked = 0
    for one in wanted(OPS, everything=True):
        row = codes[machine_code.known_key(one.label())]
        if "loads" in row:
            assert machine_code.narrow_loads(one.job, row) == [], one.label()
            staged = one.job.options["num_stages"] > 1 and row["products"]
            assert row["asynchronous"] or not staged, one.label()
            checked += 1
    assert checked > 500


def test_committed_page_is_that_of_the_numbers(committed: dict[str, Any]) -> None:
    page = (floor.RESULTS / "floor.md").read_text(encoding="utf-8")
    assert page == floor_page.markdown(committed, OPS), AGAIN


def test_every_committed_kernel_fits_its_chip(committed: dict[str, Any]) -> None:
    """What CI does not compile anew: every workload in both dtypes on every target."""
    seen = set()
    for row in committed["machine_code"]:
        seen.add((*row["target"], row["dtype"]))
        # soft caps at heads of 256 on both sides spill more
        assert fits(row) or (row["workloads"] == [CAPPED.name] and row["spills"] < 512), row
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    assert seen == {(*target, name) for target in TARGETS for name in names}


def test_jobs_are_told_apart() -> None:
    """A workload's kernels have names of their own, and CI's workloads exist."""
    every = [
        (one.op, one.workload, one.dtype, one.target, one.job.name)
        for one in wanted(OPS, everything=True)
    ]
    assert len(every) == len(set(every))
    for op, module in OPS.items():
        names = {work.name for work in module.WORKLOADS}
        assert module.QUICK, op
        assert set(module.QUICK) <= names, op


def test_workloads_are_those_asked_for() -> None:
    bert = workloads.ATTENTION["bert-base-to-tinybert-4-512"]
    assert (bert.device_batch, bert.heads, bert.dims) == (16, 12, (26, 64))
    assert workloads.ATTENTION["bert-base-to-tinybert-4-128"].device_batch == 64
    for tokens in (2048, 8192):
        llama = workloads.ATTENTION[f"llama-like-{tokens}"]
        assert (llama.device_batch, llama.heads, llama.kv_heads[0], llama.causal) == (
            1,
            32,
            8,
            True,
        )
    logits = workloads.LOGITS.values()
    assert {work.vocabulary for work in logits} == {8192, 32000, 128256}
    assert {work.tokens for work in logits} == {256, 1024, 2048, 8192}
    every = (workloads.ATTENTION, workloads.INDEXER, workloads.HIDDEN, workloads.LOGITS)
    for named in every:
        assert all(work.batch for work in workloads.on_cpu(named.values()))
        assert all(name == work.name for name, work in named.items())
        for work in workloads.on_device(named.values()):
            assert work.batch == named[work.name].device_batch > 0


def test_device_cases_are_named_workloads() -> None:
    from benchmarks import device

    named = {*workloads.ATTENTION, *workloads.INDEXER, *workloads.HIDDEN, *workloads.LOGITS}
    every = [*device.CASES, *device.MORE_CASES]
    assert {case.workload for case in every} <= named
    assert len({case.name for case in every}) == len(every)
    assert device.cases_of(()) == [*device.CASES] and len(device.CASES) <= 14
    long = "attention_divergence js bert-base-to-tinybert-4-2048"
    assert [case.name for case in device.cases_of([long])] == [f"{long} x4"]
