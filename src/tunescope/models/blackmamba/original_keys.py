"""Names of parameters in BlackMamba's original checkpoints, against ours. Names and shapes only, no torch.

Ours                                         Original
model.embeddings.weight                      release: embedding.word_embeddings.weight
  (and lm_head.weight, tied, not stored)     in_memory: embedding.weight and output_layer.weight, the same tensor
model.layers.{i}.norm.weight                 decoder.layers.{i}.norm.weight
model.layers.{i}.mamba.REST                  decoder.layers.{i}.mixer.REST
model.layers.{i}.moe.router.REST             decoder.layers.{i}.mixer.router.REST
model.layers.{i}.moe.experts.fc1.weight      decoder.layers.{i}.mixer.local_experts.{e}.linear_fc1.weight, stacked by e
model.layers.{i}.moe.experts.fc2.weight      decoder.layers.{i}.mixer.local_experts.{e}.linear_fc2.weight, stacked by e
model.final_norm.REST                        decoder.final_layernorm.REST

`release` is how the published files have it, under one key `model`; `in_memory` is how the original's own model names
its parameters, and with it what the study's trainer saved, flat.
"""

from collections.abc import Mapping
from typing import Any, Literal

from tunescope.families.blackmamba_shapes import EMBEDDINGS, EXPERTS, parameter_shapes

Form = Literal["release", "in_memory"]
FORMS: tuple[Form, ...] = ("release", "in_memory")

EMBEDDING_NAMES: dict[Form, str] = {
    "release": "embedding.word_embeddings.weight",
    "in_memory": "embedding.weight",
}
# Form -> names that stand for the embedding a second time.
TIED_NAMES: dict[Form, tuple[str, ...]] = {"release": (), "in_memory": ("output_layer.weight",)}


def form_of(names: Mapping[str, Any]) -> Form:
    """The form whose embedding is among the names; `release` where neither is."""
    return "in_memory" if EMBEDDING_NAMES["in_memory"] in names else "release"


def original_names(config: Mapping[str, Any], form: Form) -> dict[str, tuple[str, ...]]:
    """Our parameter -> the original one, or all that it stacks in the order of the experts; tied names left out."""
    return {name: _original_names(name, shape, form) for name, shape in parameter_shapes(config).items()}


def original_shapes(config: Mapping[str, Any], form: Form) -> dict[str, tuple[int, ...]]:
    """Original parameter -> shape, tied names included."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in parameter_shapes(config).items():
        of_one = shape[1:] if is_stack(name) else shape
        shapes |= dict.fromkeys(_original_names(name, shape, form), of_one)
    return shapes | dict.fromkeys(TIED_NAMES[form], shapes[EMBEDDING_NAMES[form]])


def is_stack(name: str) -> bool:
    """Whether a parameter of ours holds one matrix per expert, which the original keeps singly."""
    return EXPERTS in name


def _original_names(name: str, shape: tuple[int, ...], form: Form) -> tuple[str, ...]:
    if name == EMBEDDINGS:
        return (EMBEDDING_NAMES[form],)
    path = name.removeprefix("model.").split(".")
    if path[0] == "final_norm":
        return (".".join(("decoder", "final_layernorm", *path[1:])),)
    layer = ("decoder", *path[:2])
    if path[2] == "norm":
        return (".".join((*layer, *path[2:])),)
    if not is_stack(name):
        return (".".join((*layer, "mixer", *path[3:])),)
    matrix, kind = path[4:]
    return tuple(
        ".".join((*layer, "mixer", "local_experts", str(expert), f"linear_{matrix}", kind))
        for expert in range(shape[0])
    )
