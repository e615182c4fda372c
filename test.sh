#!/usr/bin/env bash
# Lint, types and tests, in an environment that sets itself up. Arguments go to pytest: ./test.sh -k grid
set -euo pipefail
cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")"
source src/tunescope/launch.sh
python=$(launch --python-for dev)

"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" "$python" -m pytest "$@"
