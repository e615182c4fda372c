"""Puts every piece of recorded work in one cell: phase, module, autograd node, operator.

Work is what ran on the GPU (kernels, copies, memsets) or, in a recording without a GPU, operators' self time.

Where work belongs is read off the stack of ranges open on its launching thread at the moment of launch. The innermost
of these decides:

- a module's forward: that module; phase forward, or recompute where it ran inside backward;
- an autograd node: the module whose forward made the node, found by the thread and sequence number that both carry;
  phase backward. A CheckpointFunctionBackward's own work is recompute. An AccumulateGrad node has no number; a mark in
  it names the parameter;
- the optimizer's step.

Operators inside a node that could be differentiated themselves are a recompute whose checkpointed function is no
module: backward's own operators run with gradients off. (So a double backward, create_graph=True, reads as recompute.)
Outside all of these, the Trainer's order tells: see _BETWEEN.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa

from tunescope import latency_files as files

# Names of what belongs to no module.
UNATTRIBUTED = "unattributed"
ENGINE = "(autograd engine)"
OUTSIDE = "(outside modules)"
DATA, LOSS, CHECK, CLIPPING, STEPPING, AFTER, ZEROING = (
    "(data)", "(after forward)", "(loss check)", "(gradient clipping)", "(optimizer)", "(after the optimizer)",
    "(zero_grad)",
)  # fmt: skip
BETWEEN_STEPS, OTHER_THREAD = "(between steps)", "(another thread)"
NO_OPERATOR = "(no operator)"

# After which moment the main thread is where, while no module, node or optimizer runs.
_BETWEEN = {
    files.STEP_END: (files.REST, BETWEEN_STEPS),
    files.RESUME: (files.REST, BETWEEN_STEPS),
    files.STEP_BEGIN: (files.REST, DATA),
    "forward_end": (files.FORWARD, LOSS),
    "backward_begin": (files.BACKWARD, ENGINE),
    "backward_end": (files.REST, CHECK),
    "first_norm": (files.CLIP, CLIPPING),
    files.PRE_OPTIMIZER: (files.OPTIMIZER_STEP, STEPPING),
    files.OPTIMIZER: (files.REST, AFTER),
}
# Clipping begins with the norms of gradients; the Trainer looks for NaN before.
_NORMS = {"aten::_foreach_norm", "aten::linalg_vector_norm", "aten::norm", "aten::frobenius_norm"}
_CHECKPOINT = "CheckpointFunctionBackward"
_ACCUMULATE = "AccumulateGrad"


@dataclass(frozen=True)
class Recording:
    """What a recorder left: latency_files.EVENTS_SCHEMA, CALLS_SCHEMA and MODULES_SCHEMA as DataFrames."""

    events: pd.DataFrame
    calls: pd.DataFrame
    modules: pd.DataFrame

    @classmethod
    def from_tables(cls, events: pa.Table, calls: pa.Table, modules: pa.Table) -> "Recording":
        return cls(events.to_pandas(), calls.to_pandas(), modules.to_pandas())


@dataclass(frozen=True)
class Attribution:
    """work: one row a piece of work, see `attribute`.

    window_ns: length of all recorded steps together, each up to the end of its last work. num_steps: how many they are.
    on_gpu: work is GPU activities, else operators' self time.
    """

    work: pd.DataFrame
    window_ns: int
    num_steps: int
    on_gpu: bool


def attribute(recording: Recording) -> Attribution:
    """Every piece of work with its place.

    Columns of `work`: kind, name (kernel or operator), device, stream, start_ns, duration_ns, step (recorded step in
    which it was launched, from 0; -1 unknown), phase, module (path, or a name in parentheses), call (index into calls,
    -1), node (autograd node's name, or ""), op (innermost operator that launched it), outer_op (outermost operator
    within the module or node). Durations are those recorded: the cells' sum is the sum of the kernels' durations, to
    the nanosecond.
    """
    events = recording.events.sort_values(["start_ns", "duration_ns"], ascending=[True, False], ignore_index=True)
    is_gpu = events["kind"].isin(files.GPU_KINDS)
    cpu = events[~is_gpu & (events["kind"] != files.MEMORY)].reset_index(drop=True)
    gpu = events[is_gpu].reset_index(drop=True)
    placed = _Places(cpu, recording)
    begins = _mark_times(cpu, files.RESUME)
    if len(gpu):
        launching = _launching(gpu, cpu)
        work = gpu[["kind", "name", "device", "thread", "start_ns", "duration_ns"]]
    else:
        launching = np.flatnonzero((cpu["kind"] == files.OP).to_numpy())
        work = cpu.loc[launching, ["kind", "name", "device", "thread", "start_ns"]].reset_index(drop=True)
        work["duration_ns"] = placed.self_ns()[launching]
    launched_ns = np.append(cpu["start_ns"].to_numpy(), -1)[launching]
    work = work.rename(columns={"thread": "stream"}).assign(step=np.searchsorted(begins, launched_ns, side="right") - 1)
    work = pd.concat([work, placed.of(launching)], axis=1)
    window_ns, num_steps = _window(begins, _mark_times(cpu, files.STEP_END), work, events)
    return Attribution(work, window_ns, num_steps, bool(len(gpu)))


def _mark_times(cpu: pd.DataFrame, mark: str) -> np.ndarray:
    return cpu.loc[(cpu["kind"] == files.MARK) & (cpu["name"] == files.MARK_PREFIX + mark), "start_ns"].to_numpy()


def _window(begins: np.ndarray, ends: np.ndarray, work: pd.DataFrame, events: pd.DataFrame) -> tuple[int, int]:
    """Length of all recorded steps, and their number; without marks the whole recording, as one step."""
    steps = list(zip(begins.tolist(), ends[ends >= begins.min()].tolist(), strict=False)) if len(begins) else []
    if not steps:
        whole_ns = (events["start_ns"] + events["duration_ns"]).max() - events["start_ns"].min() if len(events) else 0
        return int(whole_ns), 1
    done_ns = (work["start_ns"] + work["duration_ns"]).groupby(work["step"]).max()
    return sum(int(max(end, done_ns.get(step, 0)) - begin) for step, (begin, end) in enumerate(steps)), len(steps)


def memory_timeline(recording: Recording) -> pd.DataFrame:
    """Each change of allocated memory with its place: columns of `attribute`'s work but start_ns as `time_ns`, with
    `device` and `allocated_bytes` (negative: freed), in order of time."""
    events = recording.events.sort_values(["start_ns", "duration_ns"], ascending=[True, False], ignore_index=True)
    cpu = events[~events["kind"].isin(files.GPU_KINDS)].reset_index(drop=True)
    placed = _Places(cpu, recording)
    changes = np.flatnonzero((cpu["kind"] == files.MEMORY).to_numpy())
    table = cpu.loc[changes, ["start_ns", "device", "allocated_bytes"]].reset_index(drop=True)
    return pd.concat([table.rename(columns={"start_ns": "time_ns"}), placed.of(changes)], axis=1)


def _launching(gpu: pd.DataFrame, cpu: pd.DataFrame) -> np.ndarray:
    """Row in `cpu` of the call that launched each GPU activity, -1 where the recording lacks it. A graph's kernels
    share the number of its launch."""
    launches = cpu[cpu["kind"] == files.LAUNCH]
    by_number = pd.Series(launches.index.to_numpy(), index=launches["correlation"].to_numpy())
    by_number = by_number[~by_number.index.duplicated()]
    return by_number.reindex(gpu["correlation"].to_numpy()).fillna(-1).to_numpy(dtype=np.int64)


def busy_ns(start_ns: np.ndarray, duration_ns: np.ndarray) -> int:
    """Length of the union of intervals: the time in which at least one of them was under way."""
    if not len(start_ns):
        return 0
    order = np.argsort(start_ns, kind="stable")
    start, end = start_ns[order], (start_ns + duration_ns)[order]
    reached = np.maximum.accumulate(end)
    gaps = np.maximum(start[1:] - reached[:-1], 0)
    return int(reached[-1] - start[0] - gaps.sum())


class _Places:
    """The place of every CPU event, by one sweep over each thread's stack of open ranges."""

    def __init__(self, cpu: pd.DataFrame, recording: Recording) -> None:
        self._size = len(cpu)
        self._kinds, self._names = cpu["kind"].tolist(), cpu["name"].tolist()
        self._starts, self._durations = cpu["start_ns"].to_numpy(), cpu["duration_ns"].to_numpy()
        self._threads, self._refs = cpu["thread"].tolist(), cpu["ref"].tolist()
        self._sequences, self._forward_threads = cpu["sequence"].tolist(), cpu["forward_thread"].tolist()
        modules = recording.modules
        self._paths = {
            number: path or class_name
            for number, path, class_name in zip(modules["module"], modules["path"], modules["class_name"], strict=True)
        }
        calls = recording.calls
        self._call_module = dict(zip(calls["call"], calls["module"], strict=True))
        self._is_recompute = dict(zip(calls["call"], calls["is_recompute"], strict=True))
        self._sweep()
        self._owners = self._owners_by_thread(calls)
        self._resolve()

    def of(self, rows: np.ndarray) -> pd.DataFrame:
        """Places of CPU events by their row; -1 is unattributed."""
        found = rows >= 0
        columns: dict[str, np.ndarray] = {}
        for name, values, nothing in (
            ("phase", self._phase, UNATTRIBUTED),
            ("module", self._module, UNATTRIBUTED),
            ("call", self._call, -1),
            ("node", self._node, ""),
            ("op", self._operator_names(self._leaf), NO_OPERATOR),
            ("outer_op", self._operator_names(self._outer), NO_OPERATOR),
        ):
            column = np.full(len(rows), nothing, dtype=values.dtype)
            column[found] = values[rows[found]]
            columns[name] = column
        return pd.DataFrame(columns)

    def self_ns(self) -> np.ndarray:
        """Duration of each event less that of the events within it."""
        nested = np.zeros(self._size, dtype=np.int64)
        inside = self._parent >= 0
        np.add.at(nested, self._parent[inside], self._durations[inside])
        return self._durations - nested

    def _operator_names(self, operators: np.ndarray) -> np.ndarray:
        names = np.array([*self._names, NO_OPERATOR], dtype=object)
        return names[np.where(operators >= 0, operators, self._size)]

    def _sweep(self) -> None:
        """For each event: its parent, the frame it lies in, the operators around it, and whether it is recompute.

        A frame is what decides phase and module: a module's forward, an autograd node, the optimizer.
        """
        kinds, names, threads = self._kinds, self._names, self._threads
        starts, ends = self._starts.tolist(), (self._starts + self._durations).tolist()
        parent, frame, outer, leaf = ([-1] * self._size for _ in range(4))
        again = [False] * self._size
        self._parameter_of_node: dict[int, int] = {}
        stacks: dict[int, list[int]] = {}
        for i in range(self._size):
            stack = stacks.setdefault(threads[i], [])
            while stack and ends[stack[-1]] <= starts[i]:
                stack.pop()
            kind = kinds[i]
            above = stack[-1] if stack else -1
            parent[i] = above
            if kind in (files.CALL, files.NODE) or (kind == files.ANNOTATION and names[i].startswith("Optimizer.")):
                frame[i] = i
            elif above >= 0:
                frame[i], outer[i], leaf[i], again[i] = frame[above], outer[above], leaf[above], again[above]
            # An operator that names the forward's thread is its node once more, under another name.
            if kind == files.OP and self._forward_threads[i] == 0:
                leaf[i] = i
                if outer[i] < 0:
                    outer[i] = i
                in_node = frame[i] >= 0 and kinds[frame[i]] == files.NODE
                again[i] = again[i] or (in_node and self._sequences[i] >= 0)
            elif kind == files.PARAMETER and frame[i] >= 0:
                self._parameter_of_node[frame[i]] = self._refs[i]
            if ends[i] > starts[i]:
                stack.append(i)
        self._parent, self._frame, self._outer, self._leaf = map(np.array, (parent, frame, outer, leaf))
        self._again = np.array(again, dtype=bool)

    def _owners_by_thread(self, calls: pd.DataFrame) -> dict[int, tuple[int, list[int]]]:
        """Thread -> (lowest sequence number, call that owns each number from there on; -1 none)."""
        ranges = {
            call: (begin, end)
            for call, begin, end in zip(calls["call"], calls["sequence_begin"], calls["sequence_end"], strict=True)
        }
        shown: dict[int, list[int]] = {}
        for i in np.flatnonzero(self._frame == np.arange(self._size)).tolist():
            if self._kinds[i] == files.CALL and self._refs[i] in ranges:
                shown.setdefault(self._threads[i], []).append(self._refs[i])
        owners = {}
        for thread, in_order in shown.items():
            lowest = min(ranges[call][0] for call in in_order)
            owner = [-1] * max(max(ranges[call][1] for call in in_order) - lowest, 0)
            # In order of their start: what an inner forward used up is written over the outer one's claim.
            for call in in_order:
                begin, end = ranges[call]
                owner[begin - lowest : end - lowest] = [call] * (end - begin)
            owners[thread] = (lowest, owner)
        return owners

    def _resolve(self) -> None:
        """Phase, module, call and node of every event: those of its frame, or of the moment where it has none."""
        self._phase = np.full(self._size, UNATTRIBUTED, dtype=object)
        self._module = np.full(self._size, UNATTRIBUTED, dtype=object)
        self._call = np.full(self._size, -1, dtype=np.int64)
        self._node = np.full(self._size, "", dtype=object)
        for i in np.flatnonzero(self._frame == np.arange(self._size)).tolist():
            self._place_frame(i)
        framed = self._frame >= 0
        frames = self._frame[framed]
        for column in (self._phase, self._module, self._call, self._node):
            column[framed] = column[frames]
        self._phase[self._again & framed] = files.RECOMPUTE
        self._place_unframed(np.flatnonzero(~framed))

    def _place_frame(self, i: int) -> None:
        kind, name = self._kinds[i], self._names[i]
        if kind == files.ANNOTATION:
            stepping = name.startswith("Optimizer.step")
            self._phase[i] = files.OPTIMIZER_STEP if stepping else files.REST
            self._module[i] = STEPPING if stepping else ZEROING
        elif kind == files.CALL:
            call = self._refs[i]
            self._phase[i] = files.RECOMPUTE if self._is_recompute.get(call) else files.FORWARD
            self._module[i], self._call[i] = self._module_of(call), call
        else:
            self._node[i] = node = name.removeprefix(files.NODE_PREFIX)
            self._phase[i] = files.RECOMPUTE if node == _CHECKPOINT else files.BACKWARD
            if node.endswith(_ACCUMULATE):
                self._module[i] = self._paths.get(self._parameter_of_node.get(i, -1), OUTSIDE)
            else:
                lowest, owner = self._owners.get(self._forward_threads[i], (0, []))
                number = self._sequences[i] - lowest
                self._call[i] = owner[number] if 0 <= number < len(owner) else -1
                self._module[i] = self._module_of(self._call[i])

    def _module_of(self, call: int) -> str:
        return self._paths.get(self._call_module.get(call, -1), OUTSIDE)

    def _place_unframed(self, rows: np.ndarray) -> None:
        """What lies in no module, node or optimizer: on the main thread by the Trainer's order, elsewhere by thread."""
        threads = np.array(self._threads)[rows]
        main = self._main_thread()
        with_nodes = {self._threads[i] for i, kind in enumerate(self._kinds) if kind == files.NODE}
        for thread in set(threads.tolist()) - {main}:
            there = rows[threads == thread]
            in_engine = thread in with_nodes
            self._phase[there] = files.BACKWARD if in_engine else files.REST
            self._module[there] = ENGINE if in_engine else OTHER_THREAD
        here = rows[threads == main]
        moments = self._moments(here)
        if not moments:
            self._phase[here], self._module[here] = files.REST, OUTSIDE
            return
        times, states = zip(*moments, strict=True)
        last = np.searchsorted(np.array(times), self._starts[here], side="right") - 1
        places = [_BETWEEN[states[number]] if number >= 0 else (files.REST, BETWEEN_STEPS) for number in last.tolist()]
        for i, (phase, module) in zip(here.tolist(), places, strict=True):
            self._phase[i], self._module[i] = phase, module

    def _main_thread(self) -> int:
        """The one that trains: where the recorder's marks are, or else the first forward."""
        for kind in (files.MARK, files.CALL):
            if kind in self._kinds:
                return self._threads[self._kinds.index(kind)]
        return self._threads[0] if self._threads else -1

    def _moments(self, unframed: np.ndarray) -> list[tuple[int, str]]:
        """(time, key of _BETWEEN) in order of time: from each on, the main thread is in that state."""
        ends = self._starts + self._durations
        main = self._main_thread()
        moments = []
        nodes = np.array([i for i, kind in enumerate(self._kinds) if kind == files.NODE], dtype=np.int64)
        for i, kind in enumerate(self._kinds):
            if self._threads[i] != main:
                continue
            if kind == files.MARK:
                moments.append((int(self._starts[i]), self._names[i].removeprefix(files.MARK_PREFIX)))
            elif kind == files.CALL and (self._parent[i] < 0 or self._frame[self._parent[i]] < 0):
                moments.append((int(ends[i]), "forward_end"))
        moments = sorted(moment for moment in moments if moment[1] in _BETWEEN)
        for number, (time_ns, state) in enumerate(list(moments)):
            following = moments[number + 1][0] if number + 1 < len(moments) else np.iinfo(np.int64).max
            if state == "forward_end":
                within = nodes[(self._starts[nodes] >= time_ns) & (self._starts[nodes] < following)]
                if len(within):
                    moments.append((int(self._starts[within].min()), "backward_begin"))
                    moments.append((int(ends[within].max()), "backward_end"))
        moments.sort()
        return sorted(moments + self._first_norms(moments, unframed))

    def _first_norms(self, moments: list[tuple[int, str]], unframed: np.ndarray) -> list[tuple[int, str]]:
        norms = [int(self._starts[i]) for i in unframed.tolist() if self._names[i] in _NORMS]
        found = []
        for (time_ns, state), (following, _) in zip(moments, [*moments[1:], (np.iinfo(np.int64).max, "")], strict=True):
            if state == "backward_end":
                found += [(norm, "first_norm") for norm in norms if time_ns <= norm < following][:1]
        return found
