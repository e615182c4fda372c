"""Attribution of events recorded on an H200, and of a tiny Mixtral through LLaMA-Factory."""

import csv
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
import torch
from recording import (
    BACKWARD,
    CLIP,
    FORWARD,
    MM,
    OPTIMIZER,
    RECOMPUTE,
    REST,
    Cells,
    cells,
    hooks_of,
    modules_table,
    operator_ns,
)
from test_training import Watcher, workload
from transformers import TrainerCallback

from tunescope import latency_files as files
from tunescope import results
from tunescope.analyze.attribution import Recording, attribute, memory_timeline
from tunescope.analyze.places import (
    AFTER,
    BETWEEN_STEPS,
    CHECK,
    CLIPPING,
    DATA,
    LOSS,
    NO_OPERATOR,
    OTHER_THREAD,
    OUTSIDE,
    STEPPING,
    UNATTRIBUTED,
)
from tunescope.config import Protocol
from tunescope.measure.breakdown import Breakdown
from tunescope.measure.energy import EnergyMeter
from tunescope.measure.steps import StepRecorder
from tunescope.measure.trace import event_table
from tunescope.train.engine import run_workload

FIXTURES = Path(__file__).parent / "fixtures"


pytestmark = pytest.mark.usefixtures("one_thread")


# --- events recorded on an H200 ---


class KinetoEvent:
    """An event as torch's profiler gives it, read from a row of tests/fixtures."""

    def __init__(self, row: dict[str, str], name: str) -> None:
        self.row = row
        self._name = name

    def __getattr__(self, method: str) -> Callable[[], int]:
        columns = {
            "start_thread_id": "thread", "fwd_thread_id": "forward_thread", "device_index": "device",
            "device_resource_id": "resource", "correlation_id": "correlation", "sequence_nr": "sequence",
        }  # fmt: skip
        return lambda: int(self.row[columns.get(method, method)])

    def name(self) -> str:
        return self._name

    def device_type(self) -> Any:
        return getattr(torch.autograd.DeviceType, self.row["device_type"])

    def is_user_annotation(self) -> bool:
        return self.row["annotation"] == "1"


