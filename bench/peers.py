"""Other tools' estimates of memory, step time and largest batch beside tunescope's, on the same measured points.

    PYTHONPATH=src .venv/bin/python bench/peers.py [--python PEER_PYTHON]... [--out CSV] [--page docs/peers.md]

Asked are `accelerate estimate-memory`, llm-analysis, fitcheck-llm and ftuneai, each in a process of its own, in the
first PEER_PYTHON that has it (this one, if none is named). One that is nowhere installed gets rows that say so, and so
does one that crashes or takes too long. Nothing is fetched: a config.json is made of what this project has. Prints the
table of docs/peers.md, which says how each was asked and what the quantities are.

--points-of CSV asks about the measured points that a CSV names and learns from no others, so that points measured since
change nothing. With --ours too only tunescope is asked, and rows of the others are taken from the CSV.
"""

import argparse
import csv
import datetime
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "bench")]

from peers_code import PEERS, PREAMBLE  # noqa: E402

import tunescope  # noqa: E402
from tunescope import paper, results  # noqa: E402
from tunescope.cost import validation  # noqa: E402
from tunescope.cost.memory import MIB, OPTIMIZER, max_batch_size, memory_terms, peak_bytes  # noqa: E402
from tunescope.cost.time_points import RECIPES, TimedPoint, read_points  # noqa: E402
from tunescope.errors import UserError  # noqa: E402
from tunescope.families import find_family  # noqa: E402
from tunescope.hardware import GIB, Device, find_device  # noqa: E402

H200 = ROOT / "docs" / "results" / "h200"
MODELS = ("mixtral", "blackmamba")  # the study's, each as its own recipe runs it
CSV = Path(__file__).with_suffix(".csv")
COLUMNS = ("date", "tool", "version", "model", "point", "quantity", "predicted", "measured", "ratio", "note")
PEAK, RESERVED, STEP, MAX_BATCH = QUANTITIES = ("peak_bytes", "reserved_bytes", "step_s", "max_batch")
OURS = "tunescope"
OLD_NF4 = "tunescope, bitsandbytes before 0.43.2"
GPU_UNSEEN, POINT_LEFT_OUT = "tunescope, GPU unseen", "tunescope, point left out"
_TIME_SPLITS = {
    validation.LEAVE_GPU: GPU_UNSEEN, validation.OWN_UNSEEN: GPU_UNSEEN,
    validation.LEAVE_POINT: POINT_LEFT_OUT, validation.OWN_POINT: POINT_LEFT_OUT,
}  # fmt: skip
# Memory as drivers report it, GiB, and hardware.py's name, for the paper's names of its GPUs.
PAPER_GPUS = {
    "a40": (44.4, ("A40", 48)), "a100-40gb": (39.4, ("A100", 40)), "a100-80gb": (79.2, ("A100", 80)),
    "h100-80gb": (79.2, ("H100", 80)),
}  # fmt: skip
LONGEST_TOKENS = {"cs": 512, "math": 1024, "synthetic": 128}  # padded, as docs/memory_model.md has them


@dataclass(frozen=True)
class Ask:
    """One question. measured: bytes, seconds or queries. seq_len_tokens: the longest padded query, for a step the mean
    padded length. is_masked: whether some slots are padding. memory_gib: of the GPU, as its driver reports it."""

    model: str
    point: str
    quantity: str
    measured: float
    config: Mapping[str, Any]
    batch_size: int
    seq_len_tokens: float
    is_masked: bool
    device: Device
    memory_gib: float

    def to_json(self) -> dict[str, Any]:
        """What a peer is told."""
        return {
            "quantity": self.quantity,
            "model": self.model,
            "config": dict(self.config),
            "num_parameters": num_parameters(json.dumps(dict(self.config), sort_keys=True)),
            "batch_size": self.batch_size,
            "seq_len_tokens": self.seq_len_tokens,
            "gpu": self.device.name,
            "gpu_memory_gib": self.memory_gib,
            "gpu_bf16_flop_per_s": self.device.peak_bf16_flop_per_s,
            "gpu_dram_bytes_per_s": self.device.dram_bytes_per_s,
        }


