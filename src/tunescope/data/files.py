"""The user's own data files: checked against LLaMA-Factory's formats before a run, and described to it. No torch."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from tunescope.errors import UserError

# The files of the study, by the name the point gives the data set.
REAL_FILES = {"cs": "commonsense_15k.json", "math": "math_14k.json"}
DATASET_INFO = "dataset_info.json"

_FORMATS_CURE = (
    "write a JSON list (or JSON lines) of objects with 'instruction' and 'output' (alpaca), "
    "or with 'conversations' / 'messages' (sharegpt)"
)
_ALPACA = {"instruction", "output"}
_SHAREGPT = {"conversations": ("from", "value"), "messages": ("role", "content")}


def dataset_name(path: Path) -> str:
    """The name a file gets in points and tables: `cs`, `math` for the study's files, else its own stem."""
    for name, file in REAL_FILES.items():
        if path.name == file:
            return name
    return re.sub(r"[^a-z0-9_.]+", "_", path.stem.lower()).strip("_.") or "data"


def check_dataset_file(path: Path) -> dict[str, Any]:
    """LLaMA-Factory's description (`dataset_info.json` entry) of a data file, from what is in it.

    Every row is checked, so that a run does not die on row 10,000. Raises UserError naming file, row and cure.
    """
    rows = _load_rows(path)
    first = rows[0]
    if first.keys() >= _ALPACA:
        for number, row in enumerate(rows):
            if not all(isinstance(row.get(key), str) for key in _ALPACA):
                raise UserError(
                    f"{path}: row {number} has no text in 'instruction' and 'output'",
                    cure=_FORMATS_CURE,
                )
        return {"file_name": str(path.resolve())}
    for column, (role, content) in _SHAREGPT.items():
        if column in first:
            _check_messages(path, rows, column, role, content)
            tags = {"role_tag": role, "content_tag": content}
            if column == "messages":
                tags |= {"user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}
            return {
                "file_name": str(path.resolve()),
                "formatting": "sharegpt",
                "columns": {"messages": column},
                "tags": tags,
            }
    raise UserError(
        f"{path} is not in a format of LLaMA-Factory: its first row has {sorted(first)}",
        cure=_FORMATS_CURE,
    )


def _load_rows(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"there is no data file {path}", cure="check the path given with --dataset") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}", cure=_FORMATS_CURE) from None
    try:
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}", cure=_FORMATS_CURE) from None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} is not a list of at least one object", cure=_FORMATS_CURE)
    return rows


def _check_messages(path: Path, rows: list[dict[str, Any]], column: str, role: str, content: str) -> None:
    for number, row in enumerate(rows):
        messages = row.get(column)
        good = (
            isinstance(messages, list)
            and len(messages) >= 2
            and all(isinstance(message, dict) and {role, content} <= message.keys() for message in messages)
        )
        if not good:
            raise UserError(
                f"{path}: row {number} has no list of two or more {{'{role}', '{content}'}} in '{column}'",
                cure=_FORMATS_CURE,
            )


def sha256_hex(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
