"""Draws charts with matplotlib: bars lie, so that names of any length can be read at column width and on a phone."""

import logging
import math
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from tunescope.errors import UserError
from tunescope.report.figures import style
from tunescope.report.figures.chart import BARS, LINES, NOT_MEASURED, SCATTER, STACKED, Chart
from tunescope.report.text import number

BAR_IN, GROUP_GAP_IN, PLOT_IN = 0.125, 0.09, 2.0
_TITLE_CHARS, _LABEL_CHARS = 54, 46
_CHAR_IN, _LINE_IN, _LEGEND_ROW_IN = 0.05, 0.125, 0.14
_MAX_NAMED = 6  # marks of a panel that wear their name; all have it on hover
_MISSING_FRAC = 0.05  # width of the empty box that stands where a number is missing, of the axes' width


# --- on matplotlib's Axes --------------------------------------------------------------------------------------------


def draw(chart: Chart, frame: pd.DataFrame, axes: Any) -> dict[int, Any]:
    """Draws rows of Chart.frame (of one panel) on `axes`. Returns row label of the frame -> artist."""
    drawers = {BARS: draw_bars, STACKED: draw_stacked, LINES: draw_lines, SCATTER: draw_lines}
    artists = drawers[chart.kind](chart, frame, axes)
    axes.set_xlabel(chart.x_label if chart.kind in (LINES, SCATTER) else chart.value_label)
    if chart.kind in (LINES, SCATTER):
        axes.set_ylabel(chart.value_label)
    return artists


def draw_bars(chart: Chart, frame: pd.DataFrame, axes: Any) -> dict[int, Any]:
    """One bar each row, as long as its value, groups beneath each other."""
    look = style.looks(chart.series)
    positions, ticks = _positions(frame, by="series")
    artists: dict[int, Any] = {}
    row: Any
    for row in frame.itertuples():
        y = positions[(row.place, row.series)]
        if pd.isna(row.value):
            artists[row.Index] = _draw_missing(axes, y, row.note)
            continue
        (patch,) = axes.barh(y, row.value, height=0.92, **_fill(look[row.series]))
        artists[row.Index] = patch
        _draw_interval(axes, row, y)
    _finish_bars(chart, frame, axes, ticks)
    return artists


def draw_stacked(chart: Chart, frame: pd.DataFrame, axes: Any) -> dict[int, Any]:
    """One bar for each bar of a group, its rows end to end in their order. A bar without any value is missing."""
    look = style.looks(chart.series)
    positions, ticks = _positions(frame, by="bar")
    artists: dict[int, Any] = {}
    for (place, bar), cells in frame.groupby(["place", "bar"], sort=False):
        y, left = positions[(place, str(bar))], 0.0
        if cells["value"].isna().all():
            artists[int(cells.index[0])] = _draw_missing(axes, y, str(cells["note"].iloc[0]))
            continue
        row: Any
        for row in cells[cells["value"].notna()].itertuples():
            (patch,) = axes.barh(y, row.value, left=left, height=0.92, **_fill(look[row.series]))
            artists[row.Index] = patch
            left += row.value
    _finish_bars(chart, frame, axes, ticks)
    return artists


def draw_lines(chart: Chart, frame: pd.DataFrame, axes: Any) -> dict[int, Any]:
    """Rows over x: a line for each series, or markers only (all series of SCATTER, those of markers_only)."""
    look = style.looks(chart.series)
    artists: dict[int, Any] = {}
    row: Any
    for series, cells in frame.groupby("series", sort=False):
        shown = cells[cells["value"].notna() & cells["x"].notna()]
        points = chart.kind == SCATTER or series in chart.markers_only
        dressed = look[str(series)]
        color = style.SOFT if str(series).startswith(style.PAPER) else dressed.color
        if not points:
            axes.plot(shown["x"], shown["value"], color=color, linestyle=dressed.dash, label=series)
        for row in shown.itertuples():
            (artists[row.Index],) = axes.plot(
                [row.x], [row.value], color=color, marker=dressed.marker if points else "None", linestyle="None"
            )
        if points:
            axes.plot([], [], color=color, marker=dressed.marker, linestyle="None", label=series)
            spread = shown[shown["low"].notna()]
            if not spread.empty:
                errors = [(spread["value"] - spread["low"]).clip(0), (spread["high"] - spread["value"]).clip(0)]
                axes.errorbar(spread["x"], spread["value"], yerr=errors, **_WHISKER, ecolor=style.SOFT)
    if chart.is_log:
        axes.set(xscale="log", yscale="log")
        _plain_ticks(axes.xaxis)
        _plain_ticks(axes.yaxis)
    else:
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    if not chart.is_log and not (frame["x"] % 1).any():
        axes.xaxis.get_major_locator().set_params(integer=True)
    if chart.extra.get("is_parity") and len(frame):
        ends = [frame[["x", "value"]].min().min(), frame[["x", "value"]].max().max()]
        axes.plot(ends, ends, color=style.SOFT, linewidth=0.7)
    for line in chart.extra.get("ceilings", {}).get(str(frame["panel"].iloc[0]), ()) if len(frame) else ():
        axes.plot(line["x"], line["y"], color=style.SOFT, linewidth=0.7)
        axes.annotate(line["name"], (line["x"][-1], line["y"][-1]), ha="right", va="bottom", fontsize=style.SMALL_PT)
    if chart.extra.get("is_named"):
        for row in frame[frame["value"].notna() & frame["x"].notna()].head(_MAX_NAMED).itertuples():
            axes.annotate(_short(row.group, 22), (row.x, row.value), fontsize=5, color=style.INK)
    return artists


