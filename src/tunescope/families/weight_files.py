"""What a model folder's safetensors files hold, by their headers: nothing of the weights is read. No torch.

A header is 8 bytes with its length, then JSON: name -> dtype, shape and place of each tensor behind it.
"""

import json
import struct
from pathlib import Path
from typing import Any

from tunescope.checkpoints import WEIGHT_FILES, WEIGHT_INDEXES, read_json
from tunescope.errors import UserError
from tunescope.families.family import Family

INDEX, SINGLE_FILE = WEIGHT_INDEXES[0], WEIGHT_FILES[0]  # of safetensors
_LENGTH = struct.Struct("<Q")
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_BASE = "model."  # begins the names of a causal language model's parameters; its base model alone leaves it out
NUM_SHOWN = 3  # of the parameters that an error names


def check_weight_files(folder: Path, family: Family | None, config: dict[str, Any]) -> None:
    """Raises UserError for a file that is cut short, and for weights that are not those of config.

    What is missing transformers would replace by random numbers. More layers than config has are no fault. A folder
    without safetensors passes, and so does a model whose shapes the family or config do not tell.
    """
    if family is None or family.parameter_shapes is None:
        return
    shapes: dict[str, tuple[int, ...]] = {}
    for file in _files(folder):
        found = _shapes(file)
        shapes |= {name if name.startswith((_BASE, "lm_head.")) else _BASE + name: found[name] for name in found}
    if not shapes:
        return
    try:
        wanted = family.parameter_shapes(config)
    except (KeyError, TypeError):  # a size is left to its default, or is none
        return
    faults = [name for name in wanted if name not in shapes]
    what = "lack"
    if not faults:
        faults = [f"{name} ({shapes[name]}, not {shape})" for name, shape in wanted.items() if shapes[name] != shape]
        what = "have other shapes for"
    if faults:
        shown = ", ".join(faults[:NUM_SHOWN]) + (", ..." if len(faults) > NUM_SHOWN else "")
        raise UserError(
            f"The weights in {folder} {what} {len(faults)} of {len(wanted)} parameters: {shown}.",
            cause="config.json is of another model than the weights, or was changed.",
            cure="take both from one place; a folder with a config.json alone gets random weights.",
        )


def _files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        return sorted({folder / name for name in read_json(folder / INDEX)["weight_map"].values()})
    return [folder / SINGLE_FILE] if (folder / SINGLE_FILE).is_file() else []


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with file.open("rb") as opened:
            (num_bytes,) = _LENGTH.unpack(opened.read(_LENGTH.size))
            header = json.loads(opened.read(min(num_bytes, _MAX_HEADER_BYTES)))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = _LENGTH.size + num_bytes + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        if file.stat().st_size == end:
            return {name: tuple(entry["shape"]) for name, entry in tensors.items()}
    except (struct.error, ValueError, AttributeError, KeyError, TypeError, IndexError):
        pass
    raise UserError(
        f"{file} is cut short, or is no safetensors file.",
        cause="the download or the copy of this model did not finish.",
        cure="fetch or copy it again.",
    )
