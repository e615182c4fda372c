"""The commands of the original README, as they stand there, in a clone of what git has of this tree."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launching import REPO, Finished, assert_one_clear_paragraph, run

from tunescope.paper import figure8_order

# As `sitecustomize` of a run: whatever imports one of these ends in a traceback.
NO_TRAINING_STACK = """
import sys
class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "llamafactory", "datasets", "peft", "trl"):
            raise AssertionError(f"{name} is imported")
sys.meta_path.insert(0, Forbidden())
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user's clone holds, in a folder whose name has a space."""
    root = tmp_path_factory.mktemp("clones") / "a clone"
    listed = ["git", "-C", str(REPO), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and os.path.lexists(REPO / name):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPO / name, root / name, follow_symlinks=False)
    return root


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PYTHONPATH under which nothing of the training stack can be imported."""
    folder = tmp_path_factory.mktemp("without_torch")
    (folder / "sitecustomize.py").write_text(NO_TRAINING_STACK)
    assert "torch is imported" in run(sys.executable, "-c", "import torch", PYTHONPATH=str(folder)).err
    return str(folder)


def command(line: str, cwd: Path, **changes: str) -> Finished:
    """One line of a shell, as a user would type it in `cwd`; `python3` is this Python."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return run("bash", "-c", line, cwd=cwd, **{"PYTHONPATH": "", "PATH": path, **changes})


def bars(text: str) -> list[list[str]]:
    """Data set, sparsity, batch and status of each row of the table."""
    return [line.split()[:4] for line in text.splitlines() if re.match(r"(cs|math) +\w+ +\d+ ", line)]


FIGURE_8 = [
    [dataset, "dense" if top_k == 8 else "sparse", str(batch), "ok"]
    for dataset, top_k, batch in figure8_order("mixtral")
]


def test_the_readmes_commands_give_the_figure_and_a_second_run_only_skips(clone: Path, without_torch: str) -> None:
    inside = clone / "LLaMA-Factory"
    measured = command("./mixtral_tp.sh", inside)
    assert measured.code == 0, measured.err
    assert "[8/8]" in measured.err
    told = measured.out.strip().splitlines()[-1]
    assert told.startswith("Table: python3 throughput.py ")

    # From either folder, by the README's words or by the launcher's own.
    table = f"{told.removeprefix('Table: ')} > told.txt"
    assert command(table, inside, PYTHONPATH=without_torch).code == 0
    readme = "python3 throughput.py ./profile_data/mixtral/throughput > mixtral_throughput.txt"
    for folder in (inside, clone):
        done = command(readme, folder, PYTHONPATH=without_torch)
        assert (done.code, done.out, done.err) == (0, "", "")
        text = (folder / "mixtral_throughput.txt").read_text()
        assert bars(text) == FIGURE_8
        assert len(FIGURE_8) == 8
        assert text == (inside / "told.txt").read_text()

    names = {path.name for path in (clone / "profile_data/mixtral/throughput").iterdir()}
    for folder in (inside, clone):
        again = command("./mixtral_tp.sh", folder, PYTHONPATH=without_torch)
        assert again.code == 0, again.err
        assert "8 of 8 points are measured already and are skipped" in again.err
    assert {path.name for path in (clone / "profile_data/mixtral/throughput").iterdir()} == names


def test_nothing_that_a_run_leaves_is_offered_for_a_commit(clone: Path) -> None:
    """Results, tables and caches are the user's."""
    done = command("git init -q && git add -A && git ls-files", clone)
    assert "profile_data/README.md" in done.out.splitlines()
    kept = {
        Path(name).name for name in done.out.splitlines() if not name.startswith(("docs/results/", "tests/fixtures/"))
    }
    assert not kept & {"mixtral_throughput.txt", "point.json", "steps.arrow", ".lock"}
    assert "__pycache__" not in done.out


def test_without_a_hub_the_download_says_so(clone: Path, tmp_path: Path) -> None:
    for arguments in ("", " --dry-run"):
        line = f"export HF_HOME='{tmp_path}'; python3 model_download.py{arguments}"
        assert_one_clear_paragraph(command(line, clone / "LLaMA-Factory"), "Hub")


@pytest.mark.parametrize(
    "line",
    [
        "./mixtral_tp.sh --help",
        "./mixtral_tp.sh --dry-run",
        "./mixtral_tp.sh --dry-run --preset tiny --points 'cs:sparse:bs=1,2'",
        "python3 throughput.py --help",
        "python3 model_download.py --help",
        "python3 src/tunescope/_bootstrap.py doctor",
        "python3 src/tunescope/_bootstrap.py --help",
    ],
)
def test_what_measures_nothing_needs_no_torch(clone: Path, without_torch: str, line: str) -> None:
    done = command(line, clone, PYTHONPATH=without_torch)
    assert (done.code, done.err) == (0, "")
    assert done.out


def test_a_dry_run_lists_the_points_in_order_and_writes_nothing(clone: Path, tmp_path: Path) -> None:
    done = command(f"./mixtral_tp.sh --dry-run --preset tiny --out '{tmp_path / 'out'}'", clone)
    listed = [re.search(r"\((\w+) (\w+) batch (\d+);", line) for line in done.out.splitlines()]
    assert [[*match.groups(), "ok"] for match in listed if match] == FIGURE_8
    assert not (tmp_path / "out").exists()


def test_any_working_directory_will_do_and_a_relative_out_counts_from_it(clone: Path, recorded: Path) -> None:
    """Measured by one clone, known as done to another: no place is part of what a point is."""
    folder = recorded.parent
    points = "--points 'cs:sparse:bs=1 cs:dense:bs=1'"
    done = command(f"'{clone}'/mixtral_tp.sh --preset tiny --queries 6 {points} --out throughput", folder)
    assert done.code == 0, done.err
    assert "2 of 2 points are measured already" in done.err
    assert done.out.strip().endswith("throughput.py ./throughput")
    table = command(f"python3 '{clone}'/throughput.py throughput --format json", folder)
    assert [row["status"] for row in json.loads(table.out)] == ["ok", "ok"]


def test_a_reader_that_stops_early_is_no_error(clone: Path) -> None:
    done = command("python3 throughput.py ./profile_data/mixtral/throughput | true; exit ${PIPESTATUS[0]}", clone)
    assert "Traceback" not in done.err
    assert "BrokenPipe" not in done.err
