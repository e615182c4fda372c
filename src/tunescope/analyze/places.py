"""The place of everything that happened on a CPU thread: phase, module, autograd node, operator.

A place is read off the stack of ranges open on the thread at that moment. The innermost
of these decides:

- a module's forward: that module; phase forward, or recompute where it ran inside backward;
- an autograd node: the module whose forward made the node, found by the thread and sequence number that both carry;
  phase backward. A CheckpointFunctionBackward's own work is recompute. An AccumulateGrad node has no number; a mark in
  it names the parameter;
- the optimizer's step.

An operator inside a node that could be differentiated itself is part of a recompute: backward's own operators run with
gradients off. (So a double backward, create_graph=True, reads as recompute.) A node recomputes before it does its own
work, so all of it up to the last such operator is recompute, of the module that called the checkpointed function.
Outside all of these, the Trainer's order tells: see _BETWEEN.
"""

from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd

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
_MOST_NUMBERS = 50_000_000  # of autograd, in a recording; a step of Mixtral-8x7B uses 0.05 million
_PHASES = [*files.PHASES, UNATTRIBUTED]
_NO_MODULE = [
    OUTSIDE, ENGINE, DATA, LOSS, CHECK, CLIPPING, STEPPING, AFTER, ZEROING, BETWEEN_STEPS, OTHER_THREAD, UNATTRIBUTED,
]  # fmt: skip


