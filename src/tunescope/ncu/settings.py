"""How Nsight Compute is to look at a point."""

from dataclasses import asdict, dataclass
from typing import Any

from tunescope.errors import UserError

PHASES = ("forward", "recompute", "backward")
CLOCK_CONTROLS, CACHE_CONTROLS = ("none", "base"), ("all", "none")
DEFAULT_MAX_LAUNCHES = 60


@dataclass(frozen=True, kw_only=True)
class Settings:
    """path: of ncu, where it is not to be looked for. clock_control: none, or base, which holds the GPU at its base
    clock while a kernel is measured. cache_control: all (caches are emptied before each replay) or none.
    max_launches: looked into at a point, 0 for every launch. phases, layers: which of them; no layer is all.

    Raises UserError for a value that cannot be.
    """

    path: str | None = None
    clock_control: str = "none"
    cache_control: str = "all"
    max_launches: int = DEFAULT_MAX_LAUNCHES
    phases: tuple[str, ...] = PHASES
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for flag, value, known in (
            ("--clock-control", self.clock_control, CLOCK_CONTROLS),
            ("--cache-control", self.cache_control, CACHE_CONTROLS),
        ):
            if value not in known:
                raise UserError(f"{flag} {value} is unknown", cure=f"use one of {', '.join(known)}")
        if self.max_launches < 0:
            raise UserError(f"--launches is {self.max_launches}; it must be 0 (all) or more")
        if unknown := [phase for phase in self.phases if phase not in PHASES]:
            raise UserError(f"--phases {unknown[0]} is unknown", cure=f"use one or more of {', '.join(PHASES)}")
        if not self.phases:
            raise UserError("--phases names no phase", cure=f"use one or more of {', '.join(PHASES)}")
        if any(layer < 0 for layer in self.layers):
            raise UserError("--layers counts from 0")

    def to_json(self) -> dict[str, Any]:
        """What decides what is measured: not where ncu lies."""
        content = asdict(self)
        del content["path"]
        return content
