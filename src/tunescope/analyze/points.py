"""Point folders as rows: which are there, what each says of itself, and what becomes of one that cannot be read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from tunescope import results
from tunescope.config import Point
from tunescope.errors import UserError
from tunescope.families import find_family
from tunescope.hardware import GIB

UNREADABLE = "unreadable"
# In place of a preset, and of weights and data, for steps of somebody's own Trainer.
ATTACHED, OWN = "attached", "own"

Row = dict[str, Any]


def point_folders(folder: Path, launcher: str) -> list[Path]:
    """Every finished point at or below `folder`. Raises UserError, naming the launcher to run, if there is none."""
    if not folder.is_dir():
        raise UserError(
            f"there is no folder {folder}",
            cause="the path is mistyped, or nothing has been measured yet",
            cure=f"run {launcher}; it ends by printing the folder to give here",
        )
    found = list(results.find_point_folders(folder))
    if not found:
        unfinished = len(results.find_unfinished(folder))
        raise UserError(
            f"{folder} holds no measured point",
            cause=f"{unfinished} were begun and not finished" if unfinished else "it is empty, or not a results folder",
            cure=f"run {launcher}; it ends by printing the folder to give here",
        )
    return found


def read_row(path: Path, kind: str, row_of: Callable[[results.PointFolder], Row]) -> Row:
    """What `row_of` makes of one point; if that fails for what is in the folder, a row with status `unreadable`."""
    try:
        found = results.read_point(path)
        if found.point.get("kind") != kind:
            raise results.PointFormatError(
                f"{path} holds a point of kind {found.point.get('kind')!r}, not {kind}", cure="use that figure's parser"
            )
        return row_of(found)
    except results.PointFormatError as error:
        return _unreadable(path, f"{error.what}. {error.cause}".strip())
    except (UserError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        # Its files are whole but lack what this version wrote into every one of them.
        return _unreadable(path, f"{path} is not a point of this program ({type(error).__name__}: {error})")


def rows_and_frames(
    folder: Path, launcher: str, kind: str, row_of: Callable[[results.PointFolder], Row], frame: str
) -> tuple[list[Row], list[pd.DataFrame]]:
    """`row_of` each point at or below `folder`, and what it put under the key `frame`, where it did."""
    rows = [read_row(path, kind, row_of) for path in point_folders(folder, launcher)]
    frames = [row.pop(frame) for row in rows if frame in row]
    return rows, frames


def _unreadable(path: Path, cause: str) -> Row:
    return {"status": UNREADABLE, "cause": cause, "point_id": path.name, "folder": str(path)}


def check_cells(row: Row, apart: tuple[str, ...] = ()) -> Row:
    """The row, if every cell but those in `apart` is text or a number that a table can hold. Raises TypeError."""
    for name, value in row.items():
        is_number = isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)
        if not (value is None or isinstance(value, str) or is_number or name in apart):
            raise TypeError(f"{name} is {str(value)[:80]}")
        if isinstance(value, str):
            value.encode()  # half a character would end the printing of the whole table
    return row


def identity(found: results.PointFolder) -> Row:
    """What a point's folder says of itself: the bar, the machine, the provenance, how it ended."""
    gpu = found.environment.get("gpu") or {}
    nvml = gpu.get("nvml") or {}
    row = {
        **(_own_trainer(found.point["attached"]) if "attached" in found.point else _launched(found.point)),
        "device": found.environment["device"],
        "driver": nvml.get("driver_version"),
        "power_limit_w": nvml.get("power_limit_w"),
        "torch": found.environment["packages"].get("torch"),
        "git_revision": found.environment.get("git_revision"),
        "recipe_hash": found.point["recipe_hash"],
        "setup_hash": _setup_hash(found.point, found.environment),
        "point_id": found.point["point_id"],
        "folder": str(found.path),
    }
    for key in ("status", "cause", "tokenizer", "clock", "compute_dtype", "attention"):
        row[key] = found.outcome.get(key)
    for key in ("peak_allocated", "peak_reserved"):
        num_bytes = found.outcome.get(f"{key}_bytes")
        row[f"{key}_gib"] = None if num_bytes is None else num_bytes / GIB
    return row


def _launched(content: dict[str, Any]) -> Row:
    """Of a point that a launcher ran."""
    point = Point(**content["point"])
    family = find_family(point.model)
    return {
        **point.to_json(),
        "sparsity": point.sparsity,
        "num_experts": content["model_config"][family.experts_key],
        "weights": content["weights"]["kind"],
        "data": content["data"]["kind"],
        "moe": content["moe"],
        "recompute_frac": recompute_frac(content),
        "cuda_graphs": bool(content.get("graphs")),
        "scan": content["model_config"].get("scan"),
        "is_papers_model": family.is_papers_model(content["model_config"], point.total_layers),
    }


def recompute_frac(content: dict[str, Any]) -> float:
    """The share of a point's decoder layers whose forward is run again in backward. content: its point.json."""
    if content["recipe"].get("disable_gradient_checkpointing", False):
        return 0.0
    layers = content.get("checkpointed_layers")
    return 1.0 if layers is None else len(layers) / int(content["model_config"]["num_hidden_layers"])


def _own_trainer(attached: dict[str, Any]) -> Row:
    """Of somebody's own Trainer, which StepProfiler watched: its model and data are theirs."""
    return {
        "model": attached["model_class"],
        "dataset": attached["name"],
        "sparsity": "-",
        "top_k": None,
        "num_experts": None,
        "per_device_batch_size": attached["per_device_train_batch_size"],
        "seq_len_tokens": None,
        "preset": ATTACHED,
        "num_layers": attached["num_layers"],
        "total_layers": attached["num_layers"],
        "weights": OWN,
        "data": OWN,
        "moe": OWN,
        "recompute_frac": None,
        "cuda_graphs": None,
        "scan": None,
        "is_papers_model": False,
    }


def _setup_hash(point: dict[str, Any], environment: dict[str, Any]) -> str:
    """The same for points that differ only in their bar, their depth or how long they were measured.

    The machine is part of it: one GPU beside two CPUs took 1.4 and 2.2 s for the same step (docs/LOG.md).
    """
    nvml = (environment.get("gpu") or {}).get("nvml") or {}
    setup: dict[str, Any] = {
        **{key: point.get(key) for key in ("recipe", "weights", "data", "moe", "stack", "speed_settings", "use_cpu")},
        # Of points that are older than these settings the digest stays what it was.
        **{key: point[key] for key in ("checkpointed_layers", "graphs") if key in point},
        **{key: environment.get(key) for key in ("cpu", "cpu_cores", "python", "git_revision")},
        **{key: nvml.get(key) for key in ("driver_version", "power_limit_w")},
    }
    return results.digest(setup)