@dataclass(frozen=True)
class Row:
    tool: str
    version: str
    ask: Ask
    predicted: float | None
    note: str

    def cells(self, date: str) -> dict[str, str]:
        ask, digits = self.ask, 6 if self.ask.quantity == STEP else 12
        ratio = "" if self.predicted is None else f"{self.predicted / ask.measured:.5f}"
        predicted = "" if self.predicted is None else f"{self.predicted:.{digits}g}"
        measured = f"{ask.measured:.{digits}g}"
        values = (
            date, self.tool, self.version, ask.model, ask.point, ask.quantity, predicted, measured, ratio, self.note,
        )  # fmt: skip
        return dict(zip(COLUMNS, values, strict=True))


@cache
def num_parameters(config_json: str) -> int:
    """Of the whole model: the bytes of its weights in bf16, halved; the allocator's rounding adds up to 0.001 %."""
    config = json.loads(config_json)
    return memory_terms(config, RECIPES["blackmamba"], 1, 8)[OPTIMIZER]["trained weights"] // 2


# --- what is asked ---


Named = frozenset[tuple[str, str]] | None  # model and point of what is asked about; None: all


def is_asked_about(model: str, moe_path: str, point: str, named: Named) -> bool:
    """Paths of our own are no matter of the others."""
    return model in MODELS and moe_path == find_family(model).moe_path and (named is None or (model, point) in named)


def point_folders(named: Named) -> Iterator[tuple[str, results.PointFolder]]:
    """Name and content of each that is asked about."""
    for folder in sorted(results.find_point_folders(H200)):
        found = results.read_point(folder)
        name = f"{found.point['kind']} {folder.name}"
        if is_asked_about(found.point["point"]["model"], found.point["moe"], name, named):
            yield name, found


def memory_asks(named: Named = None) -> Iterator[Ask]:
    """The peaks of all point folders: what the allocator gave out, and what it had reserved."""
    for name, found in point_folders(named):
        steps = results.read_arrow(found.path / "steps.arrow", results.STEPS_SCHEMA)
        point, gpu = found.point["point"], found.environment["gpu"]
        memory_gib = gpu["memory_total_bytes"] / GIB
        for quantity, measured in ((PEAK, "peak_allocated_bytes"), (RESERVED, "peak_reserved_bytes")):
            yield Ask(
                model=point["model"],
                point=name,
                quantity=quantity,
                measured=found.outcome[measured],
                config=found.point["model_config"] | {"num_experts_per_tok": point["top_k"]},
                batch_size=point["per_device_batch_size"],
                seq_len_tokens=max(steps["seq_len_tokens"].to_pylist()),
                is_masked=point["seq_len_tokens"] is None,
                device=find_device(gpu["name"], memory_gib),
                memory_gib=memory_gib,
            )


def time_ask(point: TimedPoint) -> Ask:
    """A measured step; of the paper's the batch size is the sweep's."""
    source = f"arXiv 2408.04693 {point.dataset} k{point.top_k} b{point.batch_size}"
    return Ask(
        model=point.model,
        point=f"{source} {point.device.name}" if point.source.startswith("arXiv") else point.source,
        quantity=STEP,
        measured=point.step_s,
        config=point.config,
        batch_size=point.batch_size,
        seq_len_tokens=point.slots / point.batch_size,
        is_masked=True,
        device=point.device,
        memory_gib=point.device.memory_gb,
    )


def found_batch_asks(named: Named = None) -> Iterator[Ask]:
    """The largest batches that were searched for and found on a GPU."""
    for name, found in point_folders(named):
        point, gpu, search = found.point["point"], found.environment["gpu"], found.outcome.get("max_batch")
        if search is None or search["first_oom_batch_size"] is None:
            continue
        memory_gib = gpu["memory_total_bytes"] / GIB
        yield Ask(
            model=point["model"],
            point=name,
            quantity=MAX_BATCH,
            measured=search["batch_size"],
            config=found.point["model_config"] | {"num_experts_per_tok": point["top_k"]},
            batch_size=1,
            seq_len_tokens=search["longest_tokens"],
            is_masked=point["seq_len_tokens"] is None,
            device=find_device(gpu["name"], memory_gib),
            memory_gib=memory_gib,
        )


