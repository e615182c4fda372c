"""This project's own measured steps, packaged as measured_steps.csv; and the command that makes it from point folders:

python -m tunescope.cost.time_packaged docs/results
"""

import csv
import io
import sys
from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from tunescope.cost.time_points import RECIPES, TimedPoint, read_points
from tunescope.errors import UserError
from tunescope.families import find_family
from tunescope.hardware import find_device

FILE = "measured_steps.csv"
COLUMNS = (
    "model", "dataset", "top_k", "num_layers", "batch_size", "moe_path", "device", "host", "stack", "slots",
    "key_slots", "step_s", "error_frac", "num_steps", "source", "optim", "graphs", "num_recomputed", "hit_experts",
)  # fmt: skip


@cache
def own_points() -> tuple[TimedPoint, ...]:
    """Those of measured_steps.csv."""
    text = (files("tunescope.cost") / FILE).read_text(encoding="utf-8")
    return tuple(_point(row) for row in csv.DictReader(io.StringIO(text)))


def to_csv(points: Iterable[TimedPoint]) -> str:
    """Raises UserError for a point whose model or recipe is not that of its family: they are not in the file."""
    rows = [_row(point) for point in points]
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(rows, key=lambda row: [row[name] for name in ("device", "model", "source", "host")]))
    return out.getvalue()


def _row(point: TimedPoint) -> dict[str, Any]:
    row = {
        "model": point.model,
        "dataset": point.dataset,
        "top_k": point.top_k,
        "num_layers": point.config["num_hidden_layers"],
        "batch_size": point.batch_size,
        "moe_path": point.moe_path,
        "device": point.device.name,
        "host": point.host,
        "stack": point.stack,
        "slots": f"{point.slots:.6g}",
        "key_slots": f"{point.key_slots:.6g}",
        "step_s": f"{point.step_s:.6g}",
        "error_frac": f"{point.error_frac:.3g}",
        "num_steps": point.num_steps,
        "source": point.source,
        "optim": point.recipe.get("optim", RECIPES[point.model]["optim"]),
        "graphs": int(point.graphs),
        "num_recomputed": "" if point.num_recomputed is None else point.num_recomputed,
        "hit_experts": "" if point.hit_experts is None else point.hit_experts,
    }
    written, read = point.work(), _point({name: str(value) for name, value in row.items()}).work()
    if abs(written.launches / read.launches - 1) + abs(written.matmul_flop / read.matmul_flop - 1) > 1e-4:
        raise UserError(
            f"{point.source} is not of {point.model}'s own config.json and recipe, so it cannot be packaged"
        )
    return row


def _point(row: dict[str, str]) -> TimedPoint:
    family = find_family(row["model"])
    return TimedPoint(
        model=row["model"],
        dataset=row["dataset"],
        config=family.config_at(family.full, int(row["num_layers"]), int(row["top_k"])),
        recipe=RECIPES[row["model"]] | {"optim": row["optim"]},
        device=find_device(row["device"]),
        host=row["host"],
        stack=row["stack"],
        batch_size=int(row["batch_size"]),
        slots=float(row["slots"]),
        key_slots=float(row["key_slots"]),
        moe_path=row["moe_path"],
        step_s=float(row["step_s"]),
        error_frac=float(row["error_frac"]),
        num_steps=int(row["num_steps"]),
        source=row["source"],
        graphs=row["graphs"] == "1",
        num_recomputed=int(row["num_recomputed"]) if row["num_recomputed"] else None,
        hit_experts=float(row["hit_experts"]) if row["hit_experts"] else None,
    )


if __name__ == "__main__":
    # Straight into the package that runs: from a checkout, its file.
    Path(str(files("tunescope.cost") / FILE)).write_text(to_csv(read_points(Path(sys.argv[1]))), encoding="utf-8")
