#!/usr/bin/env python3
"""Figures 4, 5, 11: python mamba_latency.py profile_data/blackmamba/latency > mamba_latency_breakdown.txt"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), "src"))

from tunescope._bootstrap import main

if __name__ == "__main__":
    main(["table", "latency", *sys.argv[1:]])
