"""Queries to train on: synthetic ones of the paper's lengths, or the user's own file."""
