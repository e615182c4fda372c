"""For somebody's own training script: accelerate_moe(), and how much memory it may spend on not recomputing.

No torch until accelerate_moe() is called.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tunescope.cost import memory
from tunescope.cost.memory_grouped import grouped_layer
from tunescope.cost.memory_shapes import read_batch, read_decoder, read_setup
from tunescope.cost.padding import PAD_MULTIPLE
from tunescope.families.family import GROUPED
from tunescope.models.fast_moe_recompute import StepMemory

if TYPE_CHECKING:
    from torch import nn

    from tunescope.models.fast_moe import AcceleratedMoe


def accelerate_moe(
    model: "nn.Module",
    *,
    recompute: str | tuple[int, ...] = "all",
    step_memory: StepMemory | None = None,
    graphs: bool = False,
) -> "AcceleratedMoe":
    """Computes every MoE block of a live Mixtral or Qwen3-MoE grouped. See tunescope.models.fast_moe."""
    from tunescope.models import fast_moe

    return fast_moe.accelerate_moe(model, recompute=recompute, step_memory=step_memory, graphs=graphs)


def step_memory(
    config: Mapping[str, Any],
    recipe: Mapping[str, Any],
    batch_size: int,
    seq_len_tokens: int,
    gpu_memory_bytes: int,
    *,
    context_bytes: int = memory.CONTEXT_BYTES,
    fragmentation_frac: float = memory.FRAGMENTATION_FRAC,
    **settings: Any,
) -> StepMemory:
    """What a step with grouped experts takes, for recompute="auto": by tunescope.cost.memory.

    config, recipe, batch_size, seq_len_tokens: of the largest batch to come, as for cost.memory.memory_terms, and so
    are further arguments and errors. gpu_memory_bytes, context_bytes, fragmentation_frac: as for max_batch_size there.
    """
    recipe = dict(recipe) | {"disable_gradient_checkpointing": False}
    moments = memory.memory_terms(config, recipe, batch_size, seq_len_tokens, moe_path=GROUPED, **settings)
    shape = read_decoder(config)
    batch = read_batch(batch_size, seq_len_tokens, PAD_MULTIPLE, is_masked=settings.get("is_masked", True))
    layer = grouped_layer(shape, read_setup(recipe, shape.linears), batch)
    return StepMemory(
        room_bytes=int((gpu_memory_bytes - context_bytes) / (1 + fragmentation_frac)),
        saved_bytes=layer.saved_bytes,
        input_bytes=layer.input,
        moments_bytes={moment: sum(terms.values()) for moment, terms in moments.items()},
        growing=memory.GROWING,
    )
