"""The parameters that a BlackMamba config.json stands for, with their shapes. Arithmetic only, no torch.

H hidden size, E inner width, N state size, W convolution width, R rank of the step sizes, X experts, F expert width,
V rows of the vocabulary. Source: the shapes of the released checkpoints.
"""

import math
from collections.abc import Mapping
from typing import Any

from tunescope.errors import UserError

EMBEDDINGS = "model.embeddings.weight"
HEAD = "lm_head.weight"  # tied to the embeddings: the same tensor in memory, never stored
EXPERTS = ".moe.experts."  # in the name of a parameter that stacks one matrix per expert


def inner_width(config: Mapping[str, Any]) -> int:
    """E: channels of a Mamba mixer."""
    return int(config["expand"] * config["hidden_size"])


def delta_rank(config: Mapping[str, Any]) -> int:
    """R: rank of the step sizes."""
    return -(-int(config["hidden_size"]) // 16)


def parameter_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Parameter -> shape, in the order of the model; the tied head is left out.

    Raises UserError if layers_block_type is not one known kind of block for each of num_hidden_layers.
    """
    kinds = config["layers_block_type"]
    unknown = sorted(set(kinds) - {"mamba", "moe"})
    if unknown or len(kinds) != config["num_hidden_layers"]:
        fault = f"unknown blocks {', '.join(unknown)}" if unknown else f"{len(kinds)} blocks"
        raise UserError(
            f"layers_block_type has {fault}; num_hidden_layers is {config['num_hidden_layers']}.",
            cure='give one of "mamba" and "moe" for each of num_hidden_layers',
        )
    width = config["hidden_size"]
    mixers = {"mamba": _mamba_shapes(config), "moe": _moe_shapes(config)}
    shapes: dict[str, tuple[int, ...]] = {EMBEDDINGS: (config["vocab_size"], width)}
    for number, kind in enumerate(kinds):
        shapes[f"model.layers.{number}.norm.weight"] = (width,)
        shapes |= {f"model.layers.{number}.{kind}.{name}": shape for name, shape in mixers[kind].items()}
    return shapes | {"model.final_norm.weight": (width,), "model.final_norm.bias": (width,)}


def num_parameters(config: Mapping[str, Any]) -> int:
    """Numbers in all parameters together, the tied embedding and head counted once."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


def _mamba_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    width, inner, states, rank = config["hidden_size"], inner_width(config), config["state_size"], delta_rank(config)
    return {
        "in_proj.weight": (2 * inner, width),
        "conv1d.weight": (inner, 1, config["conv_kernel"]),
        "conv1d.bias": (inner,),
        "x_proj.weight": (rank + 2 * states, inner),
        "dt_proj.weight": (inner, rank),
        "dt_proj.bias": (inner,),
        "A_log": (inner, states),
        "D": (inner,),
        "out_proj.weight": (width, inner),
    }


def _moe_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    width, experts, expert_width = config["hidden_size"], config["num_local_experts"], config["intermediate_size"]
    return {
        "router.weight": (experts, width),
        "router.bias": (experts,),
        "experts.fc1.weight": (experts, 2 * expert_width, width),
        "experts.fc2.weight": (experts, width, expert_width),
    }
