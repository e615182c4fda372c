"""All that follows from measured steps, made anew after point folders came or went below docs/results.

    PYTHONPATH=src .venv/bin/python bench/refit.py

Writes measured_steps.csv of the package and, in docs/time_model.md, what `python -m tunescope table validation` prints.
Rows of bench/peers.csv hold for the points that they name; bench/peers.py makes them anew.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "time_model.md"
_BEGINS, _ENDS = "```text\nStep times of points held out", "\n```"


def with_validation(page: str, printed: str) -> str:
    """The page with its table of errors replaced. Raises SystemExit if it has none."""
    before, found, rest = page.partition(_BEGINS)
    if not found:
        raise SystemExit(f"{PAGE} has no block that begins with {_BEGINS!r}")
    return f"{before}```text\n{printed.strip()}{_ENDS}{rest.partition(_ENDS)[2]}"


def main() -> None:
    run = [sys.executable, "-m"]
    subprocess.run([*run, "tunescope.cost.time_packaged", str(ROOT / "docs" / "results")], check=True)
    # In a process of its own, which reads the points just written.
    printed = subprocess.run([*run, "tunescope", "table", "validation"], check=True, capture_output=True, text=True)
    PAGE.write_text(with_validation(PAGE.read_text(encoding="utf-8"), printed.stdout), encoding="utf-8")


if __name__ == "__main__":
    main()
