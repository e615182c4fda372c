"""From point folders to tidy DataFrames. Reads files only: no torch, no GPU, nothing of the measuring side."""
