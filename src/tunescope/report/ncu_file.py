"""Any Nsight Compute report, as text, csv or json."""

from pathlib import Path

from tunescope.analyze.ncu_file import NcuGroups, ncu_groups
from tunescope.errors import UserError
from tunescope.ncu.counters import DURATION_NS
from tunescope.report.text import check_format, number, records, text_table

DEFAULT_LIMIT = 40
_NAME_WIDTH = 70
# Column -> (title, what its values are divided by)
_COLUMNS = {
    DURATION_NS: ("total us", 1e3), "sm_percent": ("SM %", 1.0), "memory_percent": ("memory %", 1.0),
    "dram_percent": ("DRAM %", 1.0), "dram_read_bytes": ("read MB", 1e6), "dram_written_bytes": ("written MB", 1e6),
    "tensor_percent": ("tensor %", 1.0), "occupancy_percent": ("occupancy %", 1.0), "l2_hit_percent": ("L2 hit %", 1.0),
    "grid_blocks": ("blocks", 1.0), "block_threads": ("threads", 1.0), "registers_per_thread": ("registers", 1.0),
}  # fmt: skip


def print_ncu_file(path: Path, format: str, by: str | None = None, limit: int | None = None) -> None:
    """Prints a report's launches by NVTX range or kernel to stdout.

    limit: rows; None: 40 in text, all in csv and json. Raises UserError as ncu_groups does.
    """
    check_format(format)
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit} leaves no row", cure="use 1 or more")
    found = ncu_groups(path, by)
    if format == "csv":
        print(found.groups.head(limit or len(found.groups)).to_csv(index=False), end="")
    elif format == "json":
        print(found.groups.head(limit or len(found.groups)).to_json(orient="records", indent=1))
    else:
        print(_text(path, found, limit or DEFAULT_LIMIT))


def _text(path: Path, found: NcuGroups, limit: int) -> str:
    known = {column: of for column, of in _COLUMNS.items() if found.groups[column].notna().any()}
    header = [found.by, "launches", *(title for title, _ in known.values())]
    rows = []
    for row in records(found.groups.head(limit)):
        name = str(row["name"])
        shown = name if len(name) <= _NAME_WIDTH else "…" + name[1 - _NAME_WIDTH :]
        rows.append([shown, str(row["num_launches"]), *(number(row[c] / unit) for c, (_, unit) in known.items())])
    title = f"{found.num_launches} launches of {path.name} by {found.by}"
    if (left := len(found.groups) - limit) > 0:
        title += f"; the {limit} longest of {len(found.groups)}, {left} are left out (--limit)"
    note = "total us and MB: sums; the others: means over time, of a launch. By ncu, which empties the caches first."
    return "\n\n".join([title, text_table(header, rows, left_columns=1), note])
