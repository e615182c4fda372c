"""From the table of throughput points: Figure 8, energy and money per 1,000 queries, and code paths side by side."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from tunescope import paper
from tunescope.analyze.points import UNREADABLE
from tunescope.cost.prices import Price, find_price
from tunescope.errors import UserError
from tunescope.families import FAMILIES, find_family
from tunescope.families.family import STOCK
from tunescope.report.figures import papers as unmeasured
from tunescope.report.figures.chart import (
    HIGHER,
    LOWER,
    NOT_MEASURED,
    PAPERS,
    Chart,
    entry,
    frame_of,
    has_papers_size,
    key_of,
    label,
    machine,
)
from tunescope.report.text import records

MEASURED = "measured"
QUERIES = 1000


def shown_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of analyze.throughput that a figure shows: all that can be read, but the shallow ends of extrapolations."""
    return records(table[(table["status"] != UNREADABLE) & ~table["is_shallow_end"].eq(True)])


def figure8(table: pd.DataFrame | None, models: Sequence[str] = ()) -> Chart:
    """Queries/s of each point with its interval, the paper's A40 beside those of its model at full size.

    Of preset slice: what the line through its two depths gives for all layers. The paper's bars that a machine did
    not measure at full size stand there as missing. table: None without a point. models: whose bars of the paper
    stand there even if no point is of them.
    """
    rows = [] if table is None else shown_rows(table)
    entries = []
    for row, place in zip(rows, _places(rows), strict=True):
        value, interval = rate(row)
        bar: dict[str, Any] = {"panel": machine(row), "group": place, "place": place}
        entries.append(
            entry(**bar, series=MEASURED, value=value, interval=interval, note=_why(row), key=key_of(row, "queries/s"))
        )
        theirs = row["paper_a40_queries_per_s"]
        if _beside_paper(row):
            entries.append(entry(**bar, series=PAPERS, value=theirs, key=key_of(row, "paper")))
    beside = {row["model"] for row in rows if _beside_paper(row)}
    for missing in unmeasured.throughput_bars(rows, models):
        if missing.panel == unmeasured.own_panel(missing.row["model"]) and missing.row["model"] in beside:
            continue  # they stand beside a slice
        entries += _unmeasured(missing)
    return Chart(
        "figure08_throughput", "Figure 8: fine-tuning throughput", frame_of(entries), "queries/s", better=HIGHER,
        group_label="data, sparsity, batch",
    )  # fmt: skip


def energy(table: pd.DataFrame) -> Chart:
    """Energy of the whole GPU (kJ) for 1,000 queries, over the timed steps."""
    rows = shown_rows(table)
    entries = [
        entry(
            machine(row), place, MEASURED, _times(row["gpu_energy_j_per_query"], QUERIES / 1e3),
            note=_why(row), key=key_of(row, "J"),
        )
        for row, place in zip(rows, _places(rows), strict=True)
    ]  # fmt: skip
    return Chart(
        "energy", "Energy for 1,000 queries", frame_of(entries), "kJ per 1,000 queries", better=LOWER,
        group_label="data, sparsity, batch",
    )  # fmt: skip


def money(table: pd.DataFrame, prices: Sequence[Price] = ()) -> tuple[Chart, list[str]]:
    """USD for 1,000 queries by the price of an hour of the GPU; ours and, by the price of its A40, the paper's.

    prices: the user's own, before the table's. Returns the chart and, for the reader, each price with its date, or why
    a GPU has none.
    """
    rows = shown_rows(table)
    names = {str(row["device"]): row["clock"] for row in rows if row["status"] == "ok"}
    known, words = _prices(names, prices)
    entries = []
    for row, place in zip(rows, _places(rows), strict=True):
        price = known.get(str(row["device"]))
        value, (low, high) = rate(row)
        usd = [usd_of_queries(price, rate) for rate in (value, high, low)]
        why = _why(row) if row["status"] != "ok" or price is not None else "no price"
        bar: dict[str, Any] = {"panel": machine(row), "group": place, "place": place}
        entries.append(
            entry(**bar, series=MEASURED, value=usd[0], interval=(usd[1], usd[2]), note=why, key=key_of(row, "USD"))
        )
        if _beside_paper(row):
            theirs = usd_of_queries(find_price(paper.GPU, prices), row["paper_a40_queries_per_s"])
            entries.append(entry(**bar, series=PAPERS, value=theirs, key=key_of(row, "paper")))
    chart = Chart(
        "money", "Price of 1,000 queries", frame_of(entries), "USD per 1,000 queries", better=LOWER,
        group_label="data, sparsity, batch",
    )  # fmt: skip
    return chart, words


