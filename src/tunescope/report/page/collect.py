"""All that is known of one folder of points, read once, and cleaned for showing."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pandas as pd

from tunescope import results
from tunescope.analyze.kernel_tables import KernelTables, kernel_tables
from tunescope.analyze.latency_tables import TABLES, LatencyTables, latency_tables
from tunescope.analyze.points import UNREADABLE, point_folders
from tunescope.analyze.roofline import Rooflines, rooflines
from tunescope.analyze.throughput import throughput
from tunescope.config import LATENCY, NCU, THROUGHPUT
from tunescope.cost.validation import OWN_UNSEEN, HeldOut, held_out
from tunescope.errors import UserError
from tunescope.ncu.settings import PHASES
from tunescope.report.page.clean import clean_cause, clean_frame, clean_text

LAUNCHERS = "a launcher, as ./mixtral_tp.sh or ./mamba_lt.sh"
MAX_FORECASTS = 200  # points of a folder that are forecast; each takes a few milliseconds
_KINDS = (THROUGHPUT, LATENCY, NCU)


@dataclass(frozen=True)
class Collected:
    """throughput, latency, kernels, rooflines: tables of analyze, None where the folder has no point of the kind.

    unreadable: point_id and cause of folders that could not be read. num_unfinished: begun and not finished.
    forecasts: of the folder's own points, by the model fitted to the paper's; empty where why_no_forecasts says why.
    """

    root: Path
    throughput: pd.DataFrame | None
    latency: LatencyTables | None
    kernels: KernelTables | None
    rooflines: Rooflines | None
    unreadable: list[tuple[str, str]]
    num_unfinished: int
    forecasts: Sequence[HeldOut]
    why_no_forecasts: str

    @cached_property
    def points(self) -> pd.DataFrame:
        """Every point that could be read, one row each, with the columns that all kinds have."""
        kept = []
        for kind, frame in zip(_KINDS, (self.throughput, *_points(self.latency, self.kernels)), strict=True):
            if frame is not None:
                kept.append(frame[frame["status"] != UNREADABLE].assign(kind=kind))
        whole = [frame.dropna(axis="columns", how="all") for frame in kept if len(frame)]
        return pd.concat(whole, ignore_index=True) if whole else pd.DataFrame(columns=["status", "kind"])


def _points(*tables: LatencyTables | KernelTables | None) -> list[pd.DataFrame | None]:
    return [None if found is None else found.points for found in tables]


def collect(root: Path) -> Collected:
    """Reads every point at or below `root`. Raises UserError if there is no such folder, or no point in it."""
    folders = point_folders(root, LAUNCHERS)
    kinds = {str(folder): _kind(folder) for folder in folders}
    present = set(kinds.values())
    # A point whose kind cannot be told goes to the first table, which says what is wrong with it.
    found_throughput = throughput(root) if present - {LATENCY, NCU} else None
    found_latency = latency_tables(root) if LATENCY in present else None
    found_kernels = kernel_tables(root, PHASES) if NCU in present else None
    found_rooflines = rooflines(root, PHASES) if NCU in present else None
    unreadable: dict[str, tuple[str, str]] = {}
    for kind, frame in zip(_KINDS, (found_throughput, *_points(found_latency, found_kernels)), strict=True):
        if frame is None:
            continue
        for row in frame[frame["status"] == UNREADABLE].to_dict("records"):
            if kinds[row["folder"]] in (kind, None):
                unreadable[row["folder"]] = (clean_text(str(row["point_id"])), _reason(str(row["cause"]), root))
    forecasts, why_not = _forecasts(root)
    return Collected(
        root=root,
        throughput=None if found_throughput is None else _readable(found_throughput, root),
        latency=None if found_latency is None else _clean_latency(found_latency, root),
        kernels=None
        if found_kernels is None
        else KernelTables(_readable(found_kernels.points, root), clean_frame(found_kernels.operators, root)),
        rooflines=None
        if found_rooflines is None
        else Rooflines(_readable(found_rooflines.points, root), clean_frame(found_rooflines.operators, root)),
        unreadable=list(unreadable.values()),
        num_unfinished=len(results.find_unfinished(root)),
        forecasts=forecasts,
        why_no_forecasts=why_not,
    )


def _reason(text: str, root: Path) -> str:
    """Without the way to the folder that the report is of, however it was given."""
    return clean_cause(text.replace(f"{root}/", "").replace(str(root), "the folder"))


def _kind(folder: Path) -> str | None:
    try:
        kind = json.loads((folder / results.POINT_FILE).read_bytes()).get("kind")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return kind if kind in _KINDS else None


def _readable(frame: pd.DataFrame, root: Path) -> pd.DataFrame:
    return clean_frame(frame[frame["status"] != UNREADABLE].reset_index(drop=True), root)


def _clean_latency(found: LatencyTables, root: Path) -> LatencyTables:
    experts = [
        replace(
            point,
            label=clean_text(point.label),
            model=clean_text(point.model),
            device=clean_text(point.device),
            preset=clean_text(point.preset),
            weights=clean_text(point.weights),
            loads=clean_frame(point.loads, root),
        )
        for point in found.experts
    ]
    tables = {name: clean_frame(getattr(found, name), root) for name in TABLES}
    return LatencyTables(points=_readable(found.points, root), **tables, experts=experts)


def _forecasts(root: Path) -> tuple[Sequence[HeldOut], str]:
    from tunescope.cost.time_points import read_points

    try:
        points = read_points(root)
    except UserError as error:
        return (), _reason(f"{error.what}. {error.cause}", root)
    return held_out(points[:MAX_FORECASTS], (OWN_UNSEEN,)), ""
