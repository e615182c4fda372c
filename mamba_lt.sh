#!/usr/bin/env bash
# Figures 4, 5 and 11, BlackMamba: where a step's time and memory go, by phase, layer and operator; tokens per expert.
# Finished points are skipped; delete a point's folder to run it again. Table: mamba_latency.py.
set -euo pipefail
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/src/tunescope/launch.sh"
launch run latency --model blackmamba "$@"
