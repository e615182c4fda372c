"""Imports point one way (DESIGN.md), and the reading and launching sides start without torch."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import tunescope

PACKAGE = Path(tunescope.__file__).parent
BASE = {
    "config", "hardware", "gpus", "checkpoints", "results", "latency_files", "expert_tokens", "locking", "errors",
    "flops", "paper", "families", "presets", "dataset_files", "ncu",
}  # fmt: skip
# A -> what A may import besides itself, as written in DESIGN.md: only direct arrows, and what they lead to.
MAY_IMPORT = {
    "base": set(),
    "kernels": {"base"},
    "models": {"kernels", "base"},
    "data": {"base"},
    "train": {"models", "kernels", "data", "base"},
    "measure": {"train", "models", "kernels", "data", "base"},
    "analyze": {"base"},
    "cost": {"base"},
    "report": {"analyze", "cost", "base"},
}
# The ends of the arrows: commands. They may import every part; none of the parts may import them.
COMMANDS = {"accelerate", "cli", "cli_tables", "__main__", "doctor", "download", "_bootstrap", "_environment", "_venv"}
ROOT = "tunescope"  # the package itself: a version, no code
TORCH_FREE = BASE | {"analyze", "cost", "report"}
HEAVY = ("torch", "transformers", "llamafactory", "bitsandbytes", "datasets", "peft", "trl", "accelerate")


def part_of(module: str) -> str:
    """`tunescope.train.recipe` -> `train`; base modules -> `base`; the package itself -> ROOT."""
    name = module.split(".")[1] if "." in module else ROOT
    return "base" if name in BASE else name


def module_name(file: Path) -> str:
    parts = ("tunescope", *file.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(part for part in parts if part != "__init__")


@cache
def imports_by_module() -> dict[str, set[str]]:
    """Module -> full names it imports anywhere in its code, functions included."""
    return {module_name(file): imports_of(file) for file in PACKAGE.rglob("*.py")}


def imports_of(file: Path) -> set[str]:
    found = set()
    package = ("tunescope", *file.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            origin = ".".join(filter(None, (base, node.module)))
            # `from tunescope import paper` imports the module tunescope.paper.
            found |= {f"{origin}.{alias.name}" for alias in node.names} if origin == "tunescope" else {origin}
    return found


def test_every_module_belongs_to_a_known_part() -> None:
    parts = {part_of(module) for module in imports_by_module()}
    assert parts <= set(MAY_IMPORT) | COMMANDS | {ROOT}
    assert {"base", "models", "data", "train", "measure", "analyze", "report"} <= parts


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_follow_the_arrows(part: str) -> None:
    wrong = [
        f"{module} imports {name}"
        for module, names in imports_by_module().items()
        if part_of(module) == part
        for name in names
        if name.split(".")[0] == "tunescope"
        and part_of(name) not in MAY_IMPORT[part] | {part}
        # `from tunescope import __version__` and `import tunescope` reach the package itself.
        and name not in ("tunescope", "tunescope.__version__")
    ]
    assert not wrong


def test_the_two_sides_and_the_engine_stay_apart() -> None:
    for module, names in imports_by_module().items():
        parts = {part_of(name) for name in names if name.startswith("tunescope.")}
        if part_of(module) in ("analyze", "report"):
            assert "measure" not in parts, module
            assert "train" not in parts, module
        if part_of(module) == "measure":
            assert not parts & {"analyze", "report"}, module
        if part_of(module) == "train":
            assert "measure" not in parts, module


@pytest.mark.parametrize("part", sorted(TORCH_FREE))
def test_reading_code_names_no_heavy_package_even_inside_functions(part: str) -> None:
    for module, names in imports_by_module().items():
        if module.split(".")[1:2] == [part]:
            assert not {name.split(".")[0] for name in names} & set(HEAVY), module


@pytest.mark.parametrize(
    "module",
    [
        "tunescope.report.throughput",
        "tunescope.report.latency",
        "tunescope.analyze.throughput",
        "tunescope.analyze.latency_tables",
        "tunescope.report.paper_model",
        "tunescope.cost.lengths",
        "tunescope.cost.padding",
        "tunescope.cost.prices",
        "tunescope.cost.estimate_table",
        "tunescope.report.estimate",
        "tunescope.report.validation",
        "tunescope.report.kernels",
        "tunescope.measure.sweep",
        "tunescope.measure.plan",
        "tunescope",
        "tunescope.accelerate",
        "tunescope.cli",
        "tunescope.doctor",
        "tunescope.download",
    ],
)
def test_importing_leaves_torch_out(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({set(HEAVY)!r} & set(sys.modules)))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert loaded.stdout.split() == []


def test_importing_every_base_module_leaves_torch_out() -> None:
    names = [f"tunescope.{name}" for name in sorted(BASE)]
    code = f"import sys, {', '.join(names)}; print(*sorted({set(HEAVY)!r} & set(sys.modules)))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert loaded.stdout.split() == []
