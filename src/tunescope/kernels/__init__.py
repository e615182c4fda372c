"""Kernels in Triton, each with the plain reference that it must equal. No build, and no GPU for the reference."""
