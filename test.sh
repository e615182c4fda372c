#!/usr/bin/env bash
# Lint, types and tests, in an environment that sets itself up. Arguments go to pytest: ./test.sh -k grid
set -euo pipefail
cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")"
source src/tunescope/launch.sh
python=$(launch --python-for dev)

# A browser is only fetched where its tests may run: all of them, or those of the page.
if (($# == 0)) || [[ "$*" == *page* ]]; then
    source tests/page_browser.sh
    page_browser
fi

"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" "$python" -m pytest "$@"
