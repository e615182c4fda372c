"""Memory, time and money of a run, as arithmetic on numbers: no torch, no GPU, nothing is measured here."""
