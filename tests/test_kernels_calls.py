"""What calls remember of earlier ones, how eager calls go around the dispatcher, and on which GPU.

Nothing remembered may be seen in a result: a mask that was changed, tensors that lie where others
lay, captured graphs, fake tensors.
"""

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastkd_kernels import (
    AttentionState,
    attention_divergence,
    attention_score_mse,
    hidden_cosine,
    hidden_mse,
    hidden_normalized_mse,
    indexer_divergence,
    logits_divergence,
)
from fastkd_kernels.common import autograd, quick_launch, remembered, tensor_table
from fastkd_kernels.common.attention_call import Call, valid_spans
from fastkd_kernels.common.head_groups import pairs_of
from indexer_cases import indexer_case
from kernel_cases import attention_states, hidden_case, leaves_of, masks
from logits_cases import logits_case
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
BACKENDS = ["triton"] if CUDA else ["torch", "triton"]
BATCH, TOKENS = 2, 6

Step = Callable[[Tensor], list[Tensor]]
Change = Callable[[Any], Any]


def as_it_is(given: Any) -> Any:
    return given


def inferred(given: Any) -> Any:
    """The same numbers, as inference mode makes them."""
    if isinstance(given, Tensor):
        with torch.inference_mode():
            return given.clone()
    if isinstance(given, tuple) and hasattr(given, "_make"):
        return given._make(map(inferred, given))
    return [*map(inferred, given)] if isinstance(given, list) else given


def attention_step(
    op: Callable[..., Tensor], backend: str, change: Change = as_it_is, **options: Any
) -> Step:
    """Losses and gradients of one op for a mask, with a changed teacher."""
    student, teacher = attention_states(
        2, BATCH, 2, TOKENS, (3, 5), dtype=torch.float32, device=DEVICE
    )
    teacher = change(teacher)

    def step(mask: Tensor) -> list[Tensor]:
        loss = op(student, teacher, key_mask=mask, query_mask=mask, backend=backend, **options)
        return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves_of(student))]

    return step


def hidden_step(backend: str, change: Change = as_it_is) -> Step:
    case = hidden_case(2, BATCH, TOKENS, (3, 5), "shared+bias", torch.float32).on(DEVICE)
    teacher = change(case.teacher)

    def step(mask: Tensor) -> list[Tensor]:
        options: dict[str, Any] = {**case.trained, "mask": mask, "backend": backend}
        loss = hidden_mse(case.student, teacher, **options)
        return [loss.detach(), *torch.autograd.grad(loss.sum(), case.leaves)]

    return step


def indexer_step(backend: str, change: Change = as_it_is) -> Step:
    case = indexer_case(2, BATCH, TOKENS, (3, 5), sinks=True, dtype=torch.float32, device=DEVICE)
    teacher = change(case.teacher)

    def step(mask: Tensor) -> list[Tensor]:
        options: dict[str, Any] = {"key_mask": mask, "query_mask": mask, "backend": backend}
        loss = indexer_divergence(case.student, teacher, **options)
        # its upstream gradient is made on the GPU, which a capture asks for
        return [loss.detach(), *torch.autograd.grad(loss.sum(), case.leaves)]

    return step


def logits_step(backend: str, change: Change = as_it_is, labelled: bool = False) -> Step:
    given: dict[str, Any] = {"masked": False, "labelled": labelled, "dtype": torch.float32}
    case = logits_case((BATCH, TOKENS), ("head", "head"), **given).on(DEVICE)
    options = {word: change(value) for word, value in case.options.items()}
    case = replace(case, teacher=change(case.teacher), options=options)
    return lambda mask: case.run(logits_divergence, mask=mask, backend=backend)


STEPS: dict[str, Callable[..., Step]] = {
    "tiles": partial(attention_step, attention_score_mse, algorithm="tiles"),
    "gram": partial(attention_step, attention_score_mse, algorithm="gram"),
    "divergence": partial(attention_step, attention_divergence),
    "hidden": hidden_step,
    "indexer": indexer_step,
    "logits": logits_step,
    "labelled logits": partial(logits_step, labelled=True),
}


def entries() -> int:
    return len(remembered._made) + len(tensor_table._addressed) + len(tensor_table._tables)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", STEPS)
def test_a_mask_that_is_changed_in_place_is_seen(name: str, backend: str) -> None:
    step = STEPS[name](backend)
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool, device=DEVICE)
    before = step(mask)
    # the second call finds what the first one made
    assert all(map(torch.equal, step(mask), before))
    mask[1, 2:] = False
    changed = step(mask)
    assert not torch.equal(changed[0], before[0])
    assert all(map(torch.equal, changed, step(mask.clone())))


