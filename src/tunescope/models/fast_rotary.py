"""The rotary embedding in the attention of a live model, one launch a tensor. Instances, not classes; reversible.

Attention's own forward is kept, with another function in the place of the rotary one that it calls.
"""

import inspect
import sys
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from tunescope.kernels.rotary import rotate, takes
from tunescope.models.forwards import is_untouched

_CLASSES = ("MixtralAttention", "Qwen3MoeAttention")
_NAME = "apply_rotary_pos_emb"


def fuse_rotary(model: nn.Module) -> list[nn.Module]:
    """Replaces forward of every attention that is known, and returns those modules, for unfuse()."""
    fused = []
    for module in model.modules():
        if is_untouched(module, _CLASSES) and _calls_it(type(module)):
            module.forward = MethodType(_with_fused_rotary(type(module)), module)
            fused.append(module)
    return fused


def _calls_it(kind: Any) -> bool:
    own = inspect.unwrap(kind.forward)
    return isinstance(own, FunctionType) and _NAME in own.__code__.co_names


def _with_fused_rotary(kind: Any) -> FunctionType:
    own = inspect.unwrap(kind.forward)
    stock = getattr(sys.modules[kind.__module__], _NAME)

    def apply_rotary(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Any = None, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        if unsqueeze_dim != 1 or not takes(q, k, cos, sin) or cos.dim() != 3:
            rotated: tuple[Tensor, Tensor] = stock(q, k, cos, sin, position_ids, unsqueeze_dim)
            return rotated
        return rotate(q, cos, sin), rotate(k, cos, sin)

    function = FunctionType(
        own.__code__, own.__globals__ | {_NAME: apply_rotary}, own.__name__, own.__defaults__, own.__closure__
    )
    function.__kwdefaults__ = own.__kwdefaults__
    return function
