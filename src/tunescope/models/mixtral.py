"""Mixtral, as transformers has it, also without a checkpoint."""

from transformers import MixtralConfig, MixtralForCausalLM

from tunescope.models import random_weights


def register() -> None:
    random_weights.register(MixtralConfig, MixtralForCausalLM)
