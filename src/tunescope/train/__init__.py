"""Training through LLaMA-Factory: a recipe and a point in, callbacks passed through, nothing measured here."""
