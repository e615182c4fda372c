#!/usr/bin/env python3
"""Figures 6, 9: python sm_mixtral.py profile_data/mixtral/ncu > mixtral_sm.txt"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), "src"))

from tunescope._bootstrap import main

if __name__ == "__main__":
    main(["table", "sm", *sys.argv[1:]])