def rows_of_h200(kind: str) -> list[dict[str, str]]:
    with (FIXTURES / f"h200_{kind}.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def recorded_on_h200(kind: str, rows: list[dict[str, str]] | None = None) -> Recording:
    """A checkpointed Sequential(Linear, ReLU, Linear) in the middle of other work; see the comment of each test."""
    rows = rows or rows_of_h200(kind)
    # The recording had plain ranges where tunescope has a number at the end; forwards come before their recompute.
    numbers = itertools.count()
    events = []
    for row in sorted(rows, key=lambda row: int(row["start_ns"])):
        name = row["name"]
        if name.startswith("nn "):
            name = f"{files.CALL_PREFIX}{name} #{next(numbers)}"
        events.append(KinetoEvent(row, name))
    # What the forwards' operators say of the sequence numbers that they used up.
    first = {"reentrant": (12, 10), "non_reentrant": (15, 15)}[kind]
    ranges = [[(0, 5), (0, 2), (2, 3), (3, 5)], [(0, 5), (0, 2), (2, 3), (3, 5)]]
    if kind == "reentrant":
        ranges[0] = [(0, 0)] * 4
    calls = [
        {"call": 4 * again + module, "module": module, "is_recompute": bool(again),
         "sequence_begin": first[again] + begin, "sequence_end": first[again] + end}
        for again in (0, 1) for module, (begin, end) in enumerate(ranges[again])
    ]  # fmt: skip
    return Recording.from_tables(
        event_table(events, {}),
        pa.Table.from_pylist(calls, schema=files.CALLS_SCHEMA),
        modules_table("Sequential", ["", "0", "1", "2"]),
    )


@pytest.mark.parametrize("kind", ["reentrant", "non_reentrant"])
def test_kernels_recorded_on_a_gpu(kind: str) -> None:
    recording = recorded_on_h200(kind)
    found = attribute(recording)
    work = found.work
    assert found.on_gpu
    assert (work["phase"] != UNATTRIBUTED).all()
    counts = Counter(zip(work["phase"], work["module"], work["kind"], strict=True))
    # A product with its bias is two kernels on that card, split and reduced. In backward: input (two), weight, bias.
    # Non-reentrant recompute stops where the last product asks for its inputs: that product is not run again.
    assert counts == {
        (FORWARD, "0", files.KERNEL): 2,
        (FORWARD, "1", files.KERNEL): 1,
        (FORWARD, "2", files.KERNEL): 2,
        # square, mean, a Triton kernel, a graph of four, zeros, zero_, and the first gradient; to the host and back
        (FORWARD, LOSS, files.KERNEL): 10,
        (FORWARD, LOSS, files.MEMCPY): 2,
        (BACKWARD, OUTSIDE, files.KERNEL): 4,  # of mean and square; adding to the input's gradient
        (BACKWARD, OUTSIDE, files.MEMCPY): 1,
        (RECOMPUTE, "0", files.KERNEL): 2,
        (RECOMPUTE, "1", files.KERNEL): 1,
        **({(RECOMPUTE, "2", files.KERNEL): 2} if kind == "reentrant" else {}),
        (BACKWARD, "2", files.KERNEL): 4,
        (BACKWARD, "1", files.KERNEL): 1,
        (BACKWARD, "0", files.KERNEL): 4,
        (CLIP, CLIPPING, files.KERNEL): 10,
        (OPTIMIZER, STEPPING, files.KERNEL): 2,
    }
    events = recording.events
    gpu = events[events["kind"].isin(files.GPU_KINDS)]
    assert work["duration_ns"].sum() == gpu["duration_ns"].sum()
    assert not work["name"].astype(str).str.startswith("Optimizer").any()  # a range of the host, drawn on the GPU again
    graph = work[work["outer_op"] == NO_OPERATOR]
    assert len(graph) == 5  # the graph's and Triton's kernels: no operator launched them


@pytest.mark.parametrize("kind", ["reentrant", "non_reentrant"])
def test_a_launch_lies_in_the_operator_that_the_profiler_links_it_to(kind: str) -> None:
    """Nesting is read off the clock; CUPTI also says which operator was open, and the two agree."""
    rows = rows_of_h200(kind)
    operators = {row["correlation"]: row["name"] for row in rows if "::" in row["name"] and row["device"] == "-1"}
    linked = {
        row["correlation"]: operators.get(row["linked_correlation"], NO_OPERATOR)
        for row in rows
        if row["device"] != "-1"
    }
    recording = recorded_on_h200(kind)
    work = attribute(recording).work
    gpu = recording.events[recording.events["kind"].isin(files.GPU_KINDS)]
    assert [linked[str(number)] for number in gpu["correlation"]] == list(work["op"])


@pytest.mark.parametrize("kind", ["reentrant", "non_reentrant"])
def test_launches_whose_thread_the_profiler_has_lost(kind: str) -> None:
    """It says thread 1 where it lost the operator; the system's number of the thread is right even then."""
    rows = rows_of_h200(kind)
    for row in rows:
        if row["name"].startswith("cu") and row["device"] == "-1":
            row["thread"] = "1"
    found, expected = attribute(recorded_on_h200(kind, rows)).work, attribute(recorded_on_h200(kind)).work
    pd.testing.assert_frame_equal(found, expected)


def test_launches_of_a_thread_that_the_profiler_does_not_follow() -> None:
    """No other event is on it, and it says thread 1, which is another."""
    rows = rows_of_h200("reentrant")
    launches = [row for row in rows if row["name"] == "cuLaunchKernel" and row["thread"] == "1"]
    assert len(launches) == 2  # the products of forward
    for row in launches:
        row["resource"] = "471"
    work = attribute(recorded_on_h200("reentrant", rows)).work
    there = work[work["module"] == OTHER_THREAD]
    assert list(zip(there["phase"], there["kind"], there["op"], strict=True)) == [(REST, files.KERNEL, NO_OPERATOR)] * 2
    assert len(work[(work["phase"] == FORWARD) & work["module"].isin(["0", "2"])]) == 2


# --- a tiny Mixtral through LLaMA-Factory ---

TIMED, PROFILER_STARTS = 2, 1  # steps before the recorded one, one of the timed for warm-up
LAYERS = [f"base_model.model.model.layers.{i}" for i in (0, 1)]


class ExpertsHit(TrainerCallback):
    """How often each expert ran forward in each step, which is as often as it got tokens."""

    def __init__(self) -> None:
        self.counts: dict[int, Counter[str]] = {}
        self._handles: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        for name, module in model.named_modules():
            if name.rpartition(".")[0].endswith("experts"):
                self._handles.append(module.register_forward_pre_hook(partial(self._count, name)))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.counts[state.global_step] = Counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _count(self, name: str, *_: Any) -> None:
        if torch._C._current_graph_task_id() == -1:
            self.counts[max(self.counts)][name] += 1


@dataclass(frozen=True)
class Trained:
    watcher: Watcher
    hits: ExpertsHit
    steps: StepRecorder
    folder: Path

    def read(self, name: str, schema: pa.Schema) -> pa.Table:
        return results.read_arrow(self.folder / name, schema)


def train_mixtral(folder: Path, *, reentrant: bool, watched: bool) -> Trained:
    protocol = Protocol(num_queries=1, num_warmup_steps=1, num_profiled_steps=1)
    planned = workload(top_k=1, batch=1, max_steps=TIMED + protocol.num_steps_after, use_reentrant_gc=reentrant)
    planned = replace(planned, point=replace(planned.point, seq_len_tokens=16))  # some experts get no token
    steps = StepRecorder(protocol, lambda done, expected: None, EnergyMeter(use_gpu=False))
    trained = Trained(Watcher(), ExpertsHit(), steps, folder / "point")
    trained.folder.mkdir()
    breakdown = Breakdown(steps, trained.folder / files.TRACE_FILE)
    run_workload(planned, folder / "scratch", [trained.watcher, trained.hits, *((steps, breakdown) if watched else ())])
    if watched:
        breakdown.write(trained.folder)
    return trained


@pytest.fixture(scope="module", params=[True, False], ids=["reentrant", "non-reentrant"])
def mixtral(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_mixtral(tmp_path_factory.mktemp("mixtral"), reentrant=request.param, watched=True)


@pytest.fixture(scope="module")
def unwatched(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_mixtral(tmp_path_factory.mktemp("unwatched"), reentrant=True, watched=False)


@pytest.fixture(scope="module")
def found(mixtral: Trained) -> pd.DataFrame:
    tables = [
        mixtral.read(name, schema)
        for name, schema in (
            (files.EVENTS_FILE, files.EVENTS_SCHEMA),
            (files.CALLS_FILE, files.CALLS_SCHEMA),
            (files.MODULES_FILE, files.MODULES_SCHEMA),
        )
    ]
    recording = Recording.from_tables(*tables)
    found = attribute(recording)
    assert len(found.work) == (recording.events["kind"] == files.OP).sum()
    assert found.work["duration_ns"].sum() == operator_ns(recording.events)
    assert (found.num_steps, found.on_gpu) == (1, False)
    assert found.work["duration_ns"].sum() < found.window_ns
    return found.work


def count(work: pd.DataFrame, name: str) -> Cells:
    there = work[(work["name"] == name) & (work["step"] == 0)]
    return dict(Counter(zip(there["phase"], there["module"], strict=True)))


def test_mixtrals_matrix_products_are_those_of_its_architecture(mixtral: Trained, found: pd.DataFrame) -> None:
    hits = mixtral.hits.counts[TIMED + PROFILER_STARTS]
    assert 2 <= len(hits) < 16
    assert set(hits.values()) == {1}
    frozen, adapted = [], []
    for layer in LAYERS:
        frozen += [f"{layer}.self_attn.{name}_proj" for name in "qkvo"]
        adapted.append(f"{layer}.block_sparse_moe.gate")
    adapted += [f"{expert}.{name}" for expert in hits for name in ("w1", "w2", "w3")]
    expected = cells(times_recomputed=1, **dict.fromkeys(frozen, (1, 1)))  # of the input: weights are frozen
    for name in adapted:
        expected |= cells(
            times_recomputed=1,
            **{f"{name}.base_layer": (1, 1), f"{name}.lora_A.default": (1, 2), f"{name}.lora_B.default": (1, 2)},
        )
    expected |= cells(**{"base_model.model.lm_head": (1, 1)})
    assert count(found, MM) == expected
    assert count(found, "aten::addmm") == {}
    assert count(found, "aten::bmm") == {(FORWARD, "base_model.model.model.rotary_emb"): 1}
    dequantised = [*frozen, *(f"{name}.base_layer" for name in adapted)]
    assert count(found, "bitsandbytes::dequantize_4bit") == cells(
        times_recomputed=1, **dict.fromkeys(dequantised, (1, 1))
    )


def test_mixtrals_functions_are_in_the_modules_that_call_them(mixtral: Trained, found: pd.DataFrame) -> None:
    hits = mixtral.hits.counts[TIMED + PROFILER_STARTS]
    blocks = [f"{layer}.block_sparse_moe" for layer in LAYERS]
    assert count(found, "aten::topk") == cells(times_recomputed=1, **dict.fromkeys(blocks, (1, 0)))
    assert count(found, "aten::softmax") == cells(times_recomputed=1, **dict.fromkeys(blocks, (1, 0)))
    assert count(found, "aten::_softmax_backward_data") == cells(**dict.fromkeys(blocks, (0, 1)))
    activations = [f"{expert}.act_fn" for expert in hits]
    assert count(found, "aten::silu") == cells(times_recomputed=1, **dict.fromkeys(activations, (1, 0)))
    assert count(found, "aten::silu_backward") == cells(**dict.fromkeys(activations, (0, 1)))
    attention = [f"{layer}.self_attn" for layer in LAYERS]
    assert count(found, "aten::scaled_dot_product_attention") == cells(
        times_recomputed=1, **dict.fromkeys(attention, (1, 0))
    )
    norms = [f"{layer}.{name}_layernorm" for layer in LAYERS for name in ("input", "post_attention")]
    assert count(found, "aten::rsqrt") == cells(times_recomputed=1, **dict.fromkeys(norms, (1, 0))) | cells(
        **{"base_model.model.model.norm": (1, 0)}
    )
    assert count(found, "aten::embedding") == cells(**{"base_model.model.model.embed_tokens": (1, 0)})
    # PEFT calls the forward of what it wraps past its hooks, so the loss is counted one module further out.
    assert count(found, "aten::nll_loss_backward") == cells(base_model=(0, 1))
    # One gradient of each adapter that was used, and that of the embedded tokens, which the adapters need.
    accumulated = count(found, "torch::autograd::AccumulateGrad")
    adapters = {cell: 1 for cell in count(found, MM) if cell[0] == BACKWARD and "lora" in cell[1]}
    of_checkpoints = accumulated.pop((BACKWARD, "base_model.model.model"), 0)
    assert accumulated == adapters | {(BACKWARD, OUTSIDE): 1}
    is_reentrant = "CheckpointFunctionBackward" in set(found["node"])
    assert of_checkpoints == (len(LAYERS) if is_reentrant else 0)


def test_what_of_mixtral_lies_outside_its_modules(found: pd.DataFrame) -> None:
    outside = found[found["module"].str.startswith("(")]
    assert set(zip(outside["phase"], outside["module"], strict=True)) <= {
        (FORWARD, LOSS), (BACKWARD, OUTSIDE), (REST, CHECK), (CLIP, CLIPPING), (OPTIMIZER, STEPPING), (REST, AFTER),
        (REST, BETWEEN_STEPS), (REST, DATA),
    }  # fmt: skip
    assert (found["phase"] != UNATTRIBUTED).all()
    # The Trainer scales the loss, and embedded tokens are made to want a gradient.
    assert set(outside.loc[outside["phase"] == BACKWARD, "node"]) == {
        "DivBackward0", "MulBackward0", "torch::autograd::AccumulateGrad"
    }  # fmt: skip
    assert set(outside.loc[outside["phase"] == OPTIMIZER, "outer_op"]) >= {"aten::addcdiv_", "aten::sqrt"}
    assert set(found.loc[found["name"] == "aten::_foreach_norm", "module"]) == {CLIPPING}


def test_watching_mixtral_changes_nothing_and_leaves_nothing_behind(mixtral: Trained, unwatched: Trained) -> None:
    assert mixtral.watcher.log_history[0].keys() == unwatched.watcher.log_history[0].keys()
    for name in ("loss", "grad_norm"):
        assert [entry.get(name) for entry in mixtral.watcher.log_history] == [
            entry.get(name) for entry in unwatched.watcher.log_history
        ]
    plain = dict(unwatched.watcher.model.named_parameters())
    for name, parameter in mixtral.watcher.model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, plain[name]), name
    assert hooks_of(mixtral.watcher.model) == hooks_of(unwatched.watcher.model)
    assert {path.name for path in mixtral.folder.iterdir()} == {
        files.PHASES_FILE, files.SPANS_FILE, files.MODULES_FILE, files.CALLS_FILE, files.EVENTS_FILE,
        files.MEMORY_EVENTS_FILE, files.MEMORY_PARTS_FILE, files.TRACE_FILE,
    }  # fmt: skip
    scratch = mixtral.folder.parent / "scratch"
    assert {path.name for path in scratch.iterdir()} == {
        path.name for path in (unwatched.folder.parent / "scratch").iterdir()
    }


def test_mixtrals_phases_tile_its_steps(mixtral: Trained) -> None:
    phases = mixtral.read(files.PHASES_FILE, files.PHASES_SCHEMA).to_pandas()
    steps = [row for row in mixtral.steps.rows() if not row["is_warmup"]]
    assert set(phases["step"]) == {row["step"] for row in steps}
    for row in steps:
        durations = phases[phases["step"] == row["step"]].set_index("phase")["duration_ns"]
        assert durations.sum() - durations[RECOMPUTE] == row["duration_ns"]
        assert 0 < durations[RECOMPUTE] < durations[BACKWARD]
        assert (durations > 0).all()
    spans = mixtral.read(files.SPANS_FILE, files.SPANS_SCHEMA).to_pandas()
    modules = mixtral.read(files.MODULES_FILE, files.MODULES_SCHEMA).to_pandas().set_index("module")["path"]
    of_layers = spans[modules[spans["module"]].isin(LAYERS).to_numpy()]
    durations = of_layers.groupby("phase", observed=True)["duration_ns"].sum()
    whole = phases.groupby("phase", observed=True)["duration_ns"].sum()
    assert durations[RECOMPUTE] == whole[RECOMPUTE]
    assert durations[FORWARD] < whole[FORWARD]
    assert durations[RECOMPUTE] + durations[BACKWARD] < whole[BACKWARD]


def test_mixtrals_memory_is_placed(mixtral: Trained) -> None:
    """Each change once, and forward's activations of a layer are those that its operators allocate."""
    events = mixtral.read(files.MEMORY_EVENTS_FILE, files.EVENTS_SCHEMA)
    recording = Recording.from_tables(
        events,
        mixtral.read(files.CALLS_FILE, files.CALLS_SCHEMA),
        mixtral.read(files.MODULES_FILE, files.MODULES_SCHEMA),
    )
    timeline = memory_timeline(recording)
    changes = recording.events[recording.events["kind"] == files.MEMORY]
    assert len(timeline) == len(changes)
    assert timeline["allocated_bytes"].sum() == changes["allocated_bytes"].sum()
    assert timeline["time_ns"].is_monotonic_increasing
    assert set(timeline["phase"]) == set(files.PHASES)
    logits = timeline[(timeline["module"] == "base_model.model.lm_head") & (timeline["phase"] == FORWARD)]
    assert 16 * 1024 * 2 in set(logits["allocated_bytes"])  # 16 tokens, 1,024 words, bf16
