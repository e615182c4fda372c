"""``python -m tunescope``: the command line, see :mod:`tunescope.cli`."""

from tunescope.cli import main

if __name__ == "__main__":
    main()
