"""What points of the user's own change about forecasts of step times: `estimate --calibrate FOLDER`."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunescope.cost.time_model import StepTime, TimeModel, calibrated, default_model, without
from tunescope.cost.time_points import TimedPoint, read_points_and_skipped
from tunescope.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A model refitted with the user's points, and what that changed at these points, as geometric means over them.

    base: the model before, which may have some of the points already, num_known of them. skipped: why points of the
    folder are not among them, one text each. half_width_before_frac: half of the 90 % interval over the median, by the
    base without the points, for the same GPUs in a host that was not measured; half_width_frac: after, for their own
    host. shift_frac: of the median. error_before_frac: of the medians without the points, against what was measured.
    """

    model: TimeModel
    base: TimeModel
    points: tuple[TimedPoint, ...]
    num_known: int
    half_width_before_frac: float
    half_width_frac: float
    shift_frac: float
    error_before_frac: float
    skipped: tuple[str, ...] = ()

    @property
    def num_points(self) -> int:
        return len(self.points)

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(sorted({point.device.name for point in self.points}))

    def hosts(self, device: str) -> tuple[str, ...]:
        """Of the points of a GPU; the one with most points, which answers, comes first."""
        counts = Counter(point.host for point in self.points if point.device.name == device)
        answering = next((self.model.host_of(p.device) for p in self.points if p.device.name == device), None)
        return tuple(sorted(counts, key=lambda host: (host != answering, -counts[host])))

    def __str__(self) -> str:
        """Of the points alone; what they change about an answer depends on the step that is asked for."""
        unused = f" ({len(self.skipped)} more cannot be used: {self.skipped[0]})" if self.skipped else ""
        known = f"; {self.num_known} of them came with the package and count once" if self.num_known else ""
        return (
            f"calibrated on {self.num_points} {'point' if self.num_points == 1 else 'points'} of "
            f"{', '.join(self.devices)}{unused}{known}; without them the points were missed by "
            f"{100 * self.error_before_frac:.0f} %"
        )


def calibrate(
    points: Sequence[TimedPoint], base: TimeModel | None = None, *, skipped: Sequence[str] = ()
) -> Calibration:
    """base: default_model() if none is given. Raises UserError without points, and where the base has no others."""
    if not points:
        raise UserError("there is no point to calibrate with", cure="measure some on this GPU first")
    base = base or default_model()
    model = calibrated(points, base)
    others, own_others = without(base.points, points), without(base.own, points)
    num_known = len(base.points) + len(base.own) - len(others) - len(own_others)
    ignorant = TimeModel(others, own_others) if num_known else base
    before = [ignorant.at_point(point, is_other_host=True) for point in points]
    after = [model.at_point(point) for point in points]
    return Calibration(
        model=model,
        base=base,
        points=tuple(points),
        num_known=num_known,
        half_width_before_frac=_half_width(before),
        half_width_frac=_half_width(after),
        shift_frac=_mean_factor([new.median_s / old.median_s for new, old in zip(after, before, strict=True)]) - 1,
        error_before_frac=_mean_factor(
            [_at_least_one(old.median_s / point.step_s) for old, point in zip(before, points, strict=True)]
        )
        - 1,
        skipped=tuple(skipped),
    )


def calibrate_from(folder: Path, base: TimeModel | None = None) -> Calibration:
    """With the point folders at or below `folder`. Raises UserError if none is usable."""
    points, skipped = read_points_and_skipped(folder)
    return calibrate(points, base, skipped=skipped)


def _half_width(steps: Sequence[StepTime]) -> float:
    return _mean_factor([1 + step.half_width_frac for step in steps]) - 1


def _mean_factor(factors: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, factors)) / len(factors))


def _at_least_one(ratio: float) -> float:
    return max(ratio, 1 / ratio)