@pytest.mark.skipif(CUDA, reason="where masks are compared")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", STEPS)
def test_what_is_written_behind_torch_is_seen_on_the_cpu(name: str, backend: str) -> None:
    """As collectives of torch.distributed write, which raise no version either."""
    step = STEPS[name](backend)
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    before, version = step(mask), mask._version
    mask.numpy()[1, 2:] = False
    assert mask._version == version
    changed = step(mask)
    assert not torch.equal(changed[0], before[0])
    assert all(map(torch.equal, changed, step(mask.clone())))


@pytest.mark.skipif(CUDA, reason="where labels are compared")
def test_labels_that_are_written_behind_torch_are_seen_on_the_cpu() -> None:
    student, teacher = torch.randn(2, 1, 4, 5)
    labels = torch.tensor([[1, 2, -100, -100]])
    logits_divergence(student, teacher, labels=labels)
    labels.numpy()[0, 2:] = 3, 4
    _, hard = logits_divergence(student, teacher, labels=labels)
    expected = torch.nn.functional.cross_entropy(student[0], labels[0])
    torch.testing.assert_close(hard, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", STEPS)
def test_autocast_changes_nothing(name: str, backend: str) -> None:
    step = STEPS[name](backend)
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        first = step(mask)
    plain = step(mask)
    with torch.autocast(DEVICE, torch.bfloat16):
        again = step(mask)
    assert all(map(torch.equal, first, plain)) and all(map(torch.equal, again, plain))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", STEPS)
def test_a_teacher_may_run_in_inference_mode(name: str, backend: str) -> None:
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool, device=DEVICE)
    expected = STEPS[name](backend)(mask)
    found = STEPS[name](backend, inferred)(inferred(mask))
    assert all(map(torch.equal, found, expected))


def test_what_is_made_of_a_mask_is_made_once_and_goes_with_it() -> None:
    made = []

    def count(*sources: Tensor | None) -> int:
        def make() -> int:
            made.append(sources)
            return len(made)

        return remembered.remembered(sources, "count", torch.device("cpu"), make)

    first, second = (torch.ones(2, 3, dtype=torch.bool) for _ in range(2))
    kept = len(remembered._made)
    assert [count(first, None), count(first, None), count(None, first), count(second, None)] == [
        *(1, 1),
        2,
        3,
    ]
    assert len(remembered._made) == kept + 3
    first.zero_()
    assert count(first, None) == 4
    with torch.inference_mode():
        assert count(second, None) == 5
        assert count(torch.ones(2, dtype=torch.bool)) == 6
    with remembered.forgetting():
        assert count(second, None) == 7
    with FakeTensorMode():
        assert count(torch.ones(2, dtype=torch.bool)) == 8
    assert count(second, None) == 3
    made.clear()
    del first, second
    gc.collect()
    assert len(remembered._made) == kept


def test_what_is_remembered_stays_bounded() -> None:
    recent: remembered.Recent[int] = remembered.Recent(most=3)
    for number in range(20):
        recent.put(number, number)
        assert recent.get(0) == 0
        assert len(recent) <= 6
    assert recent.get(19) == 19
    assert recent.get(5) is None
    step = attention_step(attention_score_mse, "torch")
    tables = [torch.zeros(1, device=DEVICE) for _ in range(3 * remembered.MOST)]
    for table in tables:
        tensor_table.addressed([[table]])
    for _ in range(8):
        step(masks(BATCH, TOKENS).to(DEVICE))
    gc.collect()
    assert entries() <= 6 * remembered.MOST


def test_a_table_says_where_tensors_lie_now() -> None:
    """Other tensors at the same address make the same table, others' strides another one."""
    memory = torch.zeros(64)
    wide, narrow = memory.view(4, 16), memory.view(8, 8)
    views = [wide, narrow, wide, narrow[:4], wide[:, :8], wide[:, :6], memory[1:33].view(2, 16)]
    # rows of 4 that are 6 apart
    views.append(memory[:24].view(4, 6)[:, :4])
    found = [tensor_table.addressed([[view]]) for view in views]
    tables = [made.table.tolist() for made in found]
    assert tables == [[[view.data_ptr(), *view.stride()[:-1]]] for view in views]
    # elements that divide 16 bytes, address, length and stride
    assert [made.alignments for made in found] == [*[(4,)] * 5, (2,), (1,), (2,)]
    # of a column, what all of its pairs have
    pairs = tensor_table.addressed([[memory[:32].view(2, 16)], [memory[1:33].view(2, 16)]])
    assert pairs.alignments == (1,)
    apart = narrow.mT
    table, _, (copy,) = tensor_table.addressed([[apart]])
    assert table.tolist() == [[copy.data_ptr(), 8]]
    assert torch.equal(copy, apart) and copy.is_contiguous()


