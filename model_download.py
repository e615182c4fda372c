#!/usr/bin/env python3
"""Download the Mixtral and BlackMamba checkpoints into HF_HOME: python model_download.py --help"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), "src"))

from tunescope._bootstrap import main

if __name__ == "__main__":
    main(["download", *sys.argv[1:]])
