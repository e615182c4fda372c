"""BlackMamba's parameters from the original's names to ours and back, bit for bit. On state dicts; no files.

The names are in original_keys.py, configurations in original_config.py, whole checkpoints in checkpoint_folder.py.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tunescope.errors import UserError
from tunescope.families.blackmamba_shapes import EMBEDDINGS, HEAD, parameter_shapes
from tunescope.models.blackmamba.original_keys import (
    EMBEDDING_NAMES,
    FORMS,
    TIED_NAMES,
    Form,
    form_of,
    is_stack,
    original_names,
    original_shapes,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
NUM_SHOWN = 3  # of the entries that an error names


def from_original(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Our state dict of an original one of either form; the tied head is left out.

    Experts are copied into their stack, everything else is the caller's own tensor. config: ours (config.json).
    Raises UserError if entries are missing, unexpected, of another shape, or not all of one floating-point dtype.
    """
    form = check_original(state_dict, config)
    return {name: assembled(state_dict, name, parts) for name, parts in original_names(config, form).items()}


def to_original(
    state_dict: Mapping[str, Tensor], config: Mapping[str, Any], form: Form = "release"
) -> dict[str, Tensor]:
    """The original's state dict of ours, with or without the tied head in it. Nothing is copied: experts are views.

    A published file holds `release` under one key, {"model": ...}. Raises UserError if entries are missing, unexpected
    or of another shape, or if head and embedding differ.
    """
    if form not in FORMS:
        raise UserError(
            f"There is no form {form!r} of a BlackMamba checkpoint.", cure=f"use one of {', '.join(FORMS)}."
        )
    shapes = parameter_shapes(config)
    if HEAD in state_dict:
        shapes[HEAD] = shapes[EMBEDDINGS]
    check_entries(state_dict, shapes)
    if HEAD in state_dict:
        _check_tied(state_dict, HEAD, EMBEDDINGS)
    original: dict[str, Tensor] = {}
    for name, parts in original_names(config, form).items():
        tensors = state_dict[name].unbind(0) if is_stack(name) else (state_dict[name],)
        original |= zip(parts, tensors, strict=True)
    return original | dict.fromkeys(TIED_NAMES[form], state_dict[EMBEDDINGS])


def check_original(state_dict: Mapping[str, Any], config: Mapping[str, Any]) -> Form:
    """The form of an original state dict, which must hold what config implies. Raises UserError: see from_original."""
    form = form_of(state_dict)
    check_entries(state_dict, original_shapes(config, form))
    [(dtype, _)] = Counter(tensor.dtype for tensor in state_dict.values()).most_common(1)
    other = [name for name, tensor in state_dict.items() if tensor.dtype != dtype]
    if other or dtype not in DTYPES:
        others = f"; {counted(other)} not, {state_dict[other[0]].dtype}" if other else ""
        raise UserError(
            f"The checkpoint's entries are {dtype}{others}.",
            cause="it was made by another program, or changed: a release holds one floating-point dtype throughout.",
            cure="convert it to one dtype first, or take the released file.",
        )
    for name in TIED_NAMES[form]:
        _check_tied(state_dict, name, EMBEDDING_NAMES[form])
    return form


def check_entries(entries: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError unless there is exactly a dense tensor of the right shape for every name."""
    faults = []
    if lacking := [name for name in shapes if name not in entries]:
        faults.append(f"of {len(shapes)} entries it lacks {counted(lacking)}")
    if foreign := [str(name) for name in entries if name not in shapes]:
        faults.append(f"it has entries that are not expected: {counted(foreign)}")
    both = [(name, entries[name]) for name in shapes if name in entries]
    if not_dense := [name for name, value in both if not _is_dense(value)]:
        faults.append(f"entries that are no dense tensors: {counted(not_dense)}")
    elif misshapen := [
        f"{name} is {_shape(value.shape)}, not {_shape(shapes[name])}"
        for name, value in both
        if tuple(value.shape) != shapes[name]
    ]:
        faults.append(f"shapes differ: {counted(misshapen)}")
    if faults:
        raise UserError(
            f"The checkpoint does not fit its configuration: {'; '.join(faults)}.",
            cause="config.json and weights are of different models, or the file was changed.",
            cure="take both from one commit of one repository.",
        )


def assembled(state_dict: Mapping[str, Tensor], name: str, parts: Sequence[str]) -> Tensor:
    """One parameter of ours from its parts in the original: their stack, copied, or the only one as it is."""
    return torch.stack([state_dict[part] for part in parts]) if is_stack(name) else state_dict[parts[0]]


def counted(names: Sequence[str]) -> str:
    """How many there are, and the first few of them."""
    return f"{len(names)} ({', '.join(names[:NUM_SHOWN])}{', ...' if len(names) > NUM_SHOWN else ''})"


def _check_tied(state_dict: Mapping[str, Tensor], name: str, embedding: str) -> None:
    one, other = state_dict[name], state_dict[embedding]
    if one.dtype != other.dtype or (one.data_ptr() != other.data_ptr() and not torch.equal(one, other)):
        raise UserError(
            f"{name} differs from {embedding}, and this model has one matrix for both.",
            cause="the checkpoint was trained with the two untied.",
            cure="train it with its head tied to its embedding.",
        )


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "a single number"