@pytest.mark.parametrize("place", range(4))
def test_a_call_is_as_aligned_as_the_worst_of_its_queries_and_keys(place: int) -> None:
    memory = torch.zeros(97, device=DEVICE)
    heads = [memory[:96].view(1, 2, 3, 16)] * 4
    heads[place] = memory[1:].view(1, 2, 3, 16)
    constants = Call(pairs_of(*([one] for one in heads), [1.0], [1.0]), masked=False).constants
    found = constants["ALIGN"], constants["TEACHER_ALIGN"]
    assert found == ((1, 4) if place < 2 else (4, 1))


def test_what_is_remembered_of_a_mask_is_told_apart_by_options() -> None:
    states = attention_states(1, BATCH, 2, TOKENS, (4, 4), dtype=torch.float32, device=DEVICE)
    case = hidden_case(1, BATCH, TOKENS, (4, 4), "none", torch.float32).on(DEVICE)
    sides = case.student, case.teacher
    late = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0]], device=DEVICE).bool()
    for mask in (None, late):
        calls: list[Callable[[], Tensor]] = []
        for causal in (False, True):
            given: dict[str, Any] = {"key_mask": mask, "causal": causal}
            for kind in ("valid", "tinybert"):
                calls.append(partial(attention_score_mse, *states, reduction=kind, **given))
            for kind, window in (("tokens", None), ("sequences", None), ("sequences", 2)):
                options = {**given, "reduction": kind, "window": window}
                calls.append(partial(attention_divergence, *states, **options))
        for op in (hidden_mse, hidden_cosine, hidden_normalized_mse):
            calls.append(partial(op, *sides, mask=mask))
        found = [call() for call in calls]
        with remembered.forgetting():
            assert all(map(torch.equal, found, [call() for call in calls]))


def test_tables_of_one_layout_differ_in_addresses_alone() -> None:
    first, second = (torch.zeros(3, 5, 16) for _ in range(2))
    tensor_table.addressed([[first]])
    kept = len(tensor_table._layouts)
    given = [first, second, second, first]
    tables = [tensor_table.addressed([[one]]).table.tolist() for one in given]
    assert tables == [[[one.data_ptr(), 80, 16]] for one in given]
    assert len(tensor_table._layouts) == kept
    # other shapes, strides, dtypes and numbers of pairs are other layouts
    others = [[[first[:2]]], [[first[:, :1]]], [[first.long()]], [[first], [second]]]
    assert [tensor_table.addressed(rows).table.shape for rows in others] == [
        *[(1, 3)] * 3,
        (2, 3),
    ]
    # that a tensor must be copied is found again too, and the copy is a new one
    apart = torch.arange(6.0).view(2, 3).mT
    for value in (1.0, 2.0):
        apart.fill_(value)
        table, _, (copy,) = tensor_table.addressed([[apart]])
        assert table.tolist() == [[copy.data_ptr(), 2]] and torch.equal(copy, apart)


def test_what_has_passed_the_checks_once_is_still_looked_at() -> None:
    student, teacher = attention_states(2, BATCH, 2, TOKENS, (3, 5), dtype=torch.float32)
    run = partial(attention_score_mse, backend="torch")
    before = run(student, teacher)
    assert before.requires_grad
    for tensor in leaves_of(student):
        tensor.requires_grad_(False)
    after = run(student, teacher)
    assert torch.equal(before, after) and not after.requires_grad
    # gradients reach what is trained, and nothing else
    student[1].key.requires_grad_()
    (gradient,) = torch.autograd.grad(run(student, teacher).sum(), student[1].key)
    assert gradient.shape == student[1].key.shape
    teacher[0].query.requires_grad_()
    with pytest.raises(ValueError, match=r"teacher\[0\].query requires grad"):
        run(student, teacher)
    teacher[0].query.requires_grad_(False)
    wide = [state._replace(query=state.query.double()) for state in student]
    with pytest.raises(TypeError, match="float64"):
        run(wide, teacher)
    with pytest.raises(ValueError, match="backend"):
        attention_score_mse(student, teacher, backend="cuda")  # type: ignore[arg-type]


