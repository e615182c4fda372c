"""What of a LLaMA-Factory recipe an estimate goes by: the settings, and defaults of the run itself. No torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunescope.cost.memory_shapes import whole_number
from tunescope.cost.time_points import QLORA, RECIPES
from tunescope.errors import UserError

DEFAULT_CUTOFF_LEN_TOKENS = 2048  # LLaMA-Factory's
_STAGE = "sft"
_PACKING = ("packing", "neat_packing")
# Keys that change what a run takes and are not gone by -> what is estimated all the same.
_IGNORED = {
    "max_steps": "whole epochs are estimated; --epochs may be a fraction",
    "group_by_length": "batches are taken to be shuffled",
    "disable_shuffling": "batches are taken to be shuffled",
    "auto_find_batch_size": "the batch is the one named here",
}
_MAX_EPOCHS = 10**6


@dataclass(frozen=True, kw_only=True)
class RecipeRun:
    """settings: LLaMA-Factory's keys, which decide memory and time.

    The rest is of the user's own recipe, None where it says nothing: epochs, max_samples (queries of the data that are
    used), held_out (val_size: of those a number from 1, else a part), batch_size (of a micro-batch). notes: for people.
    """

    settings: dict[str, Any]
    cutoff_len_tokens: int
    epochs: float | None = None
    max_samples: int | None = None
    held_out: float = 0.0
    batch_size: int | None = None
    notes: tuple[str, ...] = ()

    def num_queries(self, num_of_data: int) -> int:
        """Trained in an epoch, of a data set of so many. Raises UserError where val_size leaves none."""
        used = min(num_of_data, self.max_samples or num_of_data)
        held_out = int(self.held_out) if self.held_out >= 1 else math.ceil(self.held_out * used)
        if held_out >= used:
            raise UserError(
                f"the recipe's val_size of {self.held_out:g} leaves none of {used} queries to train on",
                cure="give a smaller val_size, or --queries",
            )
        return used - held_out


def read_recipe(recipe: Mapping[str, Any] | None, family_name: str, cutoff_len: int | None) -> RecipeRun:
    """recipe: the user's own; None: the family's of RECIPES, else QLORA. cutoff_len: instead of the recipe's (tokens).

    Raises UserError for what is not estimated (packing, other stages than sft) and for values that cannot be.
    """
    settings = dict(RECIPES.get(family_name, QLORA) if recipe is None else recipe)
    if cutoff_len is not None:
        settings["cutoff_len"] = cutoff_len
    settings = {key: value for key, value in settings.items() if value is not None}
    cutoff = settings.get("cutoff_len", DEFAULT_CUTOFF_LEN_TOKENS)
    if type(cutoff) is not int or cutoff < 1:
        raise UserError(f"cutoff_len is {cutoff!r}; it must be a whole number of tokens from 1")
    whole_number(settings, "gradient_accumulation_steps", 1)
    if recipe is None:
        note = "No recipe was given: NF4 QLoRA of rank 16 on all linears, gradient checkpointing, cut at 1024."
        return RecipeRun(settings=settings, cutoff_len_tokens=cutoff, notes=() if family_name in RECIPES else (note,))
    _refuse(settings)
    max_steps = settings.get("max_steps", -1)
    ignored = [key for key in _IGNORED if settings.get(key) and not (key == "max_steps" and _is_negative(max_steps))]
    notes: tuple[str, ...] = tuple(f"The recipe's {key} is not gone by: {_IGNORED[key]}." for key in ignored)
    own_template = RECIPES.get(family_name, {}).get("template")
    if own_template and settings.get("template", own_template) != own_template:
        notes += (
            f"The recipe's template is {settings['template']}; the launchers' recipe of {family_name} has "
            f"{own_template}.",
        )
    return RecipeRun(
        settings=settings,
        cutoff_len_tokens=cutoff,
        epochs=_positive(settings, "num_train_epochs"),
        max_samples=_whole(settings, "max_samples"),
        held_out=_positive(settings, "val_size") or 0.0,
        batch_size=_whole(settings, "per_device_train_batch_size"),
        notes=notes,
    )


def checked_epochs(epochs: float, where: str) -> float:
    """The number. Raises UserError unless it is one above 0 that a run could have. where: as --epochs."""
    if type(epochs) not in (int, float) or not 0 < epochs <= _MAX_EPOCHS:
        raise UserError(f"{where} is {epochs!r}; it must be a positive number up to {_MAX_EPOCHS:,}")
    return float(epochs)


def _refuse(settings: Mapping[str, Any]) -> None:
    stage = settings.get("stage", _STAGE)
    if stage != _STAGE:
        raise UserError(
            f"the recipe's stage is {stage!r}; only {_STAGE} is estimated",
            cause="other stages run other models, and other batches, in a step",
        )
    if packed := [key for key in _PACKING if settings.get(key)]:
        raise UserError(
            f"the recipe sets {' and '.join(packed)}, which is not estimated",
            cause="packed queries fill batches up to the cutoff; here each query is a row, padded to the longest",
            cure="take it out, or give a histogram of one length, the cutoff, with as many rows as packing makes",
        )


def _is_negative(value: Any) -> bool:
    return type(value) in (int, float) and value < 0


def _whole(settings: Mapping[str, Any], key: str) -> int | None:
    return whole_number(settings, key, 1) if key in settings else None


def _positive(settings: Mapping[str, Any], key: str) -> float | None:
    """None where there is none; val_size may be 0."""
    value = settings.get(key)
    if value is None or (key == "val_size" and value in (0, False)):
        return None
    return checked_epochs(value, f"the recipe's {key}")
