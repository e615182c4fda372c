"""`report DIR [DIR2] -o OUT`: reads the points, draws the figures, writes the page and, where asked, their files."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd

from tunescope import __version__
from tunescope.cost.prices import Price
from tunescope.errors import UserError
from tunescope.report.compare import both, compare
from tunescope.report.figures.chart import MAX_GROUPS, MAX_PANELS, PAPERS, Chart
from tunescope.report.figures.draw import save
from tunescope.report.figures.svg import InlineSvg, inline_svg, sheet_svg
from tunescope.report.page.clean import clean_text
from tunescope.report.page.collect import Collected, collect
from tunescope.report.page.findings import findings
from tunescope.report.page.sections import Section, sections
from tunescope.report.page.tables import Table, chart_table, comparison_table

PAGE_FILE = "index.html"
FIGURES_FOLDER = "figures"
_FACTS = (
    ("model", "models"), ("device", "devices"), ("driver", "driver"), ("power_limit_w", "power limit (W)"),
    ("preset", "presets"), ("weights", "weights"), ("data", "data"), ("tokenizer", "tokenizer"), ("moe", "MoE path"),
    ("attention", "attention"), ("scan", "scan"), ("compute_dtype", "compute"), ("torch", "torch"),
    ("git_revision", "commit"),
)  # fmt: skip
_MAX_NAMES = 8


@dataclass(frozen=True)
class Shown:
    """One section as the template takes it."""

    section: Section
    heading: str
    pictures: list[tuple[str, InlineSvg]]
    tables: list[Table]
    provenance: str
    left_out: str


def write_report(
    folder: Path,
    other: Path | None,
    out: Path,
    *,
    png: bool = False,
    pdf: bool = False,
    prices: Sequence[Price] = (),
) -> Path:
    """Writes OUT/index.html, and figures below OUT/figures: .svg, and .png and .pdf where asked. Returns the page.

    other: a second folder, set beside the first in every table. prices: the user's own, before the table's.
    Raises UserError if a folder is missing or holds no point, or if nothing can be written there.
    """
    found = collect(folder)
    second = None if other is None else collect(other)
    names = _names(folder, other)
    shown = list(_shown(sections(found, prices), None if second is None else sections(second, prices), names, found))
    html = page_html(found, second, shown, names, prices)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / PAGE_FILE).write_text(html, encoding="utf-8")
        (out / FIGURES_FOLDER).mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written: {error.strerror or error}", cure="name a folder that you may write with -o"
        ) from None
    for each in shown:
        if not each.pictures:
            continue
        stem = out / FIGURES_FOLDER / each.section.chart.name
        stem.with_suffix(".svg").write_text(sheet_svg([picture for _, picture in each.pictures]), encoding="utf-8")
        for ending in (*([".png"] if png else []), *([".pdf"] if pdf else [])):
            save([each.section.chart], stem.with_suffix(ending))
    return out / PAGE_FILE


def page_html(
    found: Collected, second: Collected | None, shown: Sequence[Shown], names: tuple[str, str], prices: Sequence[Price]
) -> str:
    """The whole page. Everything but the figures' own markup, which escapes for itself, is escaped by the template."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FunctionLoader(_template),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    machines = [
        {"name": name, "facts": facts(each), "findings": findings(each, prices), "statuses": statuses(each),
         "is_tiny": "preset" in each.points and each.points["preset"].eq("tiny").any()}
        for name, each in zip(names, (found, second), strict=True)
        if each is not None
    ]  # fmt: skip
    return environment.get_template("page.html.j2").render(
        machines=machines,
        sections=shown,
        css=Markup(_template("page.css")),
        script=Markup(_template("page.js")),
        markup=Markup,
        version=__version__,
        is_comparison=second is not None,
    )


def _template(name: str) -> str:
    return (files("tunescope.report.page") / "templates" / name).read_text(encoding="utf-8")


def _names(folder: Path, other: Path | None) -> tuple[str, str]:
    """Short names of both folders: their last parts, or A and B where those are the same."""
    if other is None:
        return clean_text(folder.resolve().name), ""
    first, second = (clean_text(path.resolve().name, 30) for path in (folder, other))
    return (f"A ({first})", f"B ({second})") if first != second else ("A", "B")