def _plain_ticks(axis: Any) -> None:
    """Numbers as they are: powers of ten would be set by the mathematics that names from files must not reach."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(base=10, subs=(1.0, 3.0), numticks=7))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


_WHISKER: dict[str, Any] = {"fmt": "none", "elinewidth": 0.8, "capsize": 1.5, "capthick": 0.8, "label": "_"}


def _draw_interval(axes: Any, row: Any, y: float) -> None:
    if pd.isna(row.low):
        return
    high = row.value if pd.isna(row.high) else row.high
    errors = [[max(row.value - row.low, 0.0)], [max(high - row.value, 0.0)]]
    axes.errorbar([row.value], [y], xerr=errors, **_WHISKER, ecolor=style.INK)


def _draw_missing(axes: Any, y: float, note: str) -> Any:
    from matplotlib.patches import Rectangle

    box = Rectangle(
        (0.0, y - 0.46), _MISSING_FRAC, 0.92, transform=axes.get_yaxis_transform(), facecolor="none",
        edgecolor=style.SOFT, hatch="////", linestyle=(0, (2, 1)), linewidth=0.6,
    )  # fmt: skip
    axes.add_patch(box)
    axes.text(
        _MISSING_FRAC + 0.01, y, _short(note or NOT_MEASURED, 40), transform=axes.get_yaxis_transform(),
        fontsize=style.SMALL_PT, va="center",
    )  # fmt: skip
    return box


def _fill(look: style.Look) -> dict[str, Any]:
    return {"facecolor": look.color, "hatch": look.hatch, "edgecolor": style.INK, "linewidth": 0.5}


def _positions(frame: pd.DataFrame, by: str) -> tuple[dict[tuple[Any, str], float], list[tuple[float, str]]]:
    """(place, series or bar) -> y, downwards; and where the names of groups stand."""
    positions: dict[tuple[Any, str], float] = {}
    ticks = []
    y = 0.0
    for place, cells in frame.groupby("place", sort=False):
        names = list(dict.fromkeys(cells[by]))
        group = str(cells["group"].iloc[0])
        for name in names:
            positions[(place, name)] = y
            if by == "bar" and len(names) > 1:
                ticks.append((y, group if name == names[0] else name))
            y += 1
        if by != "bar" or len(names) == 1:
            ticks.append((y - 1 - (len(names) - 1) / 2, group))
        y += GROUP_GAP_IN / BAR_IN
    return positions, ticks


def _finish_bars(chart: Chart, frame: pd.DataFrame, axes: Any, ticks: list[tuple[float, str]]) -> None:
    axes.set_yticks([y for y, _ in ticks], [_short(name, _LABEL_CHARS) for _, name in ticks])
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    rows = num_rows(chart, frame)
    axes.set_ylim(rows - 0.5 - GROUP_GAP_IN / BAR_IN, -0.6)
    if chart.is_log and (frame["value"] > 0).any():
        axes.set_xscale("log")
        _plain_ticks(axes.xaxis)
    else:
        axes.set_xlim(left=0)
    if frame["value"].isna().all():
        axes.set_xticks([])


# --- on a sheet ------------------------------------------------------------------------------------------------------


def num_rows(chart: Chart, frame: pd.DataFrame) -> float:
    """Height of a panel of bars, in bars."""
    by = "bar" if chart.kind == STACKED else "series"
    bars = frame[["place", by]].drop_duplicates()
    return len(bars) + bars["place"].nunique() * GROUP_GAP_IN / BAR_IN


class Panel:
    """Sizes of one panel, in inches, and how it is put on a figure."""

    def __init__(self, chart: Chart, panel: str, width_in: float, frame: pd.DataFrame) -> None:
        self.chart, self.width_in, self.frame = chart, width_in, frame[frame["panel"] == panel]
        title = "\n".join(textwrap.wrap(panel, int(_TITLE_CHARS * width_in / style.COLUMN_WIDTH_IN))[:3])
        self.title = title or chart.title
        is_bars = chart.kind in (BARS, STACKED)
        longest = max((len(_short(str(name), _LABEL_CHARS)) for name in self._names()), default=4)
        self.left_in = longest * _CHAR_IN + 0.12 if is_bars else 0.55
        present = self.frame.loc[self.frame["value"].notna(), "series"]
        self.legend = [name for name in chart.series if name in set(present)]
        longest_series = max((len(name) for name in self.legend), default=1)
        self.legend_columns = max(1, min(4, int((width_in - 0.1) / (longest_series * _CHAR_IN + 0.36))))
        self.legend_rows = math.ceil(len(self.legend) / self.legend_columns) if len(self.legend) > 1 else 0
        self.top_in = 0.08 + (self.title.count("\n") + 1) * _LINE_IN + self.legend_rows * _LEGEND_ROW_IN
        plot_in = max(num_rows(chart, self.frame) * BAR_IN + 0.1, 0.3) if is_bars else PLOT_IN
        self.bottom_in = 0.42
        self.height_in = self.top_in + plot_in + self.bottom_in

    def _names(self) -> list[str]:
        several = self.chart.kind == STACKED and self.frame.groupby("place")["bar"].nunique().gt(1).any()
        return [*self.frame["group"], *(self.frame["bar"] if several else ())]

    def _handles(self, axes: Any) -> list[Any]:
        from matplotlib.patches import Patch

        if self.chart.kind in (BARS, STACKED):
            look = style.looks(self.chart.series)
            return [Patch(label=series, **_fill(look[series])) for series in self.legend]
        by_name = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        return [by_name[series] for series in self.legend]

    def put(self, figure: Any, left_in: float, top_in: float) -> dict[int, Any]:
        """Draws it with its upper left corner there, from the figure's. Returns row label -> artist."""
        width, height = figure.get_size_inches()
        bottom = height - top_in - self.height_in + self.bottom_in
        axes_size = (self.width_in - self.left_in - 0.14, self.height_in - self.top_in - self.bottom_in)
        axes = figure.add_axes(
            ((left_in + self.left_in) / width, bottom / height, axes_size[0] / width, axes_size[1] / height)
        )
        artists = draw(self.chart, self.frame, axes)
        corner = ((left_in + 0.04) / width, (height - top_in - 0.04) / height)
        figure.text(*corner, self.title, va="top", ha="left", fontweight="bold", fontsize=style.TEXT_PT)
        if self.legend_rows:
            under_title = (height - top_in - self.top_in + self.legend_rows * _LEGEND_ROW_IN + 0.01) / height
            axes.legend(
                handles=self._handles(axes), loc="upper left", bbox_to_anchor=(corner[0], under_title),
                bbox_transform=figure.transFigure, ncols=self.legend_columns, borderaxespad=0.0, labelspacing=0.25,
            )  # fmt: skip
        return artists


