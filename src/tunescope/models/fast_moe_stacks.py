"""Experts' weights and adapters laid out in one piece, with the modules' own parameters as views of it.

Nothing is copied for long and nothing is renamed: each parameter stays the object it was, in its module, optimizer and
state_dict, with the same values; only its memory lies in a row with that of the other experts. One projection at a time
is in memory twice while it is laid out.
"""

# E experts, D model width, F width of an expert, M adapted linears on the way in (0 to 2); a linear has N out, K in

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from tunescope.errors import UserError
from tunescope.models.fast_moe_linears import ExpertLinear

if TYPE_CHECKING:
    from tunescope.kernels.nf4 import Nf4Stack

Base: TypeAlias = "Nf4Stack | Tensor"  # Tensor: (E, N, K), not quantised

_ALIGNED_NUMBERS = 64  # a piece of the adapters' buffer begins at a multiple: whole 128 bytes in bf16
_GROUPED_ALIGNMENT_BYTES = 16  # of a row in torch's grouped matmul


@dataclass(frozen=True)
class Adapters:
    """LoRA of all experts, in the dtype of the matmuls. in_MQ: of the gate's and the up projection's rows, one after
    the other. None where a projection has no adapter. Q may be padded with zeros, where rows must be longer.

    in_A: (E, M * Q, D). gate_B, up_B: (E, F, Q). down_A: (E, Q, F). down_B: (E, D, Q). flat: all of it, one tensor to
    keep for backward.
    """

    flat: Tensor
    in_A: Tensor | None
    gate_B: Tensor | None
    up_B: Tensor | None
    down_A: Tensor | None
    down_B: Tensor | None


