#!/usr/bin/env bash
# Figures 6, 9 and 10, Mixtral: what the kernels of the MoE layer make of the GPU, counted by Nsight Compute where it may.
# Finished points are skipped; delete a point's folder to run it again. Tables: sm_mixtral.py, mem_mixtral.py.
set -euo pipefail
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/src/tunescope/launch.sh"
launch run kernels --model mixtral "$@"