def panel_figure(chart: Chart, panel: str, width_in: float = style.COLUMN_WIDTH_IN) -> tuple[Any, dict[int, Any]]:
    """One panel as a figure of its own, and row label of Chart.frame -> artist. Within style.styled()."""
    from matplotlib.figure import Figure

    sized = Panel(chart, panel, width_in, chart.drawn())
    figure = Figure(figsize=(width_in, sized.height_in))
    return figure, sized.put(figure, 0.0, 0.0)


def sheet(charts: list[Chart]) -> Any:
    """All panels of some charts on one figure of page width, two beside each other. Within style.styled()."""
    from matplotlib.figure import Figure

    panels = []
    for chart in charts:
        frame = chart.drawn()
        panels += [Panel(chart, panel, style.COLUMN_WIDTH_IN, frame) for panel in dict.fromkeys(frame["panel"])]
    columns = 1 if len(panels) == 1 else 2
    gap_in = style.PAGE_WIDTH_IN - 2 * style.COLUMN_WIDTH_IN
    tops = [0.05] * columns
    places = []
    for panel in panels:  # each goes where there is most room, so that tall ones leave no holes
        column = tops.index(min(tops))
        places.append((column * (style.COLUMN_WIDTH_IN + gap_in), tops[column]))
        tops[column] += panel.height_in + 0.1
    width_in = style.COLUMN_WIDTH_IN if columns == 1 else style.PAGE_WIDTH_IN
    figure = Figure(figsize=(width_in, max(tops)))
    for panel, (left_in, top_in) in zip(panels, places, strict=True):
        panel.put(figure, left_in, top_in)
    return figure


def save(charts: list[Chart], path: Path) -> None:
    """Charts with anything to draw as one .svg, .png or .pdf. Raises UserError if there are none, or no such file."""
    shown = [chart for chart in charts if not chart.is_empty]
    if not shown:
        raise UserError("there is nothing to draw", cause="no point of the folder has numbers for this figure")
    if path.suffix.lower() not in (".svg", ".png", ".pdf"):
        raise UserError(f"{path} cannot be drawn", cure="name a file that ends in .svg, .png or .pdf")
    with style.styled(), quiet():
        try:
            sheet(shown).savefig(path, dpi=200, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Without matplotlib's warnings of names in scripts that its own font lacks: a browser has others."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        logger.setLevel(level)


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def value_text(row: Any, value_label: str) -> str:
    """What a bar says of itself: `cs sparse 8, measured: 3.96 (3.76 to 4.20) queries/s`."""
    name = f"{row.group}, {row.series}" if row.bar == row.series else f"{row.group}, {row.bar}, {row.series}"
    if pd.isna(row.value):
        return f"{name}: {row.note}"
    interval = "" if pd.isna(row.low) or pd.isna(row.high) else f" ({number(row.low)} to {number(row.high)})"
    x = "" if pd.isna(row.x) else f" at {number(row.x)}"
    return f"{name}{x}: {number(row.value)}{interval}; {value_label}"
