"""Breakdowns by the real launcher, and what the parser prints of them."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import launching
import pandas as pd
import pyarrow as pa
from launching import REPO, Finished

from tunescope import expert_tokens, results
from tunescope import latency_files as files
from tunescope.report.latency import print_latency

RANDOM_SPARSE, RANDOM_DENSE = "random-k2-b1-s128-tiny-cpu", "random-k8-b1-s128-tiny-cpu"
# 3 steps of warm-up, 4 timed, 1 to start the profiler, 2 recorded, 1 to start it again, 1 with memory.
TINY = ("--preset", "tiny", "--queries", "12")
NUM_TIMED_STEPS, NUM_RECORDED_STEPS = 4, 2
SCHEMAS = {
    results.STEPS_FILE: results.STEPS_SCHEMA,
    files.PHASES_FILE: files.PHASES_SCHEMA,
    files.SPANS_FILE: files.SPANS_SCHEMA,
    files.MODULES_FILE: files.MODULES_SCHEMA,
    files.CALLS_FILE: files.CALLS_SCHEMA,
    files.EVENTS_FILE: files.EVENTS_SCHEMA,
    files.MEMORY_EVENTS_FILE: files.EVENTS_SCHEMA,
    files.MEMORY_PARTS_FILE: files.MEMORY_PARTS_SCHEMA,
    expert_tokens.EXPERT_TOKENS_FILE: expert_tokens.EXPERT_TOKENS_SCHEMA,
}


def measure(out: Path, points: str, *arguments: str | Path, fault: str = "", **changes: str) -> Finished:
    """`./mixtral_lt.sh` into `out`, as TINY."""
    launcher = [REPO / "mixtral_lt.sh", *TINY, "--out", out, "--points", points, *arguments]
    return launching.run(*launcher, TUNESCOPE_FAULT=fault, **changes)


class Launcher(launching.Launcher):
    """`./mixtral_lt.sh` as launching.Launcher starts `./mixtral_tp.sh`."""

    script, shortest = REPO / "mixtral_lt.sh", TINY


def read(point: Path, name: str) -> pd.DataFrame:
    """One Arrow file of a point."""
    return results.read_arrow(point / name, SCHEMAS[name]).to_pandas()


def put(point: Path, name: str, frame: pd.DataFrame) -> None:
    table = pa.Table.from_pandas(frame, schema=SCHEMAS[name], preserve_index=False)
    results.write_arrow_table(point / name, table)


class TextTable(NamedTuple):
    header: list[str]
    rows: list[list[str]]


def tables_in(text: str) -> dict[str, TextTable]:
    """Title -> table, of a text of many. Of figures that have one for each point without the machine."""
    lines = text.splitlines()
    found: dict[str, TextTable] = {}
    for number, line in enumerate(lines):
        if re.fullmatch(r"-+(  -+)*", line):
            cuts = [match.span() for match in re.finditer("-+", line)]
            body = lines[number + 1 :]
            of_table = (lines[number - 1], *body[: body.index("") if "" in body else None])
            header, *rows = [[row[begin:end].strip() for begin, end in cuts] for row in of_table]
            title = re.sub(r"^(Figure [56].*?) on .*, preset \w+$", r"\1", lines[number - 3])
            assert title not in found
            found[title] = TextTable(header, rows)
    return found


def printed(folder: Path, capsys: Any, format: str = "text", layer: int | None = None) -> str:
    """What the parser prints of a folder in which every point can be read."""
    assert print_latency(folder, format, layer)
    return capsys.readouterr().out
