"""Tables for people, made of tidy DataFrames. No torch."""
