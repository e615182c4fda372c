"""Attribution against known kernels: what a module launches is counted where it was launched, in every phase."""

import ctypes
import importlib.util
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recording import (
    MM,
    ONCE_A_STEP,
    SIGNS,
    Apply,
    Cells,
    Matmuls,
    Recorded,
    record,
    through,
    trainer_step,
)

from tunescope import latency_files as files
from tunescope.analyze.attribution import memory_timeline
from tunescope.analyze.places import CLIPPING, NO_OPERATOR, OTHER_THREAD, OUTSIDE, STEPPING, UNATTRIBUTED, ZEROING
from tunescope.measure import trace as trace_module
from tunescope.measure.phases import PhaseClock

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")]
FORWARD, RECOMPUTE, BACKWARD, CLIP, OPTIMIZER, REST = files.PHASES
CHECKPOINTING = pytest.mark.parametrize("kind", [None, True, False], ids=["none", "reentrant", "non-reentrant"])
DEVICE = "cuda"
# Large enough that the library splits no product into several kernels, and that a product takes longer than its launch.
WIDTH = 2048
MIB = 2**20


def wide(*, requires_grad: bool = True) -> torch.Tensor:
    return torch.ones(WIDTH, WIDTH, device=DEVICE, dtype=torch.bfloat16, requires_grad=requires_grad)


def products(count: int, *, trained: bool = True) -> Matmuls:
    module = Matmuls(count, trained=trained)
    module.weight = torch.nn.Parameter(
        0.5 * torch.eye(WIDTH, device=DEVICE, dtype=torch.bfloat16), requires_grad=trained
    )
    return module


def on_gpu(model: torch.nn.Module, run: Callable[[], Any], **how: Any) -> Recorded:
    """Recorded once the libraries are loaded, and with every kernel of what came before done."""
    run()
    torch.cuda.synchronize()
    recorded = record(model, run, on_gpu=True, **how)
    assert recorded.attribution.on_gpu
    assert (recorded.work["device"] == 0).all()
    assert (recorded.work["phase"] != UNATTRIBUTED).all()
    return recorded


def trains(model: torch.nn.Module) -> Callable[[], None]:
    return lambda: model(wide()).sum().backward()


def gemms(recorded: Recorded) -> Cells:
    """Kernels of matrix products in each cell."""
    work = recorded.work
    found = work[(work["op"] == MM) & (work["kind"] == files.KERNEL)]
    return dict(Counter(zip(found["phase"], found["module"], strict=True)))


@pytest.fixture(scope="module")
def kernels_of_products() -> tuple[int, int, int]:
    """How many kernels the library takes for a product, for the gradient of its input and for that of its weight."""

    def count(run: Callable[[], torch.Tensor]) -> int:
        events = on_gpu(torch.nn.Identity(), run).recording.events
        return int((events["kind"] == files.KERNEL).sum())

    x, weight = wide(requires_grad=False), wide(requires_grad=False)
    return count(lambda: x @ weight), count(lambda: x @ weight.t()), count(lambda: x.t() @ weight)


@pytest.fixture
def cells(kernels_of_products: tuple[int, int, int]) -> Callable[..., Cells]:
    """Expected kernels: path -> (products in a forward, whether the weight is trained, products in recompute)."""
    forward, of_input, of_weight = kernels_of_products

    def expect(**modules: tuple[int, bool, int]) -> Cells:
        found = {}
        for path, (count, trained, again) in modules.items():
            found[FORWARD, path] = count * forward
            found[RECOMPUTE, path] = again * forward
            found[BACKWARD, path] = count * (of_input + of_weight * trained)
        return {cell: count for cell, count in found.items() if count}

    return expect


# --- modules, phases ---


