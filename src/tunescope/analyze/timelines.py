"""Intervals of time on a timeline: their union, and which lies in which."""

import numpy as np


def span_and_busy(start: np.ndarray, end: np.ndarray) -> tuple[int, int]:
    """From the first start to the last end, and the part of it that the intervals cover (their union)."""
    if not len(start):
        return 0, 0
    order = np.argsort(start, kind="stable")
    start, reached = start[order], np.maximum.accumulate(end[order])
    before = np.concatenate((start[:1], reached[:-1]))
    return int(reached[-1] - start[0]), int((reached - np.maximum(start, before)).clip(0).sum())


def innermost(start: np.ndarray, end: np.ndarray, thread: np.ndarray, *, num_outer: int | None = None) -> np.ndarray:
    """For each interval the row of the innermost other one of its thread that holds its start; -1 if none does.

    Of equal intervals the first holds the second. Only the first `num_outer` rows can hold another, all if None.
    """
    parent = np.full(len(start), -1)
    last_outer = len(start) if num_outer is None else num_outer
    order = np.lexsort((np.arange(len(start)), -end, np.arange(len(start)) >= last_outer, start, thread))
    stack: list[tuple[int, int]] = []
    of_thread = None
    for at in range(0, len(order), 65536):
        rows = order[at : at + 65536]
        columns = (column.tolist() for column in (rows, start[rows], end[rows], thread[rows]))
        for row, begins, ends, on in zip(*columns, strict=True):
            if on != of_thread:
                stack, of_thread = [], on
            while stack and stack[-1][1] <= begins:
                stack.pop()
            if stack:
                parent[row] = stack[-1][0]
            if row < last_outer:
                stack.append((row, ends))
    return parent