class ExpertStacks:
    """The three projections of a block's experts, and their adapters.

    gate, up, down: as families name them w1, w3, w2 or gate_proj, up_proj, down_proj. parameters: the adapters' own
    parameters, in the order of gradients(). Building it moves memory; restore() moves it back.
    """

    def __init__(self, gate: list[ExpertLinear], up: list[ExpertLinear], down: list[ExpertLinear]) -> None:
        self.check(gate, up, down)
        self.linears = (gate, up, down)
        self.num_experts = len(gate)
        self.inner, self.width = gate[0].shape_NK
        self.parameters: tuple[nn.Parameter, ...] = ()
        self._pieces: dict[str, tuple[int, tuple[int, ...]]] = {}
        self._flat: Tensor | None = None
        self._zero: Tensor | None = None
        # What a recompute has made of the weights, for the backward that it is for (fast_moe_wide).
        self.decoded: Tensor | None = None
        self.gradient_room: Tensor | None = None
        self.gradients_to: Tensor | None = None  # where gradients() writes, instead of giving them to autograd
        self._zero_rows = torch.zeros(1, dtype=torch.int32, device=gate[0].weight.device)
        self.scale_in = next((one[0].adapter.scaling for one in (gate, up) if one[0].adapter), 1.0)
        self.scale_down = down[0].adapter.scaling if down[0].adapter else 1.0
        self.rank_in = next((one[0].adapter.rank for one in (gate, up) if one[0].adapter), 0)
        self.rank_down = down[0].adapter.rank if down[0].adapter else 0
        self.gate, self.up, self.down = (_stack_weights(linears) for linears in self.linears)
        self._stack_adapters()
        self._watch()

    @staticmethod
    def check(gate: list[ExpertLinear], up: list[ExpertLinear], down: list[ExpertLinear]) -> None:
        """Raises UserError for projections that do not belong to one gated MLP, or whose adapters differ in kind."""
        shapes = [linears[0].shape_NK for linears in (gate, up, down)]
        if not shapes[0] == shapes[1] == shapes[2][::-1]:
            raise UserError(f"experts with linears of shapes {shapes} cannot be grouped", cause="they are no gated MLP")
        adapters = [linears[0].adapter for linears in (gate, up, down)]
        if adapters[0] and adapters[1]:
            kinds = [(adapter.rank, adapter.scaling) for adapter in adapters[:2] if adapter]
            if kinds[0] != kinds[1]:
                raise UserError(
                    f"adapters of {gate[0].name} and {up[0].name} cannot be grouped",
                    cause=f"their ranks and scalings differ: {kinds[0]} and {kinds[1]}",
                    cure="give both one rank and one lora_alpha",
                )
        dtypes = {adapter.a.dtype for adapter in adapters if adapter}
        if len(dtypes) > 1:
            raise UserError(f"adapters of several dtypes cannot be grouped: {', '.join(map(str, dtypes))}")

    @property
    def has_adapters(self) -> bool:
        return bool(self.parameters)

    def adapters(self, dtype: torch.dtype) -> Adapters:
        """In dtype: the stored memory itself where that is its dtype and needs no padding, else a copy in one go."""
        assert self._flat is not None
        return self.adapters_of(self._flat.to(dtype))

    def adapters_of(self, flat: Tensor) -> Adapters:
        """The tensors inside a flat copy, as adapters() made it."""
        views = {name: flat[start : start + _size(shape)].view(shape) for name, (start, shape) in self._pieces.items()}
        in_A, down_A = views.get("in_A"), views.get("down_A")
        if in_A is not None:
            in_A = _padded_to(in_A, 2, _padding(self.rank_in, flat.dtype)).flatten(1, 2)
        if down_A is not None:
            down_A = _padded_to(down_A, 1, _padding(self.rank_down, flat.dtype))
        return Adapters(
            flat,
            in_A,
            _maybe_padded(views.get("gate_B"), _padding(self.rank_in, flat.dtype)),
            _maybe_padded(views.get("up_B"), _padding(self.rank_in, flat.dtype)),
            down_A,
            _maybe_padded(views.get("down_B"), _padding(self.rank_down, flat.dtype)),
        )

    def room_for_gradients(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Makes gradient_room, laid out as the adapters are, and returns each parameter with its part of it."""
        if self._flat is None:
            return []
        self.gradient_room = torch.zeros_like(self._flat)
        start = self._flat.storage_offset()
        return [
            (parameter, self.gradient_room[at : at + parameter.numel()].view_as(parameter))
            for parameter in self.parameters
            for at in (parameter.storage_offset() - start,)
        ]

    def gradients(self, found: Callable[[str], Tensor], ends_E: Tensor) -> tuple[Tensor | None, ...]:
        """The parameters' gradients, in their own dtype: views of one tensor a projection, for autograd to take over.

        found: name of a piece -> its gradient for all experts, padded or not; that of in_A as (E, M * Q, D).
        ends_E: of the experts' rows. One without rows gets zeros, whatever its matmul over nothing left.
        None for each of them where they are written to gradients_to.
        """
        assert self._zero is not None
        is_active_E = torch.diff(ends_E, prepend=self._zero_rows) > 0
        gradients: list[Tensor] = []
        for name, (start, shape) in self._pieces.items():
            found_E = found(name)
            if name == "in_A":
                found_E = found_E.view(shape[0], shape[1], -1, shape[3])
            found_E = found_E[tuple(slice(width) for width in shape)]
            is_active = is_active_E.view(-1, *(1,) * (len(shape) - 1))
            if self.gradients_to is not None:
                room_E = self.gradients_to[start : start + _size(shape)].view(shape)
                torch.where(is_active, found_E, self._zero, out=room_E)
                continue
            gradient_E = torch.where(is_active, found_E, self._zero).contiguous()
            gradients += (gradient_E.flatten(0, 1) if name == "in_A" else gradient_E).unbind(0)
        return tuple(gradients) or (None,) * len(self.parameters)

    def without_adapters(self) -> bool:
        """Whether PEFT has switched the adapters off, as in `with model.disable_adapter()`.

        Raises UserError where anything that this layout relies on has changed since it was made: a forward would then
        compute with other weights than the modules have.
        """
        disabled = 0
        with torch._C.DisableTorchFunctionSubclass():  # or bitsandbytes' parameters take 1 us for each question
            for submodules, name, module, base_parameters, weight, address, state in self._weights:
                if (
                    submodules[name] is not module
                    or base_parameters["weight"] is not weight
                    or weight.data_ptr() != address
                    or (state is not None and weight.quant_state is not state)
                ):
                    raise _changed(f"the weights of expert linear {name} were replaced or moved")
            for settings, active, adapter, scaling in self._settings:
                if settings["merged_adapters"]:
                    raise _changed("adapters were merged")
                if settings["_active_adapter"] != active or settings["scaling"].get(adapter) != scaling:
                    raise _changed("another adapter was made active, or another scaling set")
                disabled += settings["_disable_adapters"]
            for parameters, parameter, address in self._addresses:
                if parameters["weight"] is not parameter or parameter.data_ptr() != address:
                    raise _changed("the adapters were replaced or moved")
        if disabled not in (0, len(self._settings)):
            raise _changed("some experts' adapters are disabled and others not")
        return disabled > 0

    @torch.no_grad()
    def restore(self) -> None:
        """Every parameter back in memory of its own, as far as it still lies in the common one."""
        self.decoded = None
        with torch._C.DisableTorchFunctionSubclass():
            for _, _, _, _, weight, address, state in self._weights:
                if weight.data_ptr() == address:
                    weight.data = weight.data.clone()
                for holder, name in _scales(state):
                    setattr(holder, name, getattr(holder, name).clone())
            for _, parameter, address in self._addresses:
                if parameter.data_ptr() == address:
                    parameter.data = parameter.data.clone()

    @torch.no_grad()
    def _stack_adapters(self) -> None:
        gate, up, down = self.linears
        ins = [linears for linears in (gate, up) if linears[0].adapter]
        # name -> the parameters of it, expert by expert, and the shape of them all
        found: dict[str, tuple[list[nn.Parameter], tuple[int, ...]]] = {}
        if ins:
            both = [linears[expert].adapter.a for expert in range(self.num_experts) for linears in ins]  # type: ignore[union-attr]
            found["in_A"] = (both, (self.num_experts, len(ins), self.rank_in, self.width))
        for name, linears in (("gate_B", gate), ("up_B", up)):
            if linears[0].adapter:
                b = [linear.adapter.b for linear in linears]  # type: ignore[union-attr]
                found[name] = (b, (self.num_experts, self.inner, self.rank_in))
        if down[0].adapter:
            a = [linear.adapter.a for linear in down]  # type: ignore[union-attr]
            b = [linear.adapter.b for linear in down]  # type: ignore[union-attr]
            found["down_A"] = (a, (self.num_experts, self.rank_down, self.inner))
            found["down_B"] = (b, (self.num_experts, self.width, self.rank_down))
        if not found:
            return
        end = 0
        for name, (_, shape) in found.items():
            self._pieces[name] = (end, shape)
            end += -(-_size(shape) // _ALIGNED_NUMBERS) * _ALIGNED_NUMBERS
        parameters = [parameter for of_piece, _ in found.values() for parameter in of_piece]
        self._flat = parameters[0].new_empty(end)
        for name, (of_piece, _) in found.items():
            start = self._pieces[name][0]
            for parameter in of_piece:
                view = self._flat[start : start + parameter.numel()].view_as(parameter)
                view.copy_(parameter)
                parameter.data = view
                start += parameter.numel()
        self._zero = self._flat.new_zeros(1)
        self.parameters = tuple(parameters)

    def _watch(self) -> None:
        """What without_adapters() looks at, so that 384 linears take a fraction of a millisecond."""
        self._weights: list[tuple[Any, ...]] = []
        self._settings: list[tuple[Any, ...]] = []
        self._addresses: list[tuple[Any, ...]] = []
        for linear in (linear for linears in self.linears for linear in linears):
            weight = linear.weight
            self._weights.append(
                (
                    linear.holder._modules, linear.name, linear.module, linear.base._parameters, weight,
                    weight.data_ptr(), linear.quant_state,
                )
            )  # fmt: skip
            if adapter := linear.adapter:
                settings = vars(adapter.layer)
                self._settings.append((settings, _copied(settings["_active_adapter"]), adapter.name, adapter.scaling))
                for modules, parameter in ((adapter.layer.lora_A, adapter.a), (adapter.layer.lora_B, adapter.b)):
                    self._addresses.append((modules[adapter.name]._parameters, parameter, parameter.data_ptr()))


@torch.no_grad()
def _stack_weights(linears: Sequence[ExpertLinear]) -> Base:
    """All experts' weights of one projection in one tensor, of which each weight becomes a view."""
    num_out, num_in = linears[0].shape_NK
    weights = [linear.weight for linear in linears]
    if linears[0].quant_state is None:
        return _into_one([(weight, "data") for weight in weights])
    from tunescope.kernels.nf4 import Nf4Stack

    states = [linear.quant_state for linear in linears]
    stored = _into_one([(weight, "data") for weight in weights])
    packed = stored.flatten(1).view(torch.uint8).view(len(weights), num_out, num_in // 2)
    absmax = _into_one([(state, "absmax") for state in states])
    first = states[0]
    code_16 = first.code.float()
    if not first.nested:
        return Nf4Stack(packed, absmax, None, None, None, code_16, first.blocksize)
    absmax2 = _into_one([(state.state2, "absmax") for state in states])
    offset = _into_one([(state, "offset") for state in states])
    return Nf4Stack(packed, absmax, absmax2, offset, first.state2.code, code_16, first.blocksize)


def _into_one(attributes: Sequence[tuple[Any, str]]) -> Tensor:
    """The tensors in some attributes, all of one shape, stacked; each attribute is then its part of the stack."""
    first = getattr(*attributes[0])
    stacked = torch.empty((len(attributes), *first.shape), dtype=first.dtype, device=first.device)
    for number, (holder, name) in enumerate(attributes):
        stacked[number].copy_(getattr(holder, name))
        setattr(holder, name, stacked[number])  # the old memory is free again before the next
    return stacked


def _scales(state: Any) -> Iterable[tuple[Any, str]]:
    if state is None:
        return ()
    return [(state, "absmax"), *([(state, "offset"), (state.state2, "absmax")] if state.nested else [])]


def _padding(rank: int, dtype: torch.dtype) -> int:
    """Columns that a rank lacks to whole 16 bytes, which torch's grouped matmul wants."""
    return -rank % (_GROUPED_ALIGNMENT_BYTES // dtype.itemsize)


def _padded_to(x: Tensor, axis: int, padding: int) -> Tensor:
    """x with some zeros behind along an axis."""
    return x if not padding else functional.pad(x, (0, 0) * (x.dim() - 1 - axis) + (0, padding))


def _maybe_padded(x: Tensor | None, padding: int) -> Tensor | None:
    return None if x is None else _padded_to(x, x.dim() - 1, padding)


def _size(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _copied(active: str | list[str]) -> str | list[str]:
    return active if isinstance(active, str) else list(active)


def _changed(what: str) -> UserError:
    return UserError(
        f"the grouped experts no longer fit the model: {what}",
        cause="the model was changed after accelerate_moe()",
        cure="call restore() on what accelerate_moe() returned, change the model, and accelerate it again",
    )
