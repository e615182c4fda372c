#!/usr/bin/env bash
# Figure 8, BlackMamba: training throughput (queries/s) per batch size, dense and sparse, CS and MATH.
# Finished points are skipped; delete a point's folder to run it again. Table: throughput.py.
set -euo pipefail
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/src/tunescope/launch.sh"
launch run throughput --model blackmamba "$@"
