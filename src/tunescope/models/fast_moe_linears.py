"""The linears of an MoE block's experts as transformers, bitsandbytes and PEFT leave them, read and checked.

What could not be grouped without changing what is trained is refused here, before anything is touched.
"""

# E experts; a linear has N out, K in, and adapters of rank Q

import math
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from tunescope.errors import UserError

_NESTED_BLOCK = 256  # absmax values under one scale, as bitsandbytes nests them and its own kernels expect
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_STOCK = "leave this model to the stock path, which can train it"


@dataclass(frozen=True)
class Adapter:
    """The one active LoRA of a linear. a: (Q, K). b: (N, Q)."""

    layer: Any
    name: str
    a: nn.Parameter
    b: nn.Parameter
    scaling: float

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])


@dataclass(frozen=True)
class ExpertLinear:
    """One linear of one expert.

    holder, name: whose submodule it is. base: the linear itself, inside PEFT's wrapper if it has one. adapter: None
    where it has none.
    """

    holder: nn.Module
    name: str
    module: nn.Module
    base: nn.Module
    weight: nn.Parameter
    adapter: Adapter | None
    shape_NK: tuple[int, int]

    @property
    def quant_state(self) -> Any:
        """bitsandbytes' QuantState, None of a weight that is not quantised."""
        return getattr(self.weight, "quant_state", None)


def read_linears(experts: nn.ModuleList, name: str, where: str) -> list[ExpertLinear]:
    """The linear `name` of every expert: all of one shape, one kind, and adapted alike.

    where: the block's name, for messages. Raises UserError for what cannot be grouped, with the reason.
    """
    linears = [read_linear(expert, name, f"{where}.experts.{number}.{name}") for number, expert in enumerate(experts)]
    path = f"{where}.experts.*.{name}"
    _check_alike(path, "shapes", [linear.shape_NK for linear in linears])
    _check_alike(path, "dtypes", [linear.weight.dtype for linear in linears])
    _check_alike(path, "devices", [linear.weight.device for linear in linears])
    _check_alike(path, "kinds of quantisation", [_quantisation(linear) for linear in linears])
    if linears[0].quant_state is not None:
        _check_codes(path, linears)
    num_adapted = sum(linear.adapter is not None for linear in linears)
    if num_adapted not in (0, len(linears)):
        _refuse(path, f"{num_adapted} of {len(linears)} experts have an adapter", "adapt all of them or none")
    adapters = [linear.adapter for linear in linears if linear.adapter is not None]
    _check_alike(path, "adapters", [(adapter.name, adapter.rank, adapter.scaling) for adapter in adapters])
    matrices = [one for adapter in adapters for one in (adapter.a, adapter.b)]
    _check_alike(path, "dtypes of adapters", [one.dtype for one in matrices])
    _check_alike(path, "trained adapters", [one.requires_grad for one in matrices])
    for adapter in adapters:
        if adapter.a.device != linears[0].weight.device or adapter.b.device != adapter.a.device:
            _refuse(path, "weights and adapters are on different devices", "move the model to one device")
    return linears


