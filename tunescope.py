"""`python3 -m tunescope ...` from a plain checkout: starts the package in src/ in the right environment.

Where this folder is on the import path, `import tunescope` finds this file before the package; it gives way to it.
"""

import importlib
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), "src"))

if __name__ == "__main__":
    from tunescope._bootstrap import main

    main(sys.argv[1:])
else:
    del sys.modules[__name__]
    sys.modules[__name__] = importlib.import_module(__name__)
