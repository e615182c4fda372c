"""Forwards of single modules replaced on the instance for a while: which may be, and the way back."""

from collections.abc import Iterable
from typing import Any

from torch import nn


def is_untouched(module: Any, classes: tuple[str, ...]) -> bool:
    """Whether it is one of transformers' own classes of these names, with the forward of its class."""
    kind = type(module)
    return (
        kind.__name__ in classes
        and kind.__module__.startswith("transformers.models.")
        and "forward" not in vars(module)
    )


def unfuse(modules: Iterable[nn.Module]) -> None:
    """Each has the forward of its class again. Safe to call twice."""
    for module in modules:
        vars(module).pop("forward", None)
