"""Panels as SVG inside a page: colours that follow its theme, names of its own, values on hover, text alternatives."""

import io
import re
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

import pandas as pd

from tunescope.report.figures import style
from tunescope.report.figures.chart import LINES, SCATTER, STACKED, Chart
from tunescope.report.figures.draw import panel_figure, quiet, value_text
from tunescope.report.text import number

# Of the page; a viewer without it takes the second.
_THEME = {style.INK: "var(--ink, #1b1b1f)", style.SOFT: "var(--soft, #5a5a62)", style.RULE: "var(--rule, #d4d4da)"}
_GID = "mark-"
_FONTS = "DejaVu Sans, Verdana, sans-serif"  # the first is what matplotlib measured labels with


class InlineSvg(NamedTuple):
    """markup: an <svg> element, safe to put into HTML as it is. alt: what its <desc> says."""

    markup: str
    alt: str


def inline_svg(chart: Chart, panel: str, prefix: str) -> InlineSvg:
    """One panel. prefix: of every id in it, which no other figure of the page may have."""
    with style.styled(), quiet():
        figure, artists = panel_figure(chart, panel)
        for index, artist in artists.items():
            artist.set_gid(f"{_GID}{index}")
        out = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", facecolor="none", metadata=nothing)
    alt = alternative(chart, panel)
    return InlineSvg(_clean(out.getvalue(), chart, panel, prefix, alt), alt)


def _clean(text: str, chart: Chart, panel: str, prefix: str, alt: str) -> str:
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    rows = {f"{_GID}{row.Index}": row for row in chart.of_panel(panel).itertuples()}
    needed = set(re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", text))
    kept = {name for pair in needed for name in pair if name} | rows.keys()

    def cleaned(match: re.Match[str]) -> str:
        # Inside tags only: what a name from a file says stays as it is.
        tag = match.group(0)
        for color, variable in _THEME.items():
            tag = tag.replace(color, variable)
        marked = re.match(rf'<g id="({_GID}\d+)"', tag)
        tag = re.sub(r' id="([^"]+)"', lambda found: f' id="{prefix}-{found[1]}"' if found[1] in kept else "", tag)
        tag = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", tag)
        tag = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', tag)
        tag = re.sub(r" font-family: [^;\"]*;| transform=\"rotate\(-0 [^\"]*\"", "", tag)
        tag = re.sub(r"\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), tag)
        tag = re.sub(r"\s+", " ", tag)
        row = rows.get(marked.group(1)) if marked else None
        return tag if row is None else f"{tag}<title>{escape(value_text(row, chart.value_label))}</title>"

    text = re.sub(r"<[^>]*>", cleaned, text)
    text = re.sub(r">\n\s*<", "><", text)
    size = re.search(r'viewBox="([^"]+)"', text)
    assert size is not None, "matplotlib's SVG has a viewBox"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{size.group(1)}" font-family="{_FONTS}" role="img" '
        f'aria-labelledby="{prefix}-title {prefix}-desc">'
        f'<title id="{prefix}-title">{escape(chart.title)}, {escape(panel)}</title>'
        f'<desc id="{prefix}-desc">{escape(alt)}</desc>'
    )
    return head + text[text.index(">") + 1 :].strip()


def sheet_svg(pictures: Sequence[InlineSvg]) -> str:
    """Panels as one SVG file of page width, two beside each other, in this style's own colours. (pt)"""
    gap, tops = 10.0, [0.0, 0.0]
    width = 72 * style.COLUMN_WIDTH_IN
    placed = []
    for picture in pictures:
        size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', picture.markup)
        assert size is not None, "matplotlib's SVG has a viewBox"
        column = tops.index(min(tops)) if len(pictures) > 1 else 0
        place = f'<svg x="{column * (width + gap):g}" y="{tops[column]:g}" width="{size[1]}" height="{size[2]}"'
        placed.append(picture.markup.replace("<svg", place, 1))
        tops[column] += float(size[2]) + gap
    sheet_width = width if len(pictures) == 1 else 2 * width + gap
    text = "".join(placed)
    for color, variable in _THEME.items():
        text = text.replace(variable, color)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{sheet_width:g}pt" '
        f'height="{max(tops):g}pt" viewBox="0 0 {sheet_width:g} {max(tops):g}"><rect width="100%" height="100%" '
        f'fill="white"/>{text}</svg>\n'
    )


def alternative(chart: Chart, panel: str) -> str:
    """A panel in words: what it is of, how many, the largest and the smallest, what is missing."""
    frame = chart.of_panel(panel)
    known = frame[frame["value"].notna()]
    kinds = {STACKED: "Stacked bars", LINES: "Curves", SCATTER: "Points"}
    series = ", ".join(dict.fromkeys(frame["series"]))
    words = [f"{kinds.get(chart.kind, 'Bars')} of {chart.value_label}: {series}."]
    if not known.empty:
        words.append(f"Largest: {_spoken(known.loc[known['value'].idxmax()])}.")
        if len(known) > 1:
            words.append(f"Smallest: {_spoken(known.loc[known['value'].idxmin()])}.")
    missing = len(frame) - len(known)
    if missing:
        words.append(f"{missing} missing: {', '.join(dict.fromkeys(frame.loc[frame['value'].isna(), 'note']))}.")
    words.append("The table has every value.")
    return " ".join(words)


def _spoken(row: Any) -> str:
    value = number(row["value"])
    return f"{value} ({row['group']}, {row['series']})" if pd.notna(row["value"]) else str(row["note"])