class Places:
    """The place of every CPU event, by one sweep over each thread's stack of open ranges.

    Arrays over all events, with one more at the end for "none", so that -1 finds it.
    """

    def __init__(self, cpu: pd.DataFrame, modules: pd.DataFrame, calls: pd.DataFrame) -> None:
        """cpu: events of the CPU in order of their start, longer ones first. modules, calls: of latency_files."""
        self._size = len(cpu)
        self._kind_codes, self._kinds = _codes(cpu["kind"])
        self._name_codes, self._names = _codes(cpu["name"])
        self._starts = cpu["start_ns"].to_numpy()
        self._ends = self._starts + cpu["duration_ns"].to_numpy()
        self._threads, self._refs = cpu["thread"].to_numpy(), cpu["ref"].to_numpy()
        self._sequences = cpu["sequence"].to_numpy(copy=True)
        self._forward_threads = cpu["forward_thread"].to_numpy(copy=True)
        self._phase = np.full(self._size + 1, _PHASES.index(UNATTRIBUTED), dtype=np.int8)
        self._call = np.full(self._size + 1, -1)
        self._node = np.full(self._size + 1, -1)  # as a code of its name
        self._read_modules(modules, calls)
        self._find_parents()
        self._find_frames()
        self._place_frames()
        framed = np.flatnonzero(self._frame[:-1] >= 0)
        for column in (self._phase, self._module, self._call, self._node):
            column[framed] = column[self._frame[framed]]
        self._place_recompute_in_nodes()
        self._place_unframed(np.flatnonzero(self._frame[:-1] < 0))

    def of(self, rows: np.ndarray) -> pd.DataFrame:
        """Places of CPU events by their row; -1 is unattributed."""
        names = np.array([*self._names, NO_OPERATOR], dtype=object)
        return pd.DataFrame(
            {
                "phase": np.array(_PHASES, dtype=object)[self._phase[rows]],
                "module": np.array(self._module_names, dtype=object)[self._module[rows]],
                "call": self._call[rows],
                "node": np.array([*self._names, ""], dtype=object)[self._node[rows]],
                "op": names[self._name_codes[self._leaf[rows]]],
                "outer_op": names[self._name_codes[self._outer[rows]]],
            }
        )

    def self_ns(self) -> np.ndarray:
        """Duration of each event less that of the ranges within it."""
        durations_ns = self._ends - self._starts
        nested_ns = np.zeros(self._size + 1, dtype=np.int64)
        ranges = np.flatnonzero(~self._is(files.LAUNCH))
        np.add.at(nested_ns, self._parent[ranges], durations_ns[ranges])
        return durations_ns - nested_ns[:-1]

    # --- what the events say ---

    def _is(self, kind: str) -> np.ndarray:
        return self._kind_codes[:-1] == (self._kinds.index(kind) if kind in self._kinds else -2)

    def _is_named(self, fits: Callable[[str], bool]) -> np.ndarray:
        return np.array([fits(name) for name in self._names], dtype=bool)[self._name_codes[:-1]]

    def _read_modules(self, modules: pd.DataFrame, calls: pd.DataFrame) -> None:
        """_module: codes in _module_names. _call_*: by a call's number, with one more at the end."""
        paths = [path or class_name for path, class_name in zip(modules["path"], modules["class_name"], strict=True)]
        self._module_names = [*paths, *_NO_MODULE]
        self._module = np.full(self._size + 1, self._code_of(UNATTRIBUTED))
        self._module_codes = {number: code for code, number in enumerate(modules["module"])}
        numbers = calls["call"].to_numpy()
        self._calls = np.flatnonzero(self._is(files.CALL))
        size = max(numbers.max(initial=-1), self._refs[self._calls].max(initial=-1)) + 2
        if size > _MOST_NUMBERS:
            raise ValueError(f"a call has number {size - 2}")
        self._call_module = np.full(size, self._code_of(OUTSIDE))
        self._call_module[numbers] = [self._code_of_module(number) for number in calls["module"]]
        self._call_again = np.zeros(size, dtype=bool)
        self._call_again[numbers] = calls["is_recompute"]
        self._call_sequences = np.zeros((size, 2), dtype=np.int64)
        self._call_sequences[numbers] = calls[["sequence_begin", "sequence_end"]]

    def _code_of_module(self, number: int) -> int:
        return self._module_codes.get(number, self._code_of(OUTSIDE))

    def _code_of(self, no_module: str) -> int:
        return len(self._module_names) - len(_NO_MODULE) + _NO_MODULE.index(no_module)

    # --- ranges ---

    def _find_parents(self) -> None:
        """The innermost range around each event, and how many there are. A library's call holds nothing that is asked
        for, and its clock is not quite that of the operators."""
        self._parent = np.full(self._size + 1, -1)
        self._depth = np.zeros(self._size, dtype=np.int16)
        is_range = (self._ends > self._starts) & ~self._is(files.LAUNCH)
        for thread in np.unique(self._threads):
            rows = np.flatnonzero(self._threads == thread)
            found, depths = [], []
            open_rows, open_ends = [-1], [np.iinfo(np.int64).max]
            columns = (rows, self._starts[rows], self._ends[rows], is_range[rows])
            for row, start, end, opens in zip(*(column.tolist() for column in columns), strict=True):
                while open_ends[-1] <= start:
                    open_rows.pop()
                    open_ends.pop()
                found.append(open_rows[-1])
                depths.append(len(open_rows))
                if opens:
                    open_rows.append(row)
                    open_ends.append(end)
            self._parent[rows], self._depth[rows] = found, depths

    def _find_frames(self) -> None:
        """For each event the frame it lies in, and the outermost and innermost operator around it within the frame.

        A frame is what decides phase and module: a module's forward, an autograd node, a call of the optimizer.
        """
        # A node's range holds one more, named like the node: the node's function, which is no operator.
        self._is_node = np.append(self._is(files.NODE), False)
        self._add_node_names()
        parent_node = self._node_names[self._name_codes[self._parent[:-1]]]
        self._is_function = self._is_node[self._parent[:-1]] & (parent_node == self._name_codes[:-1])
        # The profiler copies the function's thread and number to the node, but not where hooks ran before the function.
        nodes = self._parent[:-1][self._is_function]
        self._sequences[nodes] = self._sequences[self._is_function]
        self._forward_threads[nodes] = self._forward_threads[self._is_function]
        self._is_operator = self._is(files.OP) & ~self._is_function
        is_optimizer = self._is(files.ANNOTATION) & self._is_named(lambda name: name.startswith("Optimizer."))
        is_frame = self._is_node[:-1] | self._is(files.CALL) | is_optimizer
        self._frame, self._outer, self._leaf = (np.full(self._size + 1, -1) for _ in range(3))
        for rows in _split(np.arange(self._size), self._depth):
            above, opens, operates = self._parent[rows], is_frame[rows], self._is_operator[rows]
            self._frame[rows] = np.where(opens, rows, self._frame[above])
            self._leaf[rows] = np.where(operates, rows, np.where(opens, -1, self._leaf[above]))
            outer = np.where(opens, -1, self._outer[above])
            self._outer[rows] = np.where(operates & (outer < 0), rows, outer)

    def _add_node_names(self) -> None:
        """_node_names: by the code of a node's range, the code of the node's own name; -2 for all else."""
        codes = {name: code for code, name in enumerate(self._names)}
        ranges = [name for name in self._names if name.startswith(files.NODE_PREFIX)]
        own = {name: name.removeprefix(files.NODE_PREFIX) for name in ranges}
        for name in own.values():
            codes.setdefault(name, len(codes))
        self._names = list(codes)
        self._node_names = np.array([codes.get(own.get(name, ""), -2) for name in (*self._names, "")])

    def _around(self, rows: np.ndarray) -> np.ndarray:
        """The frame around each of some frames, -1 none."""
        return self._frame[self._parent[rows]]

    # --- places ---

    def _place_frames(self) -> None:
        optimizing = np.flatnonzero(self._is(files.ANNOTATION) & (self._frame[:-1] == np.arange(self._size)))
        steps = self._is_named(lambda name: name.startswith("Optimizer.step"))
        for rows, place in (
            (optimizing[steps[optimizing]], (files.OPTIMIZER_STEP, STEPPING)),
            (optimizing[~steps[optimizing]], (files.REST, ZEROING)),
        ):
            self._place(rows, *place)
        numbers = self._refs[self._calls]
        self._call[self._calls] = numbers
        self._module[self._calls] = self._call_module[numbers]
        self._phase[self._calls] = np.where(
            self._call_again[numbers], _PHASES.index(files.RECOMPUTE), _PHASES.index(files.FORWARD)
        )
        nodes = np.flatnonzero(self._is_node)
        self._node[nodes] = self._node_names[self._name_codes[nodes]]
        recomputes = np.array([name == _CHECKPOINT for name in self._names], dtype=bool)[self._node[nodes]]
        self._phase[nodes] = np.where(recomputes, _PHASES.index(files.RECOMPUTE), _PHASES.index(files.BACKWARD))
        self._call[nodes] = self._makers(nodes)
        self._module[nodes] = self._call_module[self._call[nodes]]
        self._place_nodes_without_maker(nodes[self._call[nodes] < 0])

    def _place(self, rows: np.ndarray, phase: str, no_module: str) -> None:
        self._phase[rows], self._module[rows] = _PHASES.index(phase), self._code_of(no_module)

    def _makers(self, nodes: np.ndarray) -> np.ndarray:
        """The call whose forward made each node: the one that used up its sequence number on its thread; -1 none."""
        makers = np.full(len(nodes), -1)
        for thread in np.unique(self._threads[self._calls]):
            numbers = self._refs[self._calls[self._threads[self._calls] == thread]]
            lowest, end = self._call_sequences[numbers, 0].min(), self._call_sequences[numbers, 1].max()
            if end - lowest > _MOST_NUMBERS:
                raise ValueError(f"calls of thread {thread} claim {end - lowest} sequence numbers")
            owners = np.full(max(end - lowest, 0), -1)
            # In order of their start: what an inner forward used up is written over the outer one's claim.
            for number, (begin, end) in zip(
                numbers.tolist(), (self._call_sequences[numbers] - lowest).tolist(), strict=True
            ):
                owners[begin:end] = number
            made = self._sequences[nodes] - lowest
            here = (self._forward_threads[nodes] == thread) & (made >= 0) & (made < len(owners))
            makers[here] = owners[made[here]]
        return makers

    def _place_nodes_without_maker(self, nodes: np.ndarray) -> None:
        """By the parameter whose gradient they add to; else they belong to what runs them, as reentrant checkpointing
        runs the backward of a function that is no module, and adds to the gradient of its input."""
        marks = np.flatnonzero(self._is(files.PARAMETER))
        parameter_of = dict(zip(self._frame[marks].tolist(), self._refs[marks].tolist(), strict=True))
        # An outer range comes before the ranges in it, so its place is known.
        for node, around in zip(nodes.tolist(), self._around(nodes).tolist(), strict=True):
            parameter = parameter_of.get(node, -1)
            if parameter >= 0:
                self._module[node] = self._code_of_module(parameter)
            elif around >= 0:
                self._module[node], self._call[node] = self._module[around], self._call[around]

    def _place_recompute_in_nodes(self) -> None:
        """Non-reentrant checkpointing recomputes in the first node that asks for a tensor, whoever made that node."""
        around = self._frame[:-1]
        in_node = self._is_node[around] & ~self._is_function
        begins = self._starts.copy()  # of a node's function: hooks run before it
        begins[around[self._is_function]] = self._starts[self._is_function]
        operators = np.flatnonzero(in_node & self._is_operator & (self._sequences >= 0))
        calls = self._calls[self._call_again[self._refs[self._calls]] & self._is_node[self._around(self._calls)]]
        ends = np.full(self._size, np.iinfo(np.int64).min)  # of the last that was recomputed in a node
        np.maximum.at(ends, around[operators], self._ends[operators])
        np.maximum.at(ends, self._around(calls), self._ends[calls])
        before = in_node & (self._starts >= begins[around]) & (self._starts < ends[around])
        rows = np.union1d(np.flatnonzero(before), operators)
        self._phase[rows] = _PHASES.index(files.RECOMPUTE)
        self._give_to_callers(rows, calls)

    def _give_to_callers(self, rows: np.ndarray, calls: np.ndarray) -> None:
        """A function that recomputes modules' forwards (`calls`, in a node) was called by what calls those modules,
        and so were the operators beside them (`rows`)."""
        around = self._around(self._calls)
        above = dict(zip(self._refs[self._calls].tolist(), self._call[around].tolist(), strict=True))
        runs: dict[int, set[int]] = {}  # call -> modules whose forwards it ran
        for row in self._calls[~np.isin(self._calls, calls)].tolist():
            runs.setdefault(above[int(self._refs[row])], set()).add(int(self._module[row]))
        rows = rows[np.argsort(self._frame[rows], kind="stable")]
        for inside in _split(calls, self._around(calls)):
            node = int(self._around(inside[:1])[0])
            within = [int(self._call[node])]  # the call that made the node, and all around it
            while within[-1] >= 0:
                within.append(above.get(within[-1], -1))
            modules = self._module[inside].tolist()
            there = rows[slice(*np.searchsorted(self._frame[rows], (node, node + 1)))]
            following = np.searchsorted(self._starts[inside], self._starts[there])
            for number in np.unique(following).tolist():
                module = modules[min(number, len(modules) - 1)]
                # After the forward in which the node was made comes a function that was called from within it.
                if number == len(modules) and module in self._call_module[within[:-1]]:
                    continue
                caller = next((call for call in within if module in runs.get(call, ())), within[0])
                self._call[there[following == number]] = caller
                self._module[there[following == number]] = self._call_module[caller]

    # --- outside all frames ---

    def _place_unframed(self, rows: np.ndarray) -> None:
        """By the moment, on a thread that trains; elsewhere by thread."""
        calls, nodes = (found[self._around(found) < 0] for found in (self._calls, np.flatnonzero(self._is_node)))
        main = self._main_thread()
        for thread in np.unique(self._threads[rows]):
            here = rows[self._threads[rows] == thread]
            own = calls[self._threads[calls] == thread]
            if thread != main and not len(own):
                in_engine = (self._threads[nodes] == thread).any()
                self._place(here, *((files.BACKWARD, ENGINE) if in_engine else (files.REST, OTHER_THREAD)))
                continue
            related = (self._threads[nodes] == thread) | (self._forward_threads[nodes] == thread)
            moments = self._moments(here, thread, own, nodes[related])
            before = BETWEEN_STEPS if moments else OUTSIDE
            states = [
                (files.REST, before if thread == main else OTHER_THREAD),
                *(_BETWEEN[name] for _, name in moments),
            ]
            numbers = np.searchsorted([time_ns for time_ns, _ in moments], self._starts[here], side="right")
            self._phase[here] = np.array([_PHASES.index(phase) for phase, _ in states])[numbers]
            self._module[here] = np.array([self._code_of(no_module) for _, no_module in states])[numbers]

    def _main_thread(self) -> int:
        """The one that trains: where the recorder's marks are, or else the first forward."""
        for kind in (files.MARK, files.CALL):
            found = np.flatnonzero(self._is(kind))
            if len(found):
                return int(self._threads[found[0]])
        return int(self._threads[0]) if self._size else -1

    def _moments(
        self, unframed: np.ndarray, thread: int, forwards: np.ndarray, nodes: np.ndarray
    ) -> list[tuple[int, str]]:
        """(time, key of _BETWEEN) in order of time: from each on, the thread is in that state."""
        marks = np.flatnonzero(self._is(files.MARK) & (self._threads == thread))
        names = [self._names[code].removeprefix(files.MARK_PREFIX) for code in self._name_codes[marks]]
        moments = list(zip(self._starts[marks].tolist(), names, strict=True))
        moments += [(end, "forward_end") for end in self._ends[forwards].tolist()]
        moments = _in_order(moment for moment in moments if moment[1] in _BETWEEN)
        backwards = []
        after = np.searchsorted([time_ns for time_ns, _ in moments], self._starts[nodes], side="right")
        for within in _split(nodes, after):
            backwards.append((int(self._starts[within].min()), "backward_begin"))
            backwards.append((int(self._ends[within].max()), "backward_end"))
        moments = _in_order([*moments, *backwards])
        norms = unframed[self._is_named(_NORMS.__contains__)[unframed]]
        after = np.searchsorted([time_ns for time_ns, _ in moments], self._starts[norms], side="right")
        firsts = []
        for number, within in zip(np.unique(after).tolist(), _split(norms, after), strict=True):
            if number and moments[number - 1][1] == "backward_end":
                firsts.append((int(self._starts[within[0]]), "first_norm"))
        return _in_order([*moments, *firsts])


def _in_order(moments: Iterable[tuple[int, str]]) -> list[tuple[int, str]]:
    return sorted(moments, key=lambda moment: moment[0])


def _split(rows: np.ndarray, keys: np.ndarray) -> list[np.ndarray]:
    """Rows by their key, in order of the keys; `rows` is in order of time, and so is each part."""
    if not len(rows):
        return []
    order = np.argsort(keys, kind="stable")
    return np.split(rows[order], np.flatnonzero(np.diff(keys[order])) + 1)


def _codes(column: pd.Series) -> tuple[np.ndarray, list[str]]:
    """A column as numbers, with one more at the end for none, and what each number means."""
    codes, values = pd.factorize(column)
    return np.append(codes, -1), [str(value) for value in values]