def read_linear(holder: nn.Module, name: str, where: str) -> ExpertLinear:
    """Raises UserError for a linear that is not a plain one of bitsandbytes or torch with at most one plain LoRA."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from peft.tuners.lora import layer as lora
    from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit

    module = getattr(holder, name)
    adapter, base = None, module
    if isinstance(module, lora.LoraLayer):
        if type(module) not in (lora.Linear, LoraLinear4bit):
            _refuse(where, f"its adapter is a {type(module).__name__}", _STOCK)
        base = module.get_base_layer()
        adapter = _read_adapter(module, where)
    if not isinstance(base, nn.Linear) or type(base) not in (nn.Linear, Linear4bit, *Linear4bit.__subclasses__()):
        _refuse(where, f"it is a {type(base).__name__}, and known are Linear and bitsandbytes' Linear4bit", _STOCK)
    if base.bias is not None:
        _refuse(where, "it has a bias", _STOCK)
    if any("forward" in vars(one) for one in (module, base)):
        _refuse(where, "its forward was replaced, as by offloading, and would not be called", _STOCK)
    weight = base.weight
    if isinstance(weight, Params4bit):
        shape = _check_quantised(base, where)
    else:
        if weight.dtype not in _FLOATS or weight.numel() == 0:
            _refuse(where, f"its weight is {weight.dtype} of shape {tuple(weight.shape)}", _STOCK)
        if weight.requires_grad:
            _refuse(where, "its own weight is trained, and the grouped path gives gradients to adapters alone", _STOCK)
        shape = tuple(weight.shape)
    return ExpertLinear(holder, name, module, base, weight, adapter, shape)


def compute_dtype(linear: ExpertLinear, x: Tensor) -> torch.dtype:
    """In which dtype the stock linear would multiply x, read anew at each call: bitsandbytes sets it at the first."""
    if linear.quant_state is not None:
        return linear.base.compute_dtype or x.dtype
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return linear.weight.dtype


def _read_adapter(module: Any, where: str) -> Adapter | None:
    if module.merged:
        _refuse(where, f"its adapter {module.merged_adapters} is merged", "unmerge_adapter() first")
    active = [name for name in module.active_adapters if name in module.lora_A]
    if len(active) > 1:
        _refuse(where, f"{len(active)} adapters are active: {', '.join(active)}", "set_adapter() to one of them")
    if not active:
        return None
    name = active[0]
    dropout = module.lora_dropout[name]
    if not isinstance(dropout, nn.Identity) and dropout.p > 0:
        _refuse(where, f"its adapter drops out {dropout.p:g} of the inputs", "train with lora_dropout 0")
    if module.lora_variant.get(name) is not None:
        _refuse(where, f"its adapter is a variant of LoRA ({type(module.lora_variant[name]).__name__})", _STOCK)
    if module.lora_bias.get(name) or module.lora_B[name].bias is not None:
        _refuse(where, "its adapter has a bias", "train with lora_bias off")
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    if a.dtype not in _FLOATS or a.numel() == 0 or b.numel() == 0:
        _refuse(where, f"its adapter is {a.dtype} of shapes {tuple(a.shape)} and {tuple(b.shape)}", _STOCK)
    return Adapter(module, name, a, b, float(module.scaling[name]))


def _check_quantised(base: Any, where: str) -> tuple[int, int]:
    """(N, K) of a bitsandbytes weight."""
    weight = base.weight
    state = weight.quant_state if weight.quant_state is not None else base.quant_state
    if state is None:
        _refuse(where, "it is not quantised yet", "move the model to its device first")
    if getattr(state, "packing_format_for_cpu", False):
        _refuse(where, "bitsandbytes packed it for inference on a CPU", "load the model again, and accelerate it first")
    if weight.quant_state is None:
        _refuse(where, "its Params4bit lost its quant_state", "load the model again")
    shape = tuple(state.shape)
    # Stored as numbers of another type, bf16 as by LLaMA-Factory, the bytes are the same.
    if len(shape) != 2 or weight.numel() * weight.itemsize * 2 != math.prod(shape):
        _refuse(
            where,
            f"it holds {weight.numel()} numbers of {weight.dtype} for a shape of {shape}",
            "load it whole on one device; sharded weights cannot be grouped",
        )
    if shape[1] % state.blocksize:
        _refuse(where, f"its {shape[1]} inputs are not whole blocks of {state.blocksize}", _STOCK)
    if state.nested and state.state2.blocksize != _NESTED_BLOCK:
        _refuse(where, f"its scales are nested in blocks of {state.state2.blocksize}", _STOCK)
    return shape[0], shape[1]


def _quantisation(linear: ExpertLinear) -> tuple[Any, ...]:
    state = linear.quant_state
    if state is None:
        return ()
    return state.quant_type, state.blocksize, state.nested, linear.base.compute_dtype


def _check_codes(path: str, linears: list[ExpertLinear]) -> None:
    """One table of values serves all experts."""
    first = linears[0].quant_state
    for linear in linears[1:]:
        state = linear.quant_state
        same = torch.equal(state.code, first.code)
        if not (same and (not state.nested or torch.equal(state.state2.code, first.state2.code))):
            _refuse(path, "the experts' 4-bit codes differ", _STOCK)


def _check_alike(path: str, what: str, values: list[Any]) -> None:
    if len(set(values)) > 1:
        shown = ", ".join(str(value) for value in dict.fromkeys(values))
        _refuse(path, f"the experts have different {what}: {shown}", _STOCK)


def _refuse(where: str, why: str, cure: str) -> NoReturn:
    raise UserError(f"{where} cannot be grouped", cause=why, cure=cure)