def _shown(
    own: Sequence[Section], others: Sequence[Section] | None, names: tuple[str, str], found: Collected
) -> Iterable[Shown]:
    for place, section in enumerate(own):
        chart, tables = section.chart, list(section.tables)
        if others is not None and section.kinds:
            theirs = others[place]
            compared = compare(chart.own(), theirs.chart.own())
            if len(compared):
                tables.insert(0, comparison_table(section.name, section.heading, compared, names))
            chart = _both(chart, theirs.chart, names)
            tables += [_renamed(table, names[1]) for table in theirs.tables]
            section = Section(**{**vars(section), "chart": chart})
        prefix = f"fig-{section.name}"
        panels = [] if chart.is_empty else list(dict.fromkeys(chart.drawn()["panel"]))
        pictures = [(panel, inline_svg(chart, panel, f"{prefix}-{number}")) for number, panel in enumerate(panels)]
        if not chart.frame.empty:
            tables.insert(0, chart_table(chart))
        yield Shown(section, section.heading, pictures, tables, provenance(found, section), _left_out(chart))


def _both(a: Chart, b: Chart, names: tuple[str, str]) -> Chart:
    """The panels of both, each named after its folder, then once what is the paper's alone."""
    papers = [chart.frame["panel"].astype(str).str.endswith(PAPERS) for chart in (a, b)]
    own = [replace(chart, frame=chart.frame[~apart]) for chart, apart in zip((a, b), papers, strict=True)]
    whole = [chart for chart in own if not chart.frame.empty]
    merged = both(own[0], own[1], names) if len(whole) == 2 else (whole or own)[0]
    theirs = pd.concat([chart.frame[apart] for chart, apart in zip((a, b), papers, strict=True)])
    theirs = theirs.drop_duplicates(["panel", "place", "bar", "series", "x"])
    frames = [frame for frame in (merged.frame, theirs) if len(frame)]
    return replace(merged, frame=pd.concat(frames, ignore_index=True)) if len(theirs) else merged


def _renamed(table: Table, name: str) -> Table:
    return Table(f"{table.name}-b", f"{table.caption}, {name}", table.header, table.rows, table.num_left)


def _left_out(chart: Chart) -> str:
    if chart.is_empty:
        return ""
    drawn, rows = len(chart.drawn()), len(chart.frame)
    if drawn == rows:
        return ""
    return (
        f"The figure shows the first {MAX_PANELS} panels and {MAX_GROUPS} bars of each: {drawn} of {rows} values. The "
        "table has all."
    )


def statuses(found: Collected) -> list[tuple[str, str, str]]:
    """(point, status, cause) of every point that is not ok."""
    points = found.points
    others = points[points["status"] != "ok"] if len(points) else points
    rows = [(str(row["folder"]), str(row["status"]), str(row.get("cause") or "-")) for row in others.to_dict("records")]
    return rows + [(name, "unreadable", cause) for name, cause in found.unreadable]


def facts(found: Collected) -> list[tuple[str, str]]:
    """What was measured, on what: (name, values), of all points."""
    points = found.points
    counts = points["status"].value_counts().to_dict() if len(points) else {}
    counted = ", ".join(f"{count} {status}" for status, count in counts.items())
    if found.unreadable:
        counted += f"{', ' if counted else ''}{len(found.unreadable)} unreadable"
    if found.num_unfinished:
        counted += f", {found.num_unfinished} begun and not finished"
    rows = [("points", counted)]
    return rows + [(title, _values(points, column)) for column, title in _FACTS if _values(points, column)]


def provenance(found: Collected, section: Section) -> str:
    """Of the points behind a section: how many, on what, made by what."""
    if not section.kinds:
        return "Not from this folder: the paper's own numbers, or this project's packaged ones."
    points = found.points
    points = points[points["kind"].isin(section.kinds)] if len(points) else points
    if points.empty:
        return "No point of this folder is of this kind."
    parts = [f"{title} {words}" for column, title in _FACTS if (words := _values(points, column))]
    return f"{len(points)} points; " + "; ".join(parts) + "."


def _values(points: pd.DataFrame, column: str) -> str:
    if column not in points:
        return ""
    values = list(dict.fromkeys(_plain(value) for value in points[column].dropna()))
    more = len(values) - _MAX_NAMES
    return ", ".join(values[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


def _plain(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{28}\b", r"\1", text)  # a commit by its first digits
