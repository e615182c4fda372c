#!/usr/bin/env python3
"""Figure 8: python throughput.py profile_data/mixtral/throughput > mixtral_throughput.txt"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), "src"))

from tunescope._bootstrap import main

if __name__ == "__main__":
    main(["table", "throughput", *sys.argv[1:]])
