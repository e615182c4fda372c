"""Which batch fits a GPU of hardware.py, and what would make a run fit that does not. No torch."""

from collections.abc import Mapping
from typing import Any

from tunescope.cost import memory
from tunescope.cost.memory_shapes import BLACKMAMBA
from tunescope.cost.padding import PAD_MULTIPLE
from tunescope.cost.time_points import QLORA
from tunescope.errors import UserError
from tunescope.families.family import GROUPED, STOCK
from tunescope.hardware import DEVICES, GIB, Device

# What CUDA has to give of a board, as torch reports it (GiB, +- 0.3): less than the sheet, by ECC where that is kept in
# the same memory and by what the driver takes.
TORCH_MEMORY_GIB = {
    "NVIDIA A10G": 22.0,
    "NVIDIA A40": 44.4,
    "NVIDIA L4": 22.0,
    "NVIDIA L40S": 44.4,
    "NVIDIA A100-SXM4-40GB": 39.4,
    "NVIDIA A100-PCIE-40GB": 39.4,
    "NVIDIA A100-SXM4-80GB": 79.2,
    "NVIDIA A100 80GB PCIe": 79.2,
    "NVIDIA H100 PCIe": 79.1,
    "NVIDIA H100 80GB HBM3": 79.2,
    "NVIDIA H200": 139.7,
    "NVIDIA B200": 178.3,
    "NVIDIA GeForce RTX 3090": 23.6,
    "NVIDIA GeForce RTX 4090": 23.6,
    "NVIDIA GeForce RTX 5090": 31.3,
}
_USUAL_FRAC = 0.92  # of the sheet's GB as GiB, for a board that is not there: the least of those above


def gpu_memory_bytes(device: Device) -> int:
    return round(TORCH_MEMORY_GIB.get(device.name, _USUAL_FRAC * device.memory_gb) * GIB)


def max_batch_size(
    config: Mapping[str, Any],
    recipe: Mapping[str, Any],
    memory_bytes: int,
    longest_tokens: int,
    num_queries: int,
    moe_path: str = STOCK,
) -> int:
    """The largest batch of the longest queries that fits, and that the data can fill; 0 if not even one does.

    Raises UserError for a model or a recipe whose memory is not modelled.
    """
    return min(memory.max_batch_size(config, recipe, memory_bytes, longest_tokens, moe_path=moe_path), num_queries)


def fewest_recomputed(
    config: Mapping[str, Any], recipe: Mapping[str, Any], memory_bytes: int, batch_size: int, longest_tokens: int
) -> int:
    """Layers that must be recomputed so that a batch of the longest queries with grouped experts fits; all where even
    that does not. What accelerate_moe(recompute="auto") chooses."""
    num_layers = int(config["num_hidden_layers"])

    def fits(num_recomputed: int) -> bool:
        needed = needed_bytes(config, recipe, batch_size, longest_tokens, GROUPED, num_recomputed)
        return needed <= memory_bytes

    return next((number for number in range(num_layers) if fits(number)), num_layers)


def guess_max_batch(
    config: Mapping[str, Any], recipe: Mapping[str, Any], memory_bytes: int, longest_tokens: int | None,
    *, moe_path: str | None = None,
) -> int | None:  # fmt: skip
    """Where a search on the GPU itself may begin; None where memory is not modelled, or nothing fits by the model.

    longest_tokens: of the data; None: not known, taken as the recipe's cutoff. moe_path: as for memory_terms.
    """
    length = longest_tokens or int(recipe.get("cutoff_len", 1024))
    try:
        return memory.max_batch_size(config, recipe, memory_bytes, length, moe_path=moe_path) or None
    except UserError:
        return None


def needed_bytes(
    config: Mapping[str, Any],
    recipe: Mapping[str, Any],
    batch_size: int,
    longest_tokens: int,
    moe_path: str = STOCK,
    num_recomputed: int | None = None,
) -> int:
    """GPU memory, as torch reports it, that a batch of the longest queries needs with all that is left for CUDA."""
    peak = memory.peak_bytes(
        config, recipe, batch_size, longest_tokens, moe_path=moe_path, num_recomputed=num_recomputed
    )
    return round(peak * (1 + memory.FRAGMENTATION_FRAC) + memory.CONTEXT_BYTES)


def why_not(
    config: Mapping[str, Any],
    recipe: Mapping[str, Any],
    device: Device,
    batch_size: int,
    longest_tokens: int,
    moe_path: str = STOCK,
) -> str:
    """Why a batch does not fit, and what would: another GPU, a shorter cutoff, a smaller batch."""
    needed = needed_bytes(config, recipe, batch_size, longest_tokens, moe_path)
    have = gpu_memory_bytes(device)
    ways = []
    if batch_size > 1 and (fitting := memory.max_batch_size(config, recipe, have, longest_tokens, moe_path=moe_path)):
        ways.append(f"a batch of {fitting}")
    if larger := _smallest(needed):
        ways.append(larger)
    if batch_size == 1 and (length := _longest_that_fits(config, recipe, have, longest_tokens, moe_path)):
        ways.append(f"a cutoff of {length} tokens")
    if not recipe.get("quantization_bit") and config.get("model_type") != BLACKMAMBA:
        qlora = QLORA | {"lora_rank": recipe.get("lora_rank", QLORA["lora_rank"])}
        needed_by_qlora = needed_bytes(config, qlora, batch_size, longest_tokens, moe_path)
        on = "" if needed_by_qlora <= have else _smallest(needed_by_qlora)
        if on is not None:
            on = on and f", on {on}"
            ways.append(f"NF4 QLoRA in place of this recipe (finetuning_type: lora, quantization_bit: 4){on}")
    cure = " or ".join(ways) if ways else "no single GPU of the table: it needs several, which is not modelled"
    return (
        f"batch {batch_size} of {longest_tokens} tokens needs {needed / GIB:.1f} GiB and {device.name} has "
        f"{have / GIB:.1f}; what would fit: {cure}"
    )


def _smallest(needed: int) -> str | None:
    """The smallest GPU of the table that has so many bytes; None if none has."""
    larger = [other for other in DEVICES if gpu_memory_bytes(other) >= needed]
    if not larger:
        return None
    smallest = min(larger, key=lambda other: (other.memory_gb, other.dram_bytes_per_s))
    return f"a GPU of {smallest.memory_gb:g} GB, as the {smallest.name}"


def _longest_that_fits(
    config: Mapping[str, Any], recipe: Mapping[str, Any], memory_bytes: int, longest_tokens: int, moe_path: str
) -> int:
    """The longest query, a multiple of 8 and shorter than longest_tokens, that fits at batch 1; 0 if none."""
    low, high = 0, longest_tokens // PAD_MULTIPLE + 1
    while high - low > 1:
        middle = (low + high) // 2
        fits = needed_bytes(config, recipe, 1, middle * PAD_MULTIPLE, moe_path) <= memory_bytes
        low, high = (middle, high) if fits else (low, middle)
    return low * PAD_MULTIPLE
