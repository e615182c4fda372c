"""A figure's numbers, in one shape for all figures: what is drawn, and what the table beneath it shows."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

BARS, STACKED, LINES, SCATTER = "bars", "stacked", "lines", "scatter"
HIGHER, LOWER = "higher", "lower"
# Chart.frame. key: what the same bar of another folder has, too; machine and place are not in it.
COLUMNS = ("panel", "place", "group", "bar", "series", "x", "value", "low", "high", "note", "key")
NOT_MEASURED = "n/a"
PAPERS = "paper, A40"  # a bar or series of the paper's, and how the name of a panel ends that has nothing else
MAX_GROUPS, MAX_PANELS = 24, 12  # beyond them a figure cannot be read; the table has the rest


@dataclass(frozen=True, eq=False)
class Chart:
    """One figure, of one or several panels.

    name: of its file. frame: COLUMNS, a row each bar, segment or point; value and x in the units of value_label and
    x_label, NaN where missing, and then `note` says why. low, high: 95 % interval, NaN without one. kind: BARS beside
    each other, by group; STACKED: segments `series` of each `bar` of a group; LINES and SCATTER: over x.
    markers_only: series of LINES that are measured points. better: what a comparison calls faster; empty for neither.
    order: of series, where it is not that of the rows.
    """

    name: str
    title: str
    frame: pd.DataFrame
    value_label: str
    kind: str = BARS
    group_label: str = ""
    x_label: str = ""
    better: str = ""
    is_log: bool = False
    markers_only: tuple[str, ...] = ()
    order: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def panels(self) -> list[str]:
        return list(dict.fromkeys(self.frame["panel"]))

    @property
    def series(self) -> list[str]:
        return in_order(self.frame["series"], self.order)

    @property
    def is_empty(self) -> bool:
        return not self.frame["value"].notna().any()

    def own(self) -> "Chart":
        """Without what is the paper's: the folder's own points, those without a number too."""
        frame = self.frame
        theirs = [frame[column].astype(str).str.startswith(PAPERS) for column in ("bar", "series")]
        return replace(self, frame=frame[~(theirs[0] | theirs[1])])

    @property
    def has_whole_x(self) -> bool:
        return not (self.frame["x"].dropna() % 1).any()

    def of_panel(self, panel: str) -> pd.DataFrame:
        return self.frame[self.frame["panel"] == panel]

    def drawn(self) -> pd.DataFrame:
        """Rows that a figure has room for: the first MAX_GROUPS groups of the first MAX_PANELS panels, and of as many
        that are the paper's alone."""
        papers = [panel for panel in self.panels if panel.endswith(PAPERS)]
        own = [panel for panel in self.panels if panel not in papers]
        frame = self.frame[self.frame["panel"].isin([*own[:MAX_PANELS], *papers[:MAX_PANELS]])]
        if self.kind in (LINES, SCATTER):
            return frame
        kept = [
            group[group["place"].isin(list(dict.fromkeys(group["place"]))[:MAX_GROUPS])]
            for _, group in frame.groupby("panel", sort=False)
        ]
        return pd.concat(kept) if kept else frame


def entry(
    panel: str,
    group: str,
    series: str,
    value: Any,
    *,
    interval: tuple[Any, Any] = (None, None),
    note: str = "",
    bar: str = "",
    place: Any = None,
    x: Any = None,
    key: str | None = None,
) -> dict[str, Any]:
    """One row of Chart.frame. note: stands where there is no value; NOT_MEASURED if it is not given."""
    missing = value is None or pd.isna(value)
    return {
        "panel": panel,
        "place": group if place is None else place,
        "group": group,
        "bar": bar or series,
        "series": series,
        "x": x,
        "value": None if missing else float(value),
        "low": interval[0],
        "high": interval[1],
        "note": (note or NOT_MEASURED) if missing else note,
        "key": f"{group}|{bar}|{series}" if key is None else key,
    }


def frame_of(entries: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """COLUMNS of the entries, in their order, numbers as float64."""
    frame = pd.DataFrame(list(entries), columns=list(COLUMNS))
    return frame.astype(dict.fromkeys(("x", "value", "low", "high"), "float64")).reset_index(drop=True)


def label(row: Mapping[str, Any], *, data: bool = True) -> str:
    """A point's bar, as the parsers write it: `cs sparse 8`, with its length where one was asked for."""
    length = row.get("seq_len_tokens")
    length_text = "" if length is None or pd.isna(length) else f" len {int(length)}"
    batch = row.get("per_device_batch_size")
    number = "?" if batch is None or pd.isna(batch) else f"{batch:g}"
    name = f"{row.get('dataset')}{length_text} " if data else ""
    return f"{name}{row.get('sparsity')} {number}"


def machine(row: Mapping[str, Any]) -> str:
    """`mixtral, NVIDIA H200, preset full`."""
    return f"{row.get('model')}, {row.get('device')}, preset {row.get('preset')}"


def key_of(row: Mapping[str, Any], *more: str) -> str:
    """The same for points of the same bar on any machine, version or code path."""
    return "|".join([str(row.get("model")), str(row.get("preset")), label(row), *more])


def has_papers_size(row: Mapping[str, Any]) -> bool:
    """Whether the paper's numbers may stand in one panel with this point's: its own model, at its full depth."""
    return row.get("preset") == "full" and row.get("is_papers_model") in (True, 1)


def wide(chart: Chart) -> tuple[list[str], list[list[Any]]]:
    """The table beneath a figure: header, and a row for each panel and group; a cell is a row of Chart.frame or None.

    Text columns come first: panel (if there are several) and group, then x where the figure has one.
    """
    several = len(chart.panels) > 1
    with_x = chart.kind in (LINES, SCATTER)
    bars = list(dict.fromkeys(zip(chart.frame["bar"], chart.frame["series"], strict=True)))
    one_bar = len({bar for bar, _ in bars}) == 1 or chart.kind != STACKED
    columns = list(dict.fromkeys(series if one_bar else f"{bar}: {series}" for bar, series in bars))
    names = [*(["on"] if several else []), chart.group_label or "point", *([chart.x_label] if with_x else [])]
    header = [*names, *columns]
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in chart.frame.to_dict("records"):
        place = (record["panel"], str(record["place"]), record["group"], record["x"] if with_x else None)
        column = record["series"] if one_bar else f"{record['bar']}: {record['series']}"
        rows.setdefault(place, {})[column] = record
    table = [
        [*([panel] if several else []), group, *([x] if with_x else []), *(cells.get(column) for column in columns)]
        for (panel, _, group, x), cells in rows.items()
    ]
    return header, table


def in_order(present: Iterable[str], order: Sequence[str]) -> list[str]:
    """Those of `order` that are present, then the others in their own order."""
    found = list(dict.fromkeys(present))
    return [*(name for name in order if name in found), *(name for name in found if name not in order)]
