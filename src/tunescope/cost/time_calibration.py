"""What points of the user's own change about forecasts of step times: `estimate --calibrate FOLDER`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunescope.cost.time_model import StepTime, TimeModel, calibrated, default_model
from tunescope.cost.time_points import TimedPoint, read_points
from tunescope.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A model refitted with the user's points, and what that changed at these points, as geometric means over them.

    half_width_before_frac: half of the 90 % interval over the median, before, for the same GPUs in a host that was not
    measured; half_width_frac: after, for their own host. shift_frac: of the median. error_before_frac: of the medians
    before, against what was measured.
    """

    model: TimeModel
    num_points: int
    devices: tuple[str, ...]
    half_width_before_frac: float
    half_width_frac: float
    shift_frac: float
    error_before_frac: float

    def __str__(self) -> str:
        before, after = 100 * self.half_width_before_frac, 100 * self.half_width_frac
        return (
            f"calibrated on {self.num_points} {'point' if self.num_points == 1 else 'points'} of "
            f"{', '.join(self.devices)}: the 90 % interval of a step goes from +-{before:.0f} % to +-{after:.0f} %, "
            f"its median by {100 * self.shift_frac:+.0f} %; without them the points were missed by "
            f"{100 * self.error_before_frac:.0f} %"
        )


def calibrate(points: Sequence[TimedPoint], base: TimeModel | None = None) -> Calibration:
    """base: default_model() if none is given. Raises UserError without points."""
    if not points:
        raise UserError("there is no point to calibrate with", cure="measure some on this GPU first")
    base = base or default_model()
    model = calibrated(points, base)
    before = [base.at_point(point, is_other_host=True) for point in points]
    after = [model.at_point(point) for point in points]
    return Calibration(
        model=model,
        num_points=len(points),
        devices=tuple(sorted({point.device.name for point in points})),
        half_width_before_frac=_half_width(before),
        half_width_frac=_half_width(after),
        shift_frac=_mean_factor([new.median_s / old.median_s for new, old in zip(after, before, strict=True)]) - 1,
        error_before_frac=_mean_factor(
            [_at_least_one(old.median_s / point.step_s) for old, point in zip(before, points, strict=True)]
        )
        - 1,
    )


def calibrate_from(folder: Path, base: TimeModel | None = None) -> Calibration:
    """With the point folders at or below `folder`. Raises UserError if none is usable."""
    return calibrate(read_points(folder), base)


def _half_width(steps: Sequence[StepTime]) -> float:
    return _mean_factor([1 + step.half_width_frac for step in steps]) - 1


def _mean_factor(factors: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, factors)) / len(factors))


def _at_least_one(ratio: float) -> float:
    return max(ratio, 1 / ratio)
