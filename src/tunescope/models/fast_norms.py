"""Norms of a live model whose weights are frozen, computed in one launch each. Instances, not classes; reversible."""

from functools import partial
from typing import Any

from torch import Tensor, nn

from tunescope.kernels.frozen_norm import frozen_rms_norm
from tunescope.models.forwards import is_untouched

_CLASSES = ("MixtralRMSNorm", "Qwen3MoeRMSNorm")


def fuse_norms(model: nn.Module) -> list[nn.Module]:
    """Replaces forward of every known norm that is not trained, and returns those modules, for unfuse()."""
    fused = []
    for module in model.modules():
        if is_untouched(module, _CLASSES) and not module.weight.requires_grad:
            module.forward = partial(_forward, module)
            fused.append(module)
    return fused


def _forward(module: Any, hidden_states: Tensor) -> Tensor:
    return frozen_rms_norm(hidden_states, module.weight, module.variance_epsilon)
