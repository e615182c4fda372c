"""Measuring: callbacks and samplers that watch a run and write files. Nothing here reads results back."""