def paths(table: pd.DataFrame) -> Chart:
    """Queries/s of bars that one machine measured with more than one code path of the experts."""
    rows = [row for row in shown_rows(table) if row["status"] == "ok"]
    by_bar: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_bar.setdefault((machine(row), label(row)), {})[path_of(row)] = row
    entries = []
    for (panel, bar), of_path in by_bar.items():
        if len(of_path) < 2:
            continue
        for moe in sorted(of_path, key=lambda name: (name != STOCK, name)):
            value, interval = rate(of_path[moe])
            entries.append(entry(panel, bar, moe, value, interval=interval, key=key_of(of_path[moe], moe)))
    return Chart(
        "paths", "Code paths of the experts", frame_of(entries), "queries/s", better=HIGHER,
        group_label="data, sparsity, batch",
    )  # fmt: skip


def path_of(row: dict[str, Any]) -> str:
    """The code path of a row's experts, with what else its launcher was told: `grouped`, `grouped, no recompute`."""
    words = [str(row["moe"])]
    frac, layers = row["recompute_frac"], row["num_layers"]
    if row["model"] in FAMILIES and find_family(row["model"]).moe_path == STOCK and pd.notna(frac) and frac < 1:
        words.append(f"{frac * layers:g} of {layers:g} layers recomputed" if frac else "no recompute")
    return ", ".join(words)


def _other_path(row: dict[str, Any]) -> str:
    """Empty of the path that the model takes if nothing is asked for."""
    path = path_of(row)
    is_usual = row["model"] not in FAMILIES or path == find_family(row["model"]).moe_path
    return "" if is_usual else f" {path}"


# --- rows ------------------------------------------------------------------------------------------------------------


def rate(row: dict[str, Any]) -> tuple[Any, tuple[Any, Any]]:
    """Queries/s of a row and its interval; of preset slice, of all layers."""
    name = "queries_per_s_all_layers" if row["preset"] == "slice" else "queries_per_s"
    return row[name], (row[f"{name}_low"], row[f"{name}_high"])


def price_of_rows(table: pd.DataFrame, prices: Sequence[Price] = ()) -> dict[str, Price]:
    """Device -> price, of the GPUs in a table of analyze.throughput that have one."""
    return _prices({str(row["device"]): row["clock"] for row in shown_rows(table) if row["status"] == "ok"}, prices)[0]


def _why(row: dict[str, Any]) -> str:
    return NOT_MEASURED if row["status"] == "ok" else str(row["status"])


def _beside_paper(row: dict[str, Any]) -> bool:
    is_sized = has_papers_size(row) or (row["preset"] == "slice" and row["is_papers_model"] in (True, 1))
    return is_sized and pd.notna(row["paper_a40_queries_per_s"])


def _places(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A name of each row that no other row of its machine has: its bar, and what tells it from others of that bar."""
    bars = [(machine(row), label(row) + _other_path(row)) for row in rows]
    counts = Counter(bars)
    seen: Counter[tuple[str, str]] = Counter()
    names = []
    for bar in bars:
        seen[bar] += 1
        names.append(bar[1] if counts[bar] == 1 else f"{bar[1]} #{seen[bar]}")
    return names


def _unmeasured(missing: unmeasured.Bar) -> Iterator[dict[str, Any]]:
    row = missing.row
    bar: dict[str, Any] = {"panel": missing.panel, "group": label(row)}
    if not missing.is_told:
        yield entry(**bar, series=MEASURED, value=None, note=row["status"], key=key_of(row, "queries/s"))
    theirs = paper.a40_queries_per_s(row["model"], row["dataset"], row["top_k"], row["per_device_batch_size"])
    yield entry(**bar, series=PAPERS, value=theirs, key=key_of(row, "paper"))


def _prices(names: dict[str, Any], own: Sequence[Price]) -> tuple[dict[str, Price], list[str]]:
    found, words = {}, []
    for name, clock in sorted(names.items()):
        if clock == "host":
            words.append(f"{name}: no GPU, so no price.")
            continue
        try:
            found[name] = find_price(name, own)
            words.append(f"{found[name]}.")
        except UserError as error:
            words.append(f"{error.what}; give one as GPU=USD_PER_HOUR.")
    return found, words


def usd_of_queries(price: Price | None, queries_per_s: Any) -> float | None:
    """USD for QUERIES queries; None without a price or a rate."""
    if price is None or queries_per_s is None or pd.isna(queries_per_s) or queries_per_s <= 0:
        return None
    return QUERIES / float(queries_per_s) / 3600 * price.usd_per_hour


def _times(value: Any, factor: float) -> float | None:
    return None if value is None or pd.isna(value) else float(value) * factor