@CHECKPOINTING
def test_products_of_checkpointed_layers(kind: bool | None, cells: Callable[..., Cells]) -> None:
    """Non-reentrant recompute stops as the last product asks for its inputs: that one is not run again."""

    def layers(self: Any, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = through(kind, layer, x)
        return x

    blocks = [torch.nn.Sequential(products(2), products(3, trained=False)) for _ in range(2)]
    model = Apply(layers, layers=torch.nn.ModuleList(blocks))
    recorded = on_gpu(model, trains(model))
    first, second = {None: (0, 0), True: (2, 3), False: (2, 2)}[kind]
    assert gemms(recorded) == cells(
        **{f"layers.{i}.0": (2, True, first) for i in (0, 1)}, **{f"layers.{i}.1": (3, False, second) for i in (0, 1)}
    )
    events, calls = recorded.recording.events, recorded.recording.calls
    threads = dict(events.loc[events["kind"] == files.CALL, ["ref", "thread"]].itertuples(index=False))
    by_thread = calls.groupby(calls["call"].map(threads))["is_recompute"].agg(list)
    # Backward has a thread of its own, and so has recompute.
    assert [set(flags) for flags in by_thread] == ([{False}] if kind is None else [{False}, {True}])


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("inner", [True, False])
def test_nested_checkpointing(outer: bool, inner: bool, cells: Callable[..., Cells]) -> None:
    def block(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.after(through(inner, self.inside, x))

    model = Apply(
        lambda self, x: through(outer, self.layer, x), layer=Apply(block, inside=products(2), after=products(2))
    )
    # `after` runs again as often as the outer function, `inside` as often as both.
    after = 2 if outer else 1
    inside = 2 + (2 if inner else 1)
    assert gemms(on_gpu(model, trains(model))) == cells(
        **{"layer.after": (2, True, after), "layer.inside": (2, True, inside)}
    )


@CHECKPOINTING
def test_a_checkpointed_function_that_is_no_module(kind: bool | None, cells: Callable[..., Cells]) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        def function(y: torch.Tensor) -> torch.Tensor:
            y = torch.sin(y + torch.zeros(WIDTH, WIDTH, device=DEVICE, dtype=torch.bfloat16))
            return self.part(torch.sin(y))

        return through(kind, function, x)

    model = Apply(lambda self, x: self.caller(x), caller=Apply(forward, part=products(2)))
    recorded = on_gpu(model, trains(model))
    again = {None: 0, True: 2, False: 1}[kind]
    assert gemms(recorded) == cells(**{"caller.part": (2, True, again)})
    in_recompute = {(RECOMPUTE, "caller"): 2} if kind is not None else {}
    assert recorded.cells("aten::sin", "op") == {(FORWARD, "caller"): 2} | in_recompute
    filled = {cell: count for cell, count in recorded.cells("aten::fill_", "op").items() if cell[1] == "caller"}
    assert filled == {(phase, "caller"): 1 for phase in (FORWARD, RECOMPUTE) if phase == FORWARD or kind is not None}


@CHECKPOINTING
def test_gradients_of_parameters_are_added_in_their_modules(kind: bool | None) -> None:
    model = Apply(lambda self, x: through(kind, self.part, x), part=products(1))

    def run() -> None:
        model.zero_grad()
        for _ in range(3):
            trains(model)()

    recorded = on_gpu(model, run)
    assert recorded.cells("aten::add_", "op") == {(BACKWARD, "part"): 2}
    adding = recorded.work[recorded.work["op"] == "aten::add_"]
    assert set(adding["node"]) == {"torch::autograd::AccumulateGrad"}


def test_hooks_on_tensors_run_where_the_tensor_was_made() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = self.part(x)
        x.register_hook(lambda gradient: torch.flip(gradient, [0]))
        return torch.sin(x)

    model = Apply(forward, part=products(1))
    recorded = on_gpu(model, trains(model))
    assert recorded.cells("aten::flip", "op") == {(BACKWARD, "part"): 1}
    assert (BACKWARD, OUTSIDE) not in gemms(recorded)


def test_an_exception_that_the_model_catches(cells: Callable[..., Cells]) -> None:
    def fails(self: Any, x: torch.Tensor) -> torch.Tensor:
        self.part(x)
        raise ValueError("as planned")

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        try:
            return self.bad(x)
        except ValueError:
            pass
        return self.good(x)

    model = Apply(forward, bad=Apply(fails, part=products(1)), good=products(2))
    found = gemms(on_gpu(model, trains(model)))
    expected = cells(good=(2, True, 0), **{"bad.part": (1, True, 0)})
    del expected[BACKWARD, "bad.part"]
    assert found == expected


# --- what is not an operator of torch ---


class Launches(torch.autograd.Function):
    """One kernel without an operator in forward, two in backward."""

    launch: Callable[[torch.Tensor], torch.Tensor]

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return Launches.launch(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        assert ctx.saved_tensors
        return Launches.launch(Launches.launch(gradient.contiguous()))


@CHECKPOINTING
def test_triton_kernels(kind: bool | None, cells: Callable[..., Cells], tmp_path: Path) -> None:
    launch_add_one = triton_kernel(tmp_path)

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.after(Launches.apply(launch_add_one(x.detach()) + x))

    Launches.launch = staticmethod(launch_add_one)
    model = Apply(lambda self, x: through(kind, self.layer, x), layer=Apply(forward, after=products(1)))
    recorded = on_gpu(model, trains(model))
    again = {(RECOMPUTE, "layer"): 2} if kind is not None else {}
    assert recorded.cells("add_one_kernel") == {(FORWARD, "layer"): 2, (BACKWARD, "layer"): 2} | again
    assert gemms(recorded) == cells(**{"layer.after": (1, True, 1 if kind else 0)})
    ours = recorded.work[recorded.work["name"] == "add_one_kernel"]
    assert set(ours.loc[ours["phase"] == BACKWARD, "node"]) == {"LaunchesBackward"}
    assert set(ours.loc[ours["phase"] == BACKWARD, "op"]) == {NO_OPERATOR}
    # One of forward's two was launched by no operator at all, the other within the autograd function.
    assert Counter(ours.loc[ours["phase"] == FORWARD, "op"]) == {NO_OPERATOR: 1, "Launches": 1}


def triton_kernel(folder: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """Triton reads a kernel's source from a file, and is not there on every machine that collects these tests."""
    triton = pytest.importorskip("triton")
    file = folder / "add_one.py"
    file.write_text(
        "import triton\n"
        "import triton.language as tl\n\n\n"
        "@triton.jit\n"
        "def add_one_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr):\n"
        "    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)\n"
        "    mask = offsets < size\n"
        "    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=mask) + 1, mask=mask)\n"
    )
    spec = importlib.util.spec_from_file_location("add_one", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def launch(x: torch.Tensor) -> torch.Tensor:
        y = torch.empty_like(x)
        module.add_one_kernel[(triton.cdiv(x.numel(), 1024),)](x, y, x.numel(), BLOCK=1024)
        return y

    return launch


def test_kernels_of_a_graph_are_where_it_is_replayed(
    kernels_of_products: tuple[int, int, int], cells: Callable[..., Cells]
) -> None:
    x, weight = wide(requires_grad=False), wide(requires_grad=False)
    work = lambda: torch.sin(torch.sin(x @ weight))  # noqa: E731
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        graph.replay()
        return self.part(x)

    model = Apply(lambda self, x: self.layer(x), layer=Apply(forward, part=products(1)))
    recorded = on_gpu(model, trains(model))
    work_there = recorded.work[(recorded.work["module"] == "layer") & (recorded.work["phase"] == FORWARD)]
    assert (work_there["kind"] == files.KERNEL).sum() == kernels_of_products[0] + 2
    assert set(work_there["op"]) == {NO_OPERATOR}
    events = recorded.recording.events
    launches = events[events["name"] == "cudaGraphLaunch"]
    assert len(launches) == 1
    replayed = events["kind"].isin(files.GPU_KINDS) & (events["correlation"] == launches["correlation"].iloc[0])
    assert replayed.sum() == len(work_there)
    assert gemms(recorded) == cells(**{"layer.part": (1, True, 0)})


def test_copies_and_memsets() -> None:
    cudart = runtime_library()
    memory = torch.empty(MIB, dtype=torch.uint8, device=DEVICE)
    host = torch.empty(MIB, dtype=torch.uint8)

    def moves(self: Any, x: torch.Tensor) -> torch.Tensor:
        host.to(DEVICE)
        memory.cpu()
        memory.clone()
        return x

    def clears(self: Any, x: torch.Tensor) -> torch.Tensor:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        for _ in range(2):
            cudart.cudaMemsetAsync(ctypes.c_void_p(memory.data_ptr()), 0, ctypes.c_size_t(MIB), stream)
        return x

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.part(self.clears(self.moves(x)))

    model = Apply(forward, moves=Apply(moves), clears=Apply(clears), part=products(1))
    work = on_gpu(model, trains(model)).work
    there = work[work["module"].isin(["moves", "clears"])]
    assert Counter(zip(there["phase"], there["module"], there["kind"], strict=True)) == {
        (FORWARD, "moves", files.MEMCPY): 3,
        (FORWARD, "clears", files.MEMSET): 2,
    }


def runtime_library() -> Any:
    """The CUDA runtime that torch has loaded; another copy of it would be another runtime."""
    with open("/proc/self/maps") as maps:
        paths = {line.split()[-1] for line in maps if "libcudart" in line}
    if not paths:
        pytest.skip("torch is linked to the CUDA runtime statically")
    return ctypes.CDLL(min(paths))


# --- the Trainer's order ---

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "AdamW foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, foreach=True),
    "SGD one by one": lambda parameters: torch.optim.SGD(parameters, lr=0.1, foreach=False),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("micro_steps", [1, 2])
def test_work_outside_the_model_has_named_cells(name: str, micro_steps: int) -> None:
    model = torch.nn.Sequential(Matmuls(1), Matmuls(1, trained=False), Matmuls(2)).to(DEVICE)
    optimizer = OPTIMIZERS[name]([model[0].weight, model[2].weight])
    recorded = on_gpu(model, lambda: [trainer_step(model, optimizer, micro_steps, DEVICE) for _ in range(2)])
    for operator, place in SIGNS.items():
        found = recorded.cells(operator, "outer_op")
        assert found.keys() == {place}, operator
        assert found[place] >= (2 if operator in ONCE_A_STEP else 2 * micro_steps), operator
    work = recorded.work
    assert set(work.loc[work["outer_op"] == "aten::_foreach_norm", "module"]) == {CLIPPING}
    assert set(work.loc[work["module"] == CLIPPING, "phase"]) == {CLIP}
    assert set(work.loc[work["module"] == ZEROING, "phase"]) == {REST}
    stepping = work[work["module"] == STEPPING]
    assert set(stepping["phase"]) == {OPTIMIZER}
    if name.startswith("AdamW"):
        expected = "aten::_fused_adamw_" if "fused" in name else "aten::_foreach_addcdiv_"
        assert set(work.loc[work["outer_op"] == expected, "module"]) == {STEPPING}
    else:  # gradients are added by the same operator
        assert "aten::add_" in set(stepping["outer_op"])
    assert Counter(work["step"]).keys() == {0, 1}
    assert recorded.attribution.num_steps == 2
    busy_ns = int(work["duration_ns"].sum())
    assert 0 < busy_ns <= recorded.attribution.window_ns


# --- bitsandbytes ---


@CHECKPOINTING
def test_weights_in_four_bits(kind: bool | None, cells: Callable[..., Cells]) -> None:
    """Decoded in forward, in recompute, and in backward once more for the gradient of the input."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    linear = bitsandbytes.nn.Linear4bit(
        WIDTH, WIDTH, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True
    ).to(DEVICE)
    model = Apply(lambda self, x: through(kind, self.layer, x), layer=torch.nn.Sequential(linear, products(1)))
    recorded = on_gpu(model, trains(model))
    decoding = recorded.work[recorded.work["name"].str.contains("kDequantizeBlockwise")]
    counts = Counter(zip(decoding["phase"], decoding["module"], strict=True))
    once = counts[FORWARD, "layer.0"]
    assert once >= 1  # of the weight, and of its scales
    phases = (FORWARD, BACKWARD) if kind is None else (FORWARD, RECOMPUTE, BACKWARD)
    assert counts == {(phase, "layer.0"): once for phase in phases}
    assert set(decoding.loc[decoding["phase"] == BACKWARD, "node"]) == {"MatMul4BitBackward"}
    of_products = {cell: count for cell, count in gemms(recorded).items() if cell[1] == "layer.1"}
    assert of_products == cells(**{"layer.1": (1, True, 1 if kind else 0)})
    frozen = recorded.recording.modules.set_index("path").loc["layer.0", "frozen_bytes"]
    assert WIDTH * WIDTH / 2 < frozen < WIDTH * WIDTH / 2 * 1.05


# --- the engine's assumptions about the profiler ---


@CHECKPOINTING
def test_a_launch_lies_in_the_operator_that_the_profiler_links_it_to(
    kind: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nesting is read off the clock; CUPTI also says which range was open, and the two agree."""
    launched: list[tuple[int, str, int]] = []  # start, name and link of GPU activities
    operators: dict[int, str] = {}
    plain = trace_module.event_table

    def keep(events: Any, parameters: Any) -> Any:
        for event in events:
            if event.device_type() != torch.autograd.DeviceType.CPU:
                if not event.is_user_annotation():
                    launched.append((event.start_ns(), event.name(), event.linked_correlation_id()))
            elif event.name().startswith("aten::"):
                operators[event.correlation_id()] = event.name()
        return plain(events, parameters)

    monkeypatch.setattr(trace_module, "event_table", keep)
    block = torch.nn.Sequential(*(torch.nn.Sequential(Matmuls(3), torch.nn.LayerNorm(4)) for _ in range(20)))
    model = Apply(lambda self, x: through(kind, self.layer, x), layer=block).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    recorded = on_gpu(model, lambda: trainer_step(model, optimizer, 2, DEVICE))
    work = recorded.work
    found = Counter(zip(work["start_ns"], work["name"].astype(str), work["op"], strict=True))
    # Where the profiler links a launch to no operator, it says nothing: within the optimizer's range it does so.
    linked = Counter((start, name, operators[link]) for start, name, link in launched if link in operators)
    assert linked.total() > 500
    assert linked.total() > 0.9 * len(work)
    assert linked <= found


def test_a_thread_that_python_starts_is_not_followed() -> None:
    """A documented limit: its kernels are there, but neither its operators nor its modules."""
    model = torch.nn.ModuleDict({"main": products(1), "thread": products(3)})

    def run() -> None:
        thread = threading.Thread(target=lambda: model["thread"](wide(requires_grad=False)))
        thread.start()
        thread.join()
        model["main"](wide()).sum().backward()

    run()
    torch.cuda.synchronize()
    recorded = record(model, run, on_gpu=True)
    lost = recorded.work[recorded.work["op"] == NO_OPERATOR]
    assert (lost["kind"] == files.KERNEL).sum() >= 3
    assert set(zip(lost["phase"], lost["module"], strict=True)) == {(REST, OTHER_THREAD)}
    assert gemms(recorded).keys() == {(FORWARD, "main"), (BACKWARD, "main")}


@CHECKPOINTING
def test_memory_is_placed_like_work(kind: bool | None) -> None:
    model = Apply(lambda self, x: through(kind, self.layer, x), layer=torch.nn.Sequential(products(2), products(1)))
    recorded = on_gpu(model, trains(model), with_memory=True)
    timeline = memory_timeline(recorded.recording)
    size = WIDTH * WIDTH * 2
    allocated = timeline[(timeline["allocated_bytes"] == size) & (timeline["device"] == 0)]
    counts = Counter(zip(allocated["phase"], allocated["module"], strict=True))
    assert (counts[FORWARD, "layer.0"], counts[FORWARD, "layer.1"]) == (2, 1)
    again = {None: (0, 0), True: (2, 1), False: (2, 0)}[kind]
    assert (counts[RECOMPUTE, "layer.0"], counts[RECOMPUTE, "layer.1"]) == again
    # Of each product the gradients of its input and of its weight.
    assert counts[BACKWARD, "layer.0"] >= 4
    assert counts[BACKWARD, "layer.1"] >= 2


# --- the clock of phases ---


class Sleeps(torch.nn.Module):
    """Keeps the GPU, not the host, busy for a known number of its cycles; once more in backward."""

    def __init__(self, cycles: int) -> None:
        super().__init__()
        self.cycles = cycles

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.cuda._sleep(self.cycles)
        x = x * torch.ones_like(x).requires_grad_()  # keeps its input for backward
        if x.requires_grad:
            x.register_hook(self._in_backward)
        return x

    def _in_backward(self, gradient: torch.Tensor) -> None:
        torch.cuda._sleep(self.cycles)


@CHECKPOINTING
def test_phases_are_timed_on_the_gpu(kind: bool | None) -> None:
    """Cycles are proportional to time as long as the clock is steady; the host is long through when the GPU is not."""
    cycles = 4_000_000  # 2 ms or so

    def layers(self: Any, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = through(kind, layer, x)
        return x.sum()

    model = Apply(layers, layers=torch.nn.ModuleList(Sleeps(cycles) for _ in range(4)))
    numbers = {module: number for number, (_, module) in enumerate(model.named_modules())}

    def step() -> None:
        model(torch.ones(4, device=DEVICE, requires_grad=True)).backward()
        clock.before_optimizer()
        torch.cuda._sleep(cycles)
        clock.after_optimizer()

    clock = PhaseClock(model, numbers, on_gpu=True)
    clock.install()
    for _ in range(10):  # until the GPU's clock is up
        step()
    durations = {}
    for number in range(3):
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        clock.begin_step(number)
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        durations[number] = (round(begin.elapsed_time(end) * 1e6), 0)
    clock.remove()
    rows = clock.phase_rows(durations)
    one_ns = min(row["duration_ns"] for row in rows if row["phase"] == OPTIMIZER)
    for number, (duration_ns, _) in durations.items():
        table = {row["phase"]: row["duration_ns"] for row in rows if row["step"] == number}
        assert sum(table.values()) - table[RECOMPUTE] == duration_ns
        again = 0 if kind is None else 4
        assert table[FORWARD] == pytest.approx(4 * one_ns, rel=0.3)
        assert table[RECOMPUTE] == pytest.approx(again * one_ns, rel=0.3)
        assert table[BACKWARD] == pytest.approx((4 + again) * one_ns, rel=0.3)
        assert table[CLIP] < one_ns
    spans = [row for row in clock.span_rows(durations) if row["phase"] == FORWARD]
    assert len(spans) == 3 * 4
    assert all(row["duration_ns"] == pytest.approx(one_ns, rel=0.3) for row in spans)
