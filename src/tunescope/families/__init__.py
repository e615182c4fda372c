"""Every model this project knows, as data. A further one is a file here and a line in FAMILIES (docs/models.md)."""

from typing import Any

from tunescope.errors import UserError
from tunescope.families.blackmamba import BLACKMAMBA
from tunescope.families.family import Family
from tunescope.families.mixtral import MIXTRAL
from tunescope.families.qwen3_moe import QWEN3_MOE

# By the name that --model takes, which is also the folder of its results under profile_data/.
FAMILIES: dict[str, Family] = {family.name: family for family in (MIXTRAL, BLACKMAMBA, QWEN3_MOE)}
_BY_MODEL_TYPE = {family.model_type: family for family in FAMILIES.values()}


def find_family(name: str) -> Family:
    """Raises UserError for a name that is not in FAMILIES."""
    if name not in FAMILIES:
        raise UserError(f"model {name!r} is unknown", cure=f"use one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def family_of(config: dict[str, Any]) -> Family | None:
    """The family of a config.json, by its model_type; None for a model that is not known."""
    return _BY_MODEL_TYPE.get(str(config.get("model_type")))
