"""`python -m tunescope.ncu.dump REPORT`: a report's launches as an Arrow stream on stdout, by NVIDIA's reader.

In a process of its own: the reader is native code, and a damaged file may end the process.
"""

import sys
from typing import Any

import pyarrow as pa

from tunescope.ncu.counters import COUNTERS_SCHEMA, LAUNCH_METRICS, METRICS, in_column_unit
from tunescope.ncu.names import demangled


def rows_of(path: str) -> list[dict[str, Any]]:
    import ncu_report

    context = ncu_report.load_report(path)
    rows = []
    for number in range(context.num_ranges() or 0):
        launches = context.range_by_idx(number)
        rows += [_row(launches.action_by_idx(at)) for at in range(launches.num_actions())]
    return rows


def _row(action: Any) -> dict[str, Any]:
    mangled = action.name(action.NameBase_MANGLED)
    if not mangled:  # so the reader answers of a report that was cut off
        raise ValueError("a launch in it has no kernel")
    row: dict[str, Any] = {"kernel": demangled(mangled) or mangled, "mangled": mangled, "ranges": _ranges(action)}
    for column, name in (METRICS | LAUNCH_METRICS).items():
        try:
            metric = action.metric_by_name(name)
        except (KeyError, RuntimeError):  # some releases raise where others return None
            metric = None
        has_value = metric is not None and metric.has_value()
        row[column] = in_column_unit(column, metric.as_double(), metric.unit()) if has_value else None
    return row


def _ranges(action: Any) -> list[str]:
    state = action.nvtx_state()
    if state is None:
        return []
    names: list[str] = []
    for domain in state.domains():
        names += state.domain_by_id(domain).push_pop_ranges()
    return names


def main(path: str) -> None:
    table = pa.Table.from_pylist(rows_of(path), COUNTERS_SCHEMA)
    with pa.ipc.new_stream(sys.stdout.buffer, COUNTERS_SCHEMA) as stream:
        stream.write_table(table)


if __name__ == "__main__":
    main(sys.argv[1])
