"""Which preset a GPU takes, and how many layers of it. Arithmetic only, no torch."""

from dataclasses import dataclass
from typing import Any

from tunescope.errors import UserError
from tunescope.families.family import Family
from tunescope.hardware import GIB

SLICE_HEADROOM_GIB = 8.0
MIN_SLICE_LAYERS = 4
SLICE_DEPTH_RATIO = 4


@dataclass(frozen=True)
class Size:
    """A preset with the depths to measure (deepest first) and why it was chosen, for people."""

    preset: str
    depths: tuple[int, ...]
    total_layers: int
    reason: str


def choose_size(
    family: Family,
    config: dict[str, Any],
    wanted: str,
    gpu_memory_bytes: int | None,
    *,
    gpu_name: str = "",
    own_model: bool = False,
) -> Size:
    """The preset to run: `wanted`, or with `auto` the largest that fits the GPU (None: there is no GPU).

    config: of the model at full depth. own_model: it is one the user named, which tiny would silently replace.
    `auto` takes tiny only where there is no GPU. Raises UserError when nothing fits.
    """
    total = config["num_hidden_layers"]
    if own_model and gpu_memory_bytes is None and wanted == "full":
        return Size("full", (total,), total, "asked for, on the CPU")
    if wanted == "tiny" or (wanted == "auto" and gpu_memory_bytes is None):
        if own_model:
            raise UserError(
                "preset tiny is an architecture of its own and cannot be your model",
                cure="drop --model-path, or use --preset full (without a GPU it runs on the CPU, slowly)",
            )
        layers = family.tiny["num_hidden_layers"]
        return Size("tiny", (layers,), layers, "asked for" if wanted == "tiny" else "no GPU was found")
    if gpu_memory_bytes is None:
        raise UserError(
            f"preset {wanted} needs a GPU and none was found",
            cause="there is no NVIDIA driver, or CUDA_VISIBLE_DEVICES hides the GPUs",
            cure="use --preset tiny (or auto), or see `python3 -m tunescope doctor`",
        )
    return _gpu_size(family, config, wanted, gpu_memory_bytes, gpu_name)


def _gpu_size(family: Family, config: dict[str, Any], wanted: str, gpu_memory_bytes: int, gpu_name: str) -> Size:
    total = config["num_hidden_layers"]
    memory_gib = gpu_memory_bytes / GIB
    full_need_gib = family.resident_bytes(config, total) / GIB + family.headroom_gib
    who = f"{gpu_name or 'the GPU'} ({memory_gib:.1f} GiB)"
    if wanted == "full" or (wanted == "auto" and memory_gib >= full_need_gib):
        return Size("full", (total,), total, f"{who}; all {total} layers need about {full_need_gib:.0f} GiB")
    step = family.depth_step
    outside_gib = family.resident_bytes(config, 0) / GIB
    per_step_gib = family.resident_bytes(config, step) / GIB - outside_gib
    room_gib = memory_gib - SLICE_HEADROOM_GIB - outside_gib
    deepest = min(total, int(room_gib / per_step_gib) * step)
    if deepest < MIN_SLICE_LAYERS:
        raise UserError(
            f"{who} is too small for preset slice",
            cause=f"{MIN_SLICE_LAYERS} full-width layers and their activations need about "
            f"{SLICE_HEADROOM_GIB + (MIN_SLICE_LAYERS / step + 1) * per_step_gib:.0f} GiB",
            cure="use a larger GPU, or --preset tiny to see that everything works",
        )
    # Two depths: step time is affine in depth, and a line needs two points. The further apart they are, the less
    # their errors grow on the way to all layers.
    shallow = max(deepest // SLICE_DEPTH_RATIO // step, 1) * step
    return Size("slice", (deepest, shallow), total, f"{who}; {deepest} of {total} layers fit")


def with_budget(size_memory_bytes: int | None, budget_gib: float | None) -> int | None:
    """GPU memory to plan with: the GPU's own, or less where the user sets a budget to imitate a smaller GPU."""
    if size_memory_bytes is None or budget_gib is None:
        return size_memory_bytes
    return min(size_memory_bytes, round(budget_gib * GIB))