def max_batch_asks() -> Iterator[Ask]:
    """The paper's largest batches on real GPUs. Where figures disagree the last of the table counts: the sweep's and
    Table IV's, which step times bear out (docs/paper_model.md), not Table III's."""
    found = {}
    for row in paper.rows("max_batch"):
        if row["gpu"] in PAPER_GPUS and row["kind"] not in ("projected", "measured"):
            found[row["model"], row["gpu"], row["dataset"], row["sparsity"]] = row
    for (model, gpu, dataset, sparsity), row in found.items():
        family, (memory_gib, device) = find_family(model), PAPER_GPUS[gpu]
        yield Ask(
            model=model,
            point=f"arXiv 2408.04693 {gpu} {dataset} {sparsity}",
            quantity=MAX_BATCH,
            measured=int(row["max_batch_size"]),
            config=family.config_at(family.full, family.full["num_hidden_layers"], int(row["top_k"])),
            batch_size=1,
            seq_len_tokens=LONGEST_TOKENS[dataset],
            is_masked=dataset != "synthetic",
            device=find_device(*device),
            memory_gib=memory_gib,
        )


# --- tunescope ---


def own_rows(named: Named = None) -> list[Row]:
    """Memory by the formulas as they stand, nothing fitted; steps by models that never saw the point.

    named: of this project's points, those to ask about and to learn from; None: all."""
    rows = []
    for ask in memory_asks(named):
        if ask.quantity == PEAK:
            recipe = RECIPES[ask.model]
            predicted = peak_bytes(ask.config, recipe, ask.batch_size, int(ask.seq_len_tokens), is_masked=ask.is_masked)
            rows.append(Row(OURS, tunescope.__version__, ask, predicted, "nothing fitted"))
        else:
            rows.append(Row(OURS, tunescope.__version__, ask, None, "no answer: reserved memory is not predicted"))
    points = [each for each in read_points(H200) if is_asked_about(each.model, each.moe_path, each.source, named)]
    for held in validation.held_out(points, tuple(_TIME_SPLITS)):
        if held.point.device.name == "NVIDIA H200" or (held.point.model, held.point.device.name) == (
            "mixtral", "NVIDIA A40",
        ):  # fmt: skip
            predicted_s, tool = held.forecast.median_s, _TIME_SPLITS[held.split]
            rows.append(Row(tool, tunescope.__version__, time_ask(held.point), predicted_s, held.split))
    for ask in (*max_batch_asks(), *found_batch_asks(named)):
        is_todays = not ask.point.startswith("arXiv")
        workspace = {} if is_todays else {"workspace_bytes": 16 * MIB}
        for tool, holds_nf4_inputs in ((OURS, False), (OLD_NF4, True)):
            if holds_nf4_inputs and (ask.model != "mixtral" or is_todays):
                continue
            batch_size = max_batch_size(
                ask.config, RECIPES[ask.model], round(ask.memory_gib * GIB), int(ask.seq_len_tokens),
                is_masked=ask.is_masked, holds_nf4_inputs=holds_nf4_inputs, **workspace,
            )  # fmt: skip
            note = "that the study had it was inferred from these points" if holds_nf4_inputs else "today's packages"
            rows.append(Row(tool, tunescope.__version__, ask, batch_size, note))
    return rows


# --- the others ---

VERSION = "import sys; from importlib.metadata import version; print(version(sys.argv[1]))"


