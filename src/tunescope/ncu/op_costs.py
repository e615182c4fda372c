"""What one call of each operator launches and takes, by the trace of a run without ncu.

By operator only, not by module: it says what a call under ncu would cost and, together with a model of how much work
each module's calls are, which of them take the time.
"""

from collections import Counter
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from tunescope import latency_files as files


class OpCost(NamedTuple):
    """Of all calls in a recording. num_launches: of kernels, which ncu looks into; copies and fills of memory by the
    driver are none."""

    num_calls: int
    num_launches: int
    busy_ns: int


def op_costs(events: pa.Table) -> dict[str, OpCost]:
    """Operator -> its cost; a launch counts for every operator that it lies in. events: latency_files.EVENTS_SCHEMA.

    Nothing where the recording has no kernel.
    """
    kinds = events.column("kind").to_pylist()
    names = events.column("name").to_pylist()
    starts, durations, threads, numbers = (
        events.column(name).to_numpy() for name in ("start_ns", "duration_ns", "thread", "correlation")
    )
    busy_ns: dict[int, list[int]] = {}
    for row in (row for row, kind in enumerate(kinds) if kind == files.KERNEL):
        busy_ns.setdefault(int(numbers[row]), []).append(int(durations[row]))
    calls: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    busy: Counter[str] = Counter()
    open_ops: dict[int, list[tuple[int, str]]] = {}  # of each thread: (end, name)
    for row in np.lexsort((-durations, starts)) if busy_ns else ():
        if kinds[row] not in (files.OP, files.LAUNCH):
            continue
        stack = open_ops.setdefault(int(threads[row]), [])
        while stack and stack[-1][0] <= starts[row]:
            stack.pop()
        if kinds[row] == files.OP:
            calls[names[row]] += 1
            stack.append((int(starts[row] + durations[row]), names[row]))
        elif kernels := busy_ns.get(int(numbers[row])):
            for name in {name for _, name in stack}:
                launches[name] += len(kernels)
                busy[name] += sum(kernels)
    return {name: OpCost(count, launches[name], busy[name]) for name, count in calls.items()}