def test_threads_share_what_is_remembered() -> None:
    # Triton's interpreter runs one launch at a time
    steps = [attention_step(attention_score_mse, "triton" if CUDA else "torch") for _ in range(4)]
    mask = masks(BATCH, TOKENS).to(DEVICE)
    expected = [step(mask) for step in steps]
    tensors = [torch.zeros(3, 16, device=DEVICE) for _ in range(3 * remembered.MOST)]

    def table(tensor: Tensor) -> list[list[int]]:
        return tensor_table.addressed([[tensor]]).table.tolist()

    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            given = list(pool.map(lambda step: step(mask), steps))
            for one, wanted in zip(given, expected, strict=True):
                assert all(map(torch.equal, one, wanted))
            assert list(pool.map(table, tensors)) == [[[one.data_ptr(), 16]] for one in tensors]


@pytest.mark.skipif(CUDA, reason="the interpreter, or PyTorch, on the CPU")
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_other_values_at_the_same_addresses(backend: str) -> None:
    memory = torch.randn(4, 1, 2, TOKENS, 4)
    for seed in range(2):
        memory.normal_(generator=torch.Generator().manual_seed(seed))
        query, key, target, other = (part.detach() for part in memory)
        states = [
            AttentionState(query.requires_grad_(), key, None, 0.5),
            AttentionState(target, other, None, 0.5),
        ]
        copies = [s._replace(query=s.query.detach().clone(), key=s.key.clone()) for s in states]
        given, expected = (
            attention_score_mse([student], [teacher], backend=backend)
            for student, teacher in (states, copies)
        )
        assert torch.equal(given, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", STEPS)
def test_eager_calls_do_what_the_registered_op_does(name: str, backend: str) -> None:
    """A mode sends a call through the dispatcher."""
    step, mask = STEPS[name](backend), masks(BATCH, TOKENS).to(DEVICE)
    with FlopCounterMode(display=False):
        dispatched = step(mask)
    assert all(map(torch.equal, dispatched, step(mask)))


@pytest.mark.parametrize("masked", [True, False])
def test_fake_tensors_leave_nothing_behind(masked: bool) -> None:
    kept = entries()
    with FakeTensorMode():
        # of a shape that no other test has
        student, teacher = attention_states(1, BATCH, 2, 11, (3, 5), dtype=torch.float32)
        mask = torch.ones(BATCH, 11, dtype=torch.bool) if masked else None
        loss = attention_score_mse(student, teacher, key_mask=mask, backend="torch")
        torch.autograd.grad(loss.sum(), leaves_of(student))
    assert entries() == kept


def test_a_gradient_may_be_differentiated_by_the_upstream_one() -> None:
    student, teacher = attention_states(2, BATCH, 2, TOKENS, (3, 5))
    upstream = torch.rand(2, dtype=torch.float64, requires_grad=True)
    loss = attention_score_mse(student, teacher, backend="torch")
    (gradient,) = torch.autograd.grad(loss, student[1].query, upstream, create_graph=True)
    (found,) = torch.autograd.grad(gradient.sum(), upstream)
    expected = gradient.sum().detach() / upstream[1].detach()
    torch.testing.assert_close(found, torch.stack([torch.zeros_like(expected), expected]))


def test_ops_run_with_their_tensors_gpu_as_the_current_one(monkeypatch: Any) -> None:
    entered: list[Any] = []

    class Device:
        def __init__(self, device: Any) -> None:
            self.device = device

        def __enter__(self) -> None:
            entered.append(self.device)

        def __exit__(self, *_: object) -> None:
            entered.append(None)

    monkeypatch.setattr(torch.cuda, "device", Device)
    tensor: Any = SimpleNamespace(is_cuda=True, device="cuda:1")
    assert autograd.on_its_device(tensor, lambda number: [*entered, number], (5,)) == ["cuda:1", 5]
    assert entered == ["cuda:1", None]
    assert autograd.on_its_device(torch.ones(1), len, ([0],)) == 1
    assert entered == ["cuda:1", None]


@pytest.mark.parametrize("mode", [None, FlopCounterMode])
def test_every_op_asks_for_its_gpu(mode: Any, monkeypatch: Any) -> None:
    """Forward and backward, eager or dispatched."""
    asked: list[str] = []
    direct = autograd.on_its_device

    def noted(tensor: Tensor, function: Any, arguments: Any) -> Any:
        # a plan is made, and then run
        asked.append(function.__qualname__.split(".")[0])
        return direct(tensor, function, arguments)

    monkeypatch.setattr(autograd, "on_its_device", noted)
    backend = "triton"
    step = attention_step(attention_divergence, backend)
    if mode is None:
        step(masks(BATCH, TOKENS).to(DEVICE))
    else:
        with mode(display=False):
            step(masks(BATCH, TOKENS).to(DEVICE))
    assert list(dict.fromkeys(asked)) == ["_divergence", "_rescaled"]
    assert len(asked) == (4 if mode is None else 2)


class Compiled:
    def __init__(self, launches: list[Any]) -> None:
        self.launches = launches

    def __getitem__(self, grid: Any) -> Any:
        return lambda *given: self.launches.append((grid, given))


class Kernel:
    """In the place of Triton's: what it compiles for, and the launches of what it compiled."""

    arg_names = ("left", "right", "size", "BLOCK", "FLAG")

    def __init__(self) -> None:
        self.compiled: list[Any] = []
        self.launches: list[Any] = []

    def __getitem__(self, grid: Any) -> Any:
        def launch(*given: Any, **rest: Any) -> Compiled:
            self.compiled.append((grid, given, rest))
            return Compiled(self.launches)

        return launch


def test_a_launch_of_the_same_kind_finds_its_compiled_kernel(monkeypatch: Any) -> None:
    active = SimpleNamespace(get_current_device=lambda: 0)
    runtime = SimpleNamespace(driver=SimpleNamespace(active=active))
    fake = SimpleNamespace(JITFunction=Kernel, runtime=runtime)
    monkeypatch.setattr(quick_launch, "triton", fake)
    monkeypatch.setattr(torch.version, "hip", None)
    kernel, (left, right) = Kernel(), torch.zeros(2, 16).double()
    options: dict[str, Any] = {"FLAG": True, "size": 3, "BLOCK": 16, "num_warps": 4}
    quick = quick_launch.Quick(kernel)
    quick[(2, 3)](left, right, **options)
    assert len(kernel.compiled) == 1 and not kernel.launches
    # other tensors and another grid, in the order of the parameters
    quick[(5,)](right, left, **options)
    assert len(kernel.compiled) == 1
    ((grid, given),) = kernel.launches
    assert grid == (5, 1, 1)
    assert given[0] is right and given[1] is left and given[2:] == (3, 16, True)
    others = [{**options, "size": 4}, {**options, "FLAG": False}, {**options, "num_warps": 8}]
    for changed in others:
        quick[(5,)](right, left, **changed)
    quick[(5,)](right[1:], left, **options)
    quick[(5,)](right.float(), left, **options)
    active.get_current_device = lambda: 1
    quick[(5,)](right, left, **options)
    assert len(kernel.compiled) == 7 and len(kernel.launches) == 1
    # what is no kernel of Triton's, such as the interpreter's, launches as ever
    assert quick_launch.Quick({(1,): len})[(1,)]([0, 0]) == 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("op", [attention_score_mse, attention_divergence])
def test_tensors_on_another_gpu(op: Callable[..., Tensor]) -> None:
    results = []
    for device in ("cuda:0", "cuda:1"):
        student, teacher = attention_states(
            2, BATCH, 2, TOKENS, (3, 5), dtype=torch.float32, device=device
        )
        loss = op(student, teacher)
        gradients = torch.autograd.grad(loss.sum(), leaves_of(student))
        results.append([value.cpu() for value in (loss.detach(), *gradients)])
    assert torch.cuda.current_device() == 0
    assert all(map(torch.equal, *results))


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("name", STEPS)
def test_a_captured_graph_reads_what_lies_there_when_it_is_replayed(name: str) -> None:
    step, mask = STEPS[name]("triton"), torch.ones(BATCH, TOKENS, dtype=torch.bool, device=DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(mask)
    torch.cuda.current_stream().wait_stream(stream)
    kept, graph = entries(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(mask)
    assert entries() == kept
    # what was remembered, and pinned memory that was free, go to others
    for cache in (remembered._made, tensor_table._addressed, tensor_table._tables):
        cache.clear()
    noise = [torch.randint(1 << 40, (512,)).pin_memory() for _ in range(64)]
    mask[1, 2:] = False
    graph.replay()
    expected = step(mask)
    assert noise
    for given, value in zip(captured, expected, strict=True):
        torch.testing.assert_close(given, value, rtol=0, atol=0)


def test_spans_are_the_first_run_of_valid_rows_and_the_end_of_all() -> None:
    valid = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    assert valid_spans(valid).tolist() == [[0, 2, 4], [1, 3, 3], [0, 0, 0], [0, 4, 4]]
