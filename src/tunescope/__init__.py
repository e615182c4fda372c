"""tunescope: where the time, memory, energy and money of fine-tuning an LLM go."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunescope.accelerate import accelerate_moe
    from tunescope.measure.step_profiler import StepProfiler

__version__ = "0.1.0"
__all__ = ["StepProfiler", "__version__", "accelerate_moe"]


def __getattr__(name: str) -> Any:
    """The rest on demand: reading results must not import torch."""
    if name == "StepProfiler":
        from tunescope.measure.step_profiler import StepProfiler

        return StepProfiler
    if name == "accelerate_moe":
        from tunescope.accelerate import accelerate_moe

        return accelerate_moe
    raise AttributeError(f"module 'tunescope' has no attribute {name!r}")
