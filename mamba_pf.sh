#!/usr/bin/env bash
# Figures 6, 9 and 10, BlackMamba: what the kernels of the MoE layer make of the GPU, counted by Nsight Compute where it may.
# Finished points are skipped; delete a point's folder to run it again. Tables: sm_mamba.py, mem_mamba.py.
set -euo pipefail
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/src/tunescope/launch.sh"
launch run kernels --model blackmamba "$@"
