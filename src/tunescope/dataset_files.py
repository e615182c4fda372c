"""The user's own data files: checked against LLaMA-Factory's formats before a run, and described to it. No torch."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from tunescope.errors import UserError

# The files of the study, by the name the point gives the data set.
REAL_FILES = {"cs": "commonsense_15k.json", "math": "math_14k.json"}
DATASET_INFO = "dataset_info.json"

FORMATS_CURE = (
    "write a JSON list (or JSON lines) of objects with 'instruction' and 'output' (alpaca), "
    "or with 'conversations' / 'messages' (sharegpt)"
)
_ALPACA = {"instruction", "output"}
# Column of the messages -> its tags, every one: the engine takes a tag that is not given for none, and then drops
# every row.
_SHAREGPT = {
    "conversations": {
        "role_tag": "from",
        "content_tag": "value",
        "user_tag": "human",
        "assistant_tag": "gpt",
        "observation_tag": "observation",
        "function_tag": "function_call",
        "system_tag": "system",
    },
    "messages": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
    },
}
_SUFFIXES = (".json", ".jsonl")  # the engine goes by them


def dataset_name(path: Path) -> str:
    """The name a file gets in points and tables: `cs`, `math` for the study's files, else its own stem."""
    for name, file in REAL_FILES.items():
        if path.name == file:
            return name
    return re.sub(r"[^a-z0-9_.]+", "_", path.stem.lower()).strip("_.") or "data"


@dataclass(frozen=True)
class DataFile:
    """A checked file. entry: its description in LLaMA-Factory's dataset_info.json."""

    entry: dict[str, Any]
    num_queries: int


def check_dataset_file(path: Path) -> DataFile:
    """What LLaMA-Factory must be told of a data file, from what is in it. See read_dataset_file."""
    return read_dataset_file(path)[0]


def read_dataset_file(path: Path) -> tuple[DataFile, list[dict[str, Any]]]:
    """A data file's description and its rows.

    Every row is checked, so that a run does not die on row 10,000, and no row that the engine would drop with a
    warning shrinks the data set unseen. Raises UserError naming file, row (from 0) and cure.
    """
    rows = load_rows(path)
    first = rows[0]
    if first.keys() >= _ALPACA:
        _check_alpaca(path, rows)
        _check_columns(path, rows)
        columns = {"prompt": "instruction", "response": "output"}
        if any("input" in row for row in rows):
            columns["query"] = "input"
        return DataFile({"file_name": str(path.resolve()), "columns": columns}, len(rows)), rows
    for column, tags in _SHAREGPT.items():
        if column in first:
            _check_messages(path, rows, column, tags)
            _check_columns(path, rows)
            entry = {
                "file_name": str(path.resolve()),
                "formatting": "sharegpt",
                "columns": {"messages": column},
                "tags": tags,
            }
            return DataFile(entry, len(rows)), rows
    raise UserError(
        f"{path} is not in a format of LLaMA-Factory: its first row has {sorted(first)}",
        cure=FORMATS_CURE,
    )


def load_rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix not in _SUFFIXES:
        raise UserError(f"{path} does not end in {' or '.join(_SUFFIXES)}", cure=FORMATS_CURE)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"there is no data file {path}", cure="check the path, as it was given") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}", cure=FORMATS_CURE) from None
    try:
        rows = _parse(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}", cure=FORMATS_CURE) from None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} is not a list of at least one object", cure=FORMATS_CURE)
    return rows


def _parse(text: str) -> Any:
    """One JSON list, or a JSON object a line; the engine takes either under either suffix."""
    if text.lstrip().startswith("["):
        return json.loads(text)
    return [json.loads(line) for line in text.split("\n") if line.strip()]  # not splitlines: U+2028 may stand in a text


def _check_alpaca(path: Path, rows: list[dict[str, Any]]) -> None:
    for number, row in enumerate(rows):
        if not all(isinstance(row.get(key), str) for key in _ALPACA):
            raise UserError(f"{path}: row {number} has no text in 'instruction' and 'output'", cure=FORMATS_CURE)
        if not isinstance(row.get("input") or "", str):
            raise UserError(f"{path}: row {number} has an 'input' that is not text", cure=FORMATS_CURE)


def _check_messages(path: Path, rows: list[dict[str, Any]], column: str, tags: dict[str, str]) -> None:
    role, content = tags["role_tag"], tags["content_tag"]
    for number, row in enumerate(rows):
        messages = row.get(column)
        if not isinstance(messages, list) or not all(
            isinstance(message, dict) and isinstance(message.get(role), str) and isinstance(message.get(content), str)
            for message in messages
        ):
            raise UserError(
                f"{path}: row {number} has no list of {{'{role}', '{content}'}} with text in '{column}'",
                cure=FORMATS_CURE,
            )
        roles = [message[role] for message in messages]
        turns = roles[1:] if roles[:1] == [tags["system_tag"]] else roles
        asking = {tags["user_tag"], tags.get("observation_tag")}
        answering = {tags["assistant_tag"], tags.get("function_tag")}
        if not turns or len(turns) % 2 or not (set(turns[::2]) <= asking and set(turns[1::2]) <= answering):
            raise UserError(
                f"{path}: row {number} has the roles {', '.join(roles) or 'of nobody'} in '{column}'",
                cause="the engine drops a row whose turns do not alternate, or that does not end in an answer",
                cure=f"let {tags['user_tag']} and {tags['assistant_tag']} alternate, after at most one system message",
            )


def _check_columns(path: Path, rows: list[dict[str, Any]]) -> None:
    """The engine reads a file into typed columns, those it does not use as well."""
    for column in sorted({key for row in rows for key in row}):
        try:
            pa.array([row.get(column) for row in rows])
        except UnicodeEncodeError as error:
            raise UserError(
                f"{path} holds half a character: {error.reason}",
                cause=r"an escape as \ud83d stands alone, without its second half",
                cure="write the text again as UTF-8, leaving such escapes out",
            ) from None
        except (pa.ArrowException, OverflowError) as error:
            raise UserError(
                f"{path}: column {column!r} holds values of several types: {str(error).splitlines()[0]}",
                cure="give every row the same type in it, or leave the column out if it is not needed",
            ) from None


def sha256_hex(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
