"""Which CPU op launched each GPU event of a trace, by the ids that the profiler gave both."""

from typing import Protocol

import numpy as np

from tunescope.analyze.timelines import innermost


class Rows(Protocol):
    """Columns of one kind of event: start, duration, thread, external, correlation."""

    def __getitem__(self, column: str) -> np.ndarray: ...

    def __len__(self) -> int: ...


def launching_ops(gpu: Rows, ops: Rows, launches: Rows) -> tuple[np.ndarray, np.ndarray]:
    """For each GPU event the row of the CPU op that launched it and the row of the runtime call that did; -1 if none.

    By the event's External id, then by that of its runtime call, then by what op the call lies in.
    """
    launch = _first_row(launches["correlation"], gpu["correlation"])
    op = _by_external_id(ops, launches, gpu["external"], gpu["correlation"], launch)
    open_ = np.flatnonzero((op < 0) & (launch >= 0))
    of = launch[open_]
    op[open_] = _by_external_id(ops, launches, launches["external"][of], launches["correlation"][of], of)
    open_ = np.flatnonzero((op < 0) & (launch >= 0))
    if len(open_) and len(ops):
        calls, which = np.unique(launch[open_], return_inverse=True)
        rows = np.flatnonzero(np.isin(ops["thread"], launches["thread"][calls]))
        starts = np.concatenate((ops["start"][rows], launches["start"][calls]))
        ends = np.concatenate(((ops["start"] + ops["duration"])[rows], launches["start"][calls]))
        threads = np.concatenate((ops["thread"][rows], launches["thread"][calls]))
        around = innermost(starts, ends, threads, num_outer=len(rows))[len(rows) :][which]
        op[open_[around >= 0]] = rows[around[around >= 0]]
    return op, launch


def _by_external_id(
    ops: Rows, launches: Rows, external: np.ndarray, correlation: np.ndarray, launch: np.ndarray
) -> np.ndarray:
    """Rows of the ops with these External ids; -1 for none.

    Until 2023 Kineto wrote the correlation in place of an External id it did not have. Such an id may be that of an
    op that has nothing to do with it, so it counts only if the call lies in that op.
    """
    row = _first_row(ops["external"], external)
    doubtful = np.flatnonzero((row >= 0) & (external == correlation) & (launch >= 0))
    if len(doubtful):
        of_op, of_call = row[doubtful], launch[doubtful]
        at = launches["start"][of_call]
        inside = (ops["start"][of_op] <= at) & (at <= (ops["start"] + ops["duration"])[of_op])
        inside &= ops["thread"][of_op] == launches["thread"][of_call]
        row[doubtful[~inside]] = -1
    return row


def _first_row(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The first row of `ids` that holds each of `wanted`; -1 where none does and for id 0."""
    if not len(ids):
        return np.full(len(wanted), -1)
    order = np.argsort(ids, kind="stable")
    at = np.searchsorted(ids[order], wanted).clip(max=len(ids) - 1)
    row = order[at]
    return np.where((ids[row] == wanted) & (wanted != 0), row, -1)
