"""Qwen3-MoE, as transformers has it, also without a checkpoint."""

from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from tunescope.models import random_weights


def register() -> None:
    random_weights.register(Qwen3MoeConfig, Qwen3MoeForCausalLM)
