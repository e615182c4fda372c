"""Figures: each a Chart (the numbers, in long form) made from a table of analyze or cost, and drawn by draw.py."""
