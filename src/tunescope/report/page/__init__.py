"""The report: one self-contained HTML file made from whatever points a folder holds, and the paper's numbers."""
