"""Memory, time and money of a run, as arithmetic on numbers: no torch, no GPU, nothing is measured here."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunescope.cost.estimate_table import estimate

__all__ = ["estimate"]


def __getattr__(name: str) -> Any:
    """estimate on demand: who needs one formula must not load them all."""
    if name == "estimate":
        from tunescope.cost.estimate_table import estimate

        return estimate
    raise AttributeError(f"module 'tunescope.cost' has no attribute {name!r}")