def peer_rows(tool: str, asks: Sequence[Ask], pythons: Iterable[str], timeout_s: float) -> list[Row]:
    """A row for each question, whatever becomes of the tool."""
    distribution, code = PEERS[tool]
    for python in pythons:
        done = subprocess.run([python, "-c", VERSION, distribution], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            break
    else:
        return [Row(tool, "", ask, None, "not installed") for ask in asks]
    version = done.stdout.strip()
    try:
        done = subprocess.run(
            [python, "-c", PREAMBLE + code],
            input=json.dumps([ask.to_json() for ask in asks]),
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])},
            capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip
        said = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
    except subprocess.TimeoutExpired:
        return [Row(tool, version, ask, None, f"no answer: none within {timeout_s:g} s") for ask in asks]
    except (json.JSONDecodeError, IndexError):
        said = None
    if said is None:
        reason = (done.stderr.strip().splitlines() or ["it printed no answers"])[-1][:160]
        return [Row(tool, version, ask, None, f"no answer: {reason}") for ask in asks]
    return [Row(tool, version, ask, *answer) for ask, answer in zip(asks, said, strict=True)]


# --- tables ---


def table(cells: Sequence[Mapping[str, str]]) -> str:
    """Markdown, of the CSV's rows: how far each tool is off, by quantity and model."""
    lines = [
        "| quantity | model | tool | answered | median ratio | median abs(ln) | worst abs(ln) |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for quantity in QUANTITIES:
        groups: dict[tuple[str, str], list[str]] = {}
        for row in cells:
            if row["quantity"] == quantity:
                groups.setdefault((row["model"], row["tool"]), []).append(row["ratio"])
        for (model, tool), ratios in sorted(groups.items(), key=lambda group: group[0][0] != "mixtral"):
            known = [float(ratio) for ratio in ratios if ratio]
            logs = [abs(math.log(ratio)) if ratio > 0 else math.inf for ratio in known]
            if known:
                errors = statistics.median(logs), max(logs)
                numbers = " | ".join(
                    [f"{statistics.median(known):.3f}", *(f"{error:.{3 if error >= 0.01 else 5}f}" for error in errors)]
                )
            else:
                numbers = "- | - | -"
            lines.append(f"| {quantity} | {model} | {tool} | {len(known)} of {len(ratios)} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", default=[], help="a Python that has some of the peers; repeatable")
    parser.add_argument("--timeout-s", type=float, default=300.0, help="for each peer (default 300)")
    parser.add_argument("--out", type=Path, help="write the rows to this CSV, in place of what it holds")
    parser.add_argument("--page", type=Path, help="put the table in place of the one in this Markdown file")
    parser.add_argument("--points-of", type=Path, help="a CSV of before: only its points, and fits to no others")
    parser.add_argument("--ours", action="store_true", help="ask tunescope alone; the others' rows are --points-of's")
    options = parser.parse_args()
    if options.ours and options.points_of is None:
        parser.error("--ours needs --points-of, whose rows of the other tools are kept")
    for python in options.python:
        if not shutil.which(python):
            parser.error(f"there is no Python {python}; name one that runs, such as A/bin/python of an environment A")

    before = read_csv(options.points_of) if options.points_of else []
    named = frozenset((row["model"], row["point"]) for row in before) if options.points_of else None
    try:
        rows = own_rows(named)
    except UserError as error:
        raise SystemExit(str(error)) from None
    asks = list({(row.ask.model, row.ask.point, row.ask.quantity): row.ask for row in rows}.values())
    for tool in () if options.ours else PEERS:
        rows += peer_rows(tool, asks, options.python or [sys.executable], options.timeout_s)
    date = datetime.date.today().isoformat()
    cells = [row.cells(date) for row in rows]
    if options.ours:
        cells += [row for row in before if row["tool"] in PEERS]
    if options.out:
        with options.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(cells)
    if options.page:
        text = options.page.read_text(encoding="utf-8")
        options.page.write_text(with_table(text, table(cells)), encoding="utf-8")
    print(table(cells))


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def with_table(page: str, new: str) -> str:
    """The page with another table of this form. Raises SystemExit if it has none."""
    head = new.splitlines()[0]
    if head not in page:
        raise SystemExit(f"the page has no table that begins with {head}")
    before, _, rest = page.partition(head)
    after = rest.partition("\n\n")[2]
    return f"{before}{new}\n\n{after}"


if __name__ == "__main__":
    main()
