"""Fixtures shared by several test files."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import helpers_latency
import launching
import pytest
import torch

# Before any test imports a kernel: without a GPU, Triton's interpreter runs it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For a module of tests that train: two threads on two busy cores wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def recorded_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with CS_SPARSE and CS_DENSE as a launcher left them. Not to be changed: see `recorded`.

    It ran in a folder of files with the names of modules, none of which may be what is imported.
    """
    folder = tmp_path_factory.mktemp("recorded")
    for name in ("torch.py", "tunescope.py", "json.py", "typer.py", "datasets.py"):
        (folder / name).write_text("raise SystemExit('the wrong file was imported')")
    done = launching.measure(folder / "throughput", "cs:sparse:bs=1 cs:dense:bs=1", cwd=folder)
    assert done.code == 0, done.err
    return folder / "throughput"


@pytest.fixture
def recorded(recorded_once: Path, tmp_path: Path) -> Path:
    """A copy of `recorded_once`, the test's own to spoil."""
    return shutil.copytree(recorded_once, tmp_path / "throughput")


@pytest.fixture(scope="session")
def latency_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with RANDOM_SPARSE and RANDOM_DENSE of helpers_latency, as `./mixtral_lt.sh` left it.

    Few steps each. Not to be changed: see `latency`.
    """
    folder = tmp_path_factory.mktemp("breakdowns") / "latency"
    done = helpers_latency.measure(folder, "random:sparse:bs=1:seq=128 random:dense:bs=1:seq=128")
    assert done.code == 0, done.err
    return folder


@pytest.fixture
def latency(latency_once: Path, tmp_path: Path) -> Path:
    """A copy of `latency_once`, the test's own to spoil."""
    return shutil.copytree(latency_once, tmp_path / "latency")
