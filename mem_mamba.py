#!/usr/bin/env python3
"""Figure 10: python mem_mamba.py profile_data/blackmamba/ncu > mamba_mem.txt"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), "src"))

from tunescope._bootstrap import main

if __name__ == "__main__":
    main(["table", "mem", *sys.argv[1:]])
