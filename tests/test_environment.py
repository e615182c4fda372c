"""Provenance: what a row says of the code and the machine must be true."""

import subprocess
from pathlib import Path

import pytest
import torch

from tunescope.measure import environment
from tunescope.measure.start import is_out_of_memory


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def outer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit, and the project's module as if it lay in `copy/` below it."""
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "x")
    monkeypatch.delenv("TUNESCOPE_REVISION", raising=False)
    return tmp_path


def pretend_in(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "__file__", str(root / "src" / "tunescope" / "measure" / "environment.py"))


def test_a_checkout_names_its_commit_and_its_changes(outer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_in(outer, monkeypatch)
    head = git(outer, "rev-parse", "HEAD")
    assert environment.git_revision() == head
    (outer / "file").write_text("1")
    git(outer, "add", "file")
    assert environment.git_revision() == head + "+changes"


def test_a_copy_inside_another_repository_never_claims_its_commit(outer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_in(outer / "copy", monkeypatch)
    (outer / "copy").mkdir()
    assert environment.git_revision() is None
    monkeypatch.setenv("TUNESCOPE_REVISION", "8c4f0b8")
    assert environment.git_revision() == "8c4f0b8 (stated)"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of range"), False),
    ],
)
def test_every_way_to_run_out_of_memory_is_told_from_other_errors(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
