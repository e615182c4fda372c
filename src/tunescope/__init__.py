"""tunescope: where the time, memory, energy and money of fine-tuning an LLM go."""

__version__ = "0.1.0"
