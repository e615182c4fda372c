"""Where the benchmarks put their rows: one CSV each, appended to."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def append(path: Path, columns: Sequence[str], *rows: Mapping[str, Any]) -> None:
    """Adds rows, under a header if the file is new. Ends the program where the file has other columns."""
    is_new = not path.exists()
    if not is_new and next(csv.reader([path.read_text(encoding="utf-8").partition("\n")[0]])) != list(columns):
        raise SystemExit(f"{path} has other columns than this version writes; name another file with --out")
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
