"""The golden BlackMamba (golden/README.md) as our model, and what the original computed with it."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tunescope.models.blackmamba.configuration import BlackMambaConfig
from tunescope.models.blackmamba.conversion import from_original
from tunescope.models.blackmamba.modeling import BlackMambaForCausalLM
from tunescope.models.blackmamba.original_config import config_from_original

GOLDEN = Path(__file__).with_name("golden")
SETS = {"a_top2": 2, "b_top8": 8}  # name -> experts a token


def golden_config(name: str) -> dict[str, Any]:
    """Our config.json of a set."""
    return config_from_original(json.loads((GOLDEN / f"blackmamba_{name}" / "config.json").read_text()))


@cache
def golden_io(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"blackmamba_{name}" / "io.safetensors")


@cache
def golden_gradients(name: str) -> dict[str, Tensor]:
    """Under the original's names, each with the prefix of its loss."""
    return load_file(GOLDEN / f"blackmamba_{name}" / "grads.safetensors")


def golden_model(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> BlackMambaForCausalLM:
    """A set's model with its weights, which both share. changes: of the configuration."""
    config = golden_config(name)
    weights = from_original(load_file(GOLDEN / "blackmamba_a_top2" / "model.safetensors"), config)
    model = BlackMambaForCausalLM(BlackMambaConfig(**config | changes)).to(dtype)
    report = model.load_state_dict({key: tensor.to(dtype) for key, tensor in weights.items()}, strict=False)
    assert (report.missing_keys, report.unexpected_keys) == (["lm_head.weight"], [])  # tied
    return model


def relative(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted; of a zero, the norm itself."""
    return float((found.detach() - wanted).norm() / (wanted.norm() or 1))
