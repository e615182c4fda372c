"""Plain text tables: readable in a terminal, in a txt file and in a diff."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from tunescope.errors import UserError

FORMATS = ("text", "csv", "json")


def check_format(format: str) -> None:
    """Raises UserError for a --format that no table has."""
    if format not in FORMATS:
        raise UserError(f"--format {format!r} is unknown", cure=f"use one of {', '.join(FORMATS)}")


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table, column -> value."""
    return [{str(key): value for key, value in record.items()} for record in table.to_dict("records")]


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left_columns: int) -> str:
    """Columns padded to their widest cell; the first `left_columns` flush left, the rest (numbers) flush right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if column < left_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def number(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits without an exponent; `-` where there is no number."""
    if value is None or value != value:
        return "-"
    if value == 0:
        return "0"
    magnitude = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    if magnitude:
        return f"{value:.{max(digits - magnitude, 0)}f}"
    text = f"{value:.{digits}g}"
    return text if "e" not in text else f"{value:.6f}"
