"""Tables of the page: header, cells as text with what they sort by."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from tunescope.report.figures.chart import Chart, wide
from tunescope.report.text import number, records


@dataclass(frozen=True)
class Cell:
    """sort: full precision of a number, for sorting and for programs; empty for text."""

    text: str
    sort: str = ""


@dataclass(frozen=True)
class Table:
    """caption: what the rows are. num_left: leading columns of text, the first of which heads its row."""

    name: str
    caption: str
    header: list[str]
    rows: list[list[Cell]]
    num_left: int = 1


_WHOLE = ("per_device_batch_size", "seq_len_tokens", "num_timed_steps")


def numeric(value: Any, digits: int = 3) -> Cell:
    """A number as the parsers print it; `-` for none."""
    if value is None or pd.isna(value):
        return Cell("-")
    return Cell(number(float(value), digits), repr(float(value)))


def _whole(value: Any) -> Cell:
    return Cell("-") if pd.isna(value) else Cell(f"{value:g}", repr(float(value)))


def with_interval(value: Any, low: Any, high: Any) -> Cell:
    cell = numeric(value)
    if not cell.sort or low is None or pd.isna(low):
        return cell
    upper = f"over {number(low)}" if high is None or pd.isna(high) else f"{number(low)} to {number(high)}"
    return Cell(f"{cell.text} ({upper})", cell.sort)


def chart_table(chart: Chart) -> Table:
    """What a figure draws, and what it had no room for."""
    header, rows = wide(chart)
    num_left = header.index(chart.group_label or "point") + 1
    is_count = not (chart.frame["value"].dropna() % 1).any()
    made = []
    for row in rows:
        cells = [Cell(str(value)) for value in row[:num_left]]
        for value in row[num_left:]:
            if isinstance(value, dict):
                has = pd.notna(value["value"])
                shown = (
                    _whole(value["value"]) if is_count else with_interval(value["value"], value["low"], value["high"])
                )
                cells.append(shown if has else Cell(str(value["note"])))
            else:
                cells.append(_whole(value) if chart.has_whole_x else numeric(value))
        made.append(cells)
    return Table(f"{chart.name}-table", f"{chart.title} ({chart.value_label})", header, made, num_left)


def frame_table(
    name: str, caption: str, frame: pd.DataFrame, columns: Sequence[tuple[str, str]], num_left: int
) -> Table:
    """Columns (name in the frame, header) of a frame; those without any value are left out."""
    kept = [(column, title) for column, title in columns if column in frame and frame[column].notna().any()]
    left = sum(column in dict(kept) for column, _ in columns[:num_left])
    rows = [
        [
            Cell("-" if pd.isna(row[column]) else str(row[column])) if isinstance(row[column], str)
            or place < left else _whole(row[column]) if column in _WHOLE else numeric(row[column])
            for place, (column, _) in enumerate(kept)
        ]
        for row in records(frame)
    ]  # fmt: skip
    return Table(name, caption, [title for _, title in kept], rows, max(left, 1))


def comparison_table(name: str, title: str, frame: pd.DataFrame, names: tuple[str, str]) -> Table:
    """Of compare.compare(): both numbers, their ratio and the verdict, a row each bar."""
    rows = [
        [
            Cell(str(row["panel"])),
            Cell(str(row["group"])),
            Cell(str(row["series"])),
            with_interval(row["a"], row["a_low"], row["a_high"]),
            with_interval(row["b"], row["b_low"], row["b_high"]),
            with_interval(row["ratio"], row["ratio_low"], row["ratio_high"]),
            Cell(str(row["verdict"])),
        ]
        for row in records(frame)
    ]
    header = ["on", "bar", "what", names[0], names[1], f"{names[1]} / {names[0]}", f"{names[1]} is"]
    return Table(f"{name}-compared", f"{title}: {names[1]} over {names[0]}, 95 % intervals", header, rows, 3)
