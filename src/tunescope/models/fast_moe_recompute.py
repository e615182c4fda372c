"""Which decoder layers keep their activations and which are recomputed: gradient checkpointing, as far as it is needed.

A layer that is recomputed costs its forward once more. One that is not costs memory from its forward to its backward.
No torch here but for the flags of a live model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunescope.errors import UserError

RECOMPUTE = ("all", "auto", "none")


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """What a step of the longest batch takes on a GPU; tunescope.accelerate.step_memory predicts it.

    room_bytes: what the allocator may give out. saved_bytes: what one layer keeps if it is not recomputed. input_bytes:
    what is kept of it if it is. moments_bytes: moment of a step -> bytes allocated then, with every layer recomputed;
    growing: of them those at which the activations of every layer are there.
    """

    room_bytes: int
    saved_bytes: int
    input_bytes: int
    moments_bytes: Mapping[str, int]
    growing: frozenset[str]

    def peak_bytes(self, num_kept: int) -> int:
        """The largest moment, if so many layers are not recomputed: the last ones, whose backward comes first.

        What they keep is gone when the first layer is recomputed, so that only the moments before add up.
        """
        extra = max(0, self.saved_bytes - self.input_bytes) * num_kept
        return max(
            num_bytes + (extra if moment in self.growing else 0) for moment, num_bytes in self.moments_bytes.items()
        )


def choose_checkpointed_layers(num_layers: int, memory: StepMemory) -> tuple[int, ...]:
    """Numbers of the layers that must be recomputed so that a step fits: the first ones, as few as will do.

    All of them where even that does not fit: it is the least that a step can take.
    """
    if num_layers < 0:
        raise ValueError(f"{num_layers} layers")
    kept = 0
    while kept < num_layers and memory.peak_bytes(kept + 1) <= memory.room_bytes:
        kept += 1
    return tuple(range(num_layers - kept))


def layers_to_recompute(
    recompute: str | tuple[int, ...], num_layers: int, memory: StepMemory | None
) -> tuple[int, ...] | None:
    """What a setting asks for; None: leave the layers as they are. Raises UserError for one that cannot be obeyed."""
    if isinstance(recompute, tuple):
        return recompute
    if recompute not in RECOMPUTE:
        raise UserError(f"there is no recompute={recompute!r}", cure=f"take one of {', '.join(RECOMPUTE)}")
    if recompute == "auto":
        if memory is None:
            raise UserError(
                'recompute="auto" needs to know what a step takes',
                cause="how many layers may keep their activations depends on the longest batch and the GPU",
                cure="give step_memory=tunescope.accelerate.step_memory(...), or recompute='all' or 'none'",
            )
        return choose_checkpointed_layers(num_layers, memory)
    return () if recompute == "none" else None


def set_checkpointed(layers: Sequence[Any], numbers: tuple[int, ...]) -> list[tuple[Any, bool]]:
    """Switches gradient checkpointing off in the layers that are not numbered. Returns what was switched, as it was.

    A layer that was not checkpointed stays so: how to checkpoint it is for whoever set the model up to say.
    """
    before = []
    for number, layer in enumerate(layers):
        if layer.gradient_checkpointing and number not in numbers:
            before.append((layer, True))
            layer.gradient_checkpointing = False
    return before
