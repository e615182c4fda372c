"""requirements.lock against the files it was compiled from."""

import re

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tunescope import _venv
from tunescope._environment import NEEDS, REPO, requirement_lines

LOCK = (REPO / "requirements.lock").read_text(encoding="utf-8")
# "numpy==2.4.6 ; marker \" and the indented lines under it
BLOCKS = re.findall(r"^([a-z0-9-]+)==(\S+)((?:.*\n)(?:    .*\n)*)", LOCK, re.MULTILINE)


@pytest.mark.parametrize("name", ["requirements.txt", "requirements/dev.txt"])
def test_every_requirement_is_satisfied_by_the_lock(name: str) -> None:
    versions: dict[str, list[str]] = {}
    for package, version, _ in BLOCKS:
        versions.setdefault(package, []).append(version)
    for _, line in requirement_lines(name):
        requirement = Requirement(line)
        locked = versions.get(canonicalize_name(requirement.name), [])
        assert locked, f"{line} is not in the lock"
        assert all(requirement.specifier.contains(version) for version in locked), (line, locked)


def test_every_locked_package_has_a_hash() -> None:
    assert len(BLOCKS) > 100
    assert len(BLOCKS) == len(re.findall(r"^[^\s#]", LOCK, re.MULTILINE)), "a line of another form"
    assert [name for name, _, rest in BLOCKS if "--hash=sha256:" not in rest] == []


def test_the_lock_names_no_address() -> None:
    assert re.findall(r".*(?:https?:|file:|--(?:extra-)?index-url|--find-links| @ ).*", LOCK) == []


def test_measuring_is_pinned_exactly() -> None:
    """A number depends on these versions; a range would let two users measure different things."""
    for name in ("requirements/train.txt", "requirements/dev.txt"):
        assert [line for _, line in requirement_lines(name) if "==" not in line] == []


def test_a_part_of_the_lock_is_closed_and_no_larger_than_its_need() -> None:
    """What `pip install --require-hashes` of the part would miss or waste."""
    parts = {need: set(re.findall(r"^([a-z0-9-]+)==", text, re.MULTILINE)) for need, text in lock_parts()}
    assert {"pandas", "numpy", "packaging", "typer"} <= parts["base"]
    assert parts["base"].isdisjoint({"torch", "transformers", "huggingface-hub", "pytest"})
    assert parts["download"] >= parts["base"] | {"huggingface-hub", "requests"}
    assert "torch" not in parts["download"]
    assert parts["train"] >= parts["download"] | {"torch", "llamafactory", "nvidia-nccl-cu13"}
    assert parts["train"].isdisjoint({"pytest", "mypy"})
    assert parts["dev"] == {name for name, _, _ in BLOCKS}


def lock_parts() -> list[tuple[str, str]]:
    return [(name, _venv.locked_subset(need)) for name, need in NEEDS.items()]
