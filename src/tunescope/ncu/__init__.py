"""Nsight Compute: what is counted, and how its reports are read. No torch."""
