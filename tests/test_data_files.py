"""The user's data files: accepted exactly where LLaMA-Factory reads every row of them."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from helpers_points import engine_queries, tiny_workload

from tunescope import dataset_files as files
from tunescope.config import Point
from tunescope.errors import UserError

POINT = Point(
    model="mixtral", dataset="mine", top_k=2, per_device_batch_size=1, preset="tiny", num_layers=2, total_layers=2
)
ALPACA = {"instruction": "w1 w2", "input": "w3", "output": "w4"}


def turns(*roles: str, tags: tuple[str, str] = ("from", "value")) -> list[dict[str, Any]]:
    return [{tags[0]: role, tags[1]: f"w{number}"} for number, role in enumerate(roles)]


def openai(*roles: str) -> list[dict[str, Any]]:
    return turns(*roles, tags=("role", "content"))


GOOD_ROWS: dict[str, list[Any]] = {
    "alpaca": [ALPACA] * 3,
    "alpaca without input": [{"instruction": "w1", "output": "w2"}] * 3,
    "alpaca with input in some rows": [{"instruction": "w1", "output": "w2"}, ALPACA],
    "alpaca with null input": [ALPACA | {"input": None}] * 2,
    "alpaca with empty texts": [ALPACA | {"instruction": "", "input": ""}, ALPACA | {"output": ""}],
    "alpaca with other columns": [ALPACA | {"id": 1, "answer": "w9", "tags": ["a"]}] * 2,
    "alpaca with line separators in texts": [ALPACA | {"output": "w1\u2028w2\x85w3"}] * 2,
    "conversations": [{"conversations": turns("human", "gpt")}] * 3,
    "conversations of many turns": [{"conversations": turns("human", "gpt", "human", "gpt")}] * 2,
    "conversations with a system message": [{"conversations": turns("system", "human", "gpt")}] * 2,
    "conversations with tools": [
        {"conversations": [*turns("human"), {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
                           *turns("observation", "gpt")]}
    ],
    "messages": [{"messages": openai("user", "assistant")}] * 3,
    "messages with a system message": [{"messages": openai("system", "user", "assistant")}] * 3,
}  # fmt: skip

# name -> (rows, what the error must say)
BAD_ROWS: dict[str, tuple[list[Any], str]] = {
    "no answer": ([ALPACA, {"instruction": "w1", "input": ""}], "row 1"),
    "a null answer": ([ALPACA, ALPACA, ALPACA | {"output": None}], "row 2"),
    "a number as answer": ([ALPACA | {"output": 4}], "row 0"),
    "a list as input": ([ALPACA, ALPACA | {"input": ["w3"]}], "row 1"),
    "other columns only": ([{"prompt": "w1", "completion": "w2"}], "first row has"),
    "two types in one column": ([ALPACA | {"id": 1}, ALPACA | {"id": "one"}], "'id'"),
    "no messages": ([{"conversations": turns("human", "gpt")}, {"conversations": []}], "row 1"),
    "a question only": ([{"conversations": turns("human")}], "row 0"),
    "no answer at the end": ([{"conversations": turns("human", "gpt", "human")}], "row 0"),
    "two questions": ([{"conversations": turns("human", "human")}], "row 0"),
    "answer first": ([{"conversations": turns("gpt", "human")}], "row 0"),
    "unknown roles": ([{"conversations": turns("user", "assistant")}], "row 0"),
    "a null text": ([{"conversations": [{"from": "human", "value": None}, *turns("gpt")]}], "row 0"),
    "a system message only": ([{"messages": openai("system")}], "row 0"),
    "messages with roles of the other format": ([{"messages": openai("human", "gpt")}], "row 0"),
    "messages without roles": ([{"messages": turns("user", "assistant")}], "row 0"),
    "messages that are one text": ([{"messages": "w1"}], "row 0"),
}  # fmt: skip


def write(path: Path, rows: list[Any]) -> Path:
    as_lines = path.suffix == ".jsonl"
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) if as_lines else json.dumps(rows)
    path.write_text(text, encoding="utf-8")
    return path


def read_by_engine(description: dict[str, Any], scratch_dir: Path) -> int:
    """How many queries the engine keeps."""
    workload = tiny_workload(POINT, data_entry=description, num_samples=1000)
    return len(engine_queries(workload, scratch_dir))


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("name", GOOD_ROWS)
def test_what_is_accepted_is_read_whole_by_the_engine(name: str, suffix: str, tmp_path: Path) -> None:
    file = write(tmp_path / f"data{suffix}", GOOD_ROWS[name])
    assert read_by_engine(files.check_dataset_file(file).entry, tmp_path / "scratch") == len(GOOD_ROWS[name])


@pytest.mark.parametrize("name", BAD_ROWS)
def test_what_is_refused_names_the_row(name: str, tmp_path: Path) -> None:
    rows, wanted = BAD_ROWS[name]
    file = write(tmp_path / "data.json", rows)
    with pytest.raises(UserError) as refusal:
        files.check_dataset_file(file)
    assert wanted in str(refusal.value)
    assert str(file) in str(refusal.value)


@pytest.mark.parametrize("name", BAD_ROWS)
def test_what_is_refused_would_fail_or_shrink_in_the_engine(name: str, tmp_path: Path) -> None:
    """Nothing is refused that the engine would have read: rows are dropped, or it raises."""
    rows, _ = BAD_ROWS[name]
    file = write(tmp_path / "data.json", rows)
    column = next((column for column in ("conversations", "messages") if column in rows[0]), None)
    description: dict[str, Any] = {"file_name": str(file)}
    if column is None:
        description["columns"] = {"prompt": "instruction", "response": "output", "query": "input"}
    else:
        description |= {"formatting": "sharegpt", "columns": {"messages": column}, "tags": files._SHAREGPT[column]}
    logging.disable(logging.CRITICAL)
    try:
        kept = read_by_engine(description, tmp_path / "scratch")
    except Exception:
        return
    finally:
        logging.disable(logging.NOTSET)
    assert kept < len(rows)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data.json", b""),
        ("data.json", b"[]"),
        ("data.json", b"[1, 2]"),
        ("data.json", b"{}"),
        ("data.json", b'[{"instruction": "a"'),
        ("data.json", b"\xff\xfe\x00"),
        ("data.json", b"[" * 100_000),
        ("data.jsonl", b'{"instruction": "a", "output": "b"}\nnot json\n'),
        ("data.txt", b'[{"instruction": "a", "output": "b"}]'),
        ("data", b'[{"instruction": "a", "output": "b"}]'),
        ("data.csv", b"instruction,output\na,b\n"),
    ],
)
def test_a_file_that_is_no_data_file_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError):
        files.check_dataset_file(tmp_path / name)


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    for path in (tmp_path / "none.json", tmp_path / "folder.json"):
        with pytest.raises(UserError, match=path.name):
            files.check_dataset_file(path)


def test_lines_are_read_under_either_suffix(tmp_path: Path) -> None:
    file = write(tmp_path / "data.jsonl", [ALPACA] * 2).rename(tmp_path / "data.json")
    assert read_by_engine(files.check_dataset_file(file).entry, tmp_path / "scratch") == 2
    listed = write(tmp_path / "list.json", [ALPACA] * 2).rename(tmp_path / "list.jsonl")
    assert read_by_engine(files.check_dataset_file(listed).entry, tmp_path / "scratch2") == 2


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("commonsense_15k.json", "cs"),
        ("math_14k.json", "math"),
        ("commonsense_15k.jsonl", "commonsense_15k"),
        ("My Data-v2.json", "my_data_v2"),
        ("été.json", "t"),
        ("数据.json", "data"),
        ("a.b.jsonl", "a.b"),
        ("__x__.json", "x"),
        ("...json", "data"),
        ("9.json", "9"),
    ],
)
def test_name_of_a_file_in_points(file: str, name: str) -> None:
    assert files.dataset_name(Path("/somewhere") / file) == name
    assert Point(model="mixtral", dataset=name, top_k=2, per_device_batch_size=1).dataset == name
