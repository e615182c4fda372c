"""Norms of a live model whose weights are frozen, computed in one launch each. Instances, not classes; reversible."""

from functools import partial
from typing import Any

from torch import Tensor, nn

from tunescope.kernels.frozen_norm import frozen_rms_norm

_CLASSES = ("MixtralRMSNorm", "Qwen3MoeRMSNorm")


def fuse_norms(model: nn.Module) -> list[nn.Module]:
    """Replaces forward of every known norm that is not trained, and returns those modules, for unfuse_norms()."""
    fused = []
    for module in model.modules():
        if _is_known(module):
            module.forward = partial(_forward, module)
            fused.append(module)
    return fused


def unfuse_norms(modules: list[nn.Module]) -> None:
    for module in modules:
        vars(module).pop("forward", None)


def _forward(module: Any, hidden_states: Tensor) -> Tensor:
    return frozen_rms_norm(hidden_states, module.weight, module.variance_epsilon)


def _is_known(module: Any) -> bool:
    return (
        type(module).__name__ in _CLASSES
        and type(module).__module__.startswith("transformers.models.")
        and "forward" not in vars(module)
        and not module.weight.requires_grad
    )
