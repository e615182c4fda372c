"""How long a fine-tuning step takes on a GPU, with a 90 % interval, from a config.json, a recipe and a batch.

time_work.py counts what the step asks for, time_fit.py knows how fast machines are, and this puts them together and
says what an answer rests on. docs/time_model.md has the model, its constants, and its errors on points held out.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from tunescope.cost import time_fit
from tunescope.cost.time_packaged import own_points
from tunescope.cost.time_points import TimedPoint, paper_points
from tunescope.cost.time_work import GRAPHS, STOCK, code_of, step_work
from tunescope.errors import UserError
from tunescope.hardware import Device

# Terms as an answer names them, in the order of time_fit.TERMS, and what is left when they are added up.
TERM_NAMES = (
    "host: kernel launches", "weights: decoding and reading", "matrix products and attention",
    "activations", "selective scan", "optimizer and clipping", "kernels of CUDA graphs", "decoding inside products",
)  # fmt: skip
OVERLAP_NAME = "host and GPU at once"
ANOTHER_HOST = "a host that was not measured"
# Fewer points of a code do not tell how its time goes with the batch.
MIN_POINTS_OF_A_CODE = 5


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Of one optimizer step.

    low_s, high_s: 90 % interval of its mean duration in a run. is_extrapolated: nothing was ever measured on this GPU,
    or too little of this architecture, way of training and MoE path, or under CUDA graphs not on this GPU. basis: which
    measurements it rests on, one sentence. terms: named seconds that add up to median_s; what each would take alone,
    and a negative one for what overlaps.
    slots_over_measured: token slots of a micro-batch over those of the largest that was measured on this GPU by this
    code; None where none was.
    """

    median_s: float
    low_s: float
    high_s: float
    is_extrapolated: bool
    basis: str
    terms: tuple[tuple[str, float], ...]
    slots_over_measured: float | None = None

    @property
    def half_width_frac(self) -> float:
        """What stands behind the +- of an answer: half of the interval over the median, on a logarithmic scale."""
        return math.sqrt(self.high_s / self.low_s) - 1


@dataclass(frozen=True, kw_only=True)
class RunTime:
    """Hours of a run, with the 90 % interval."""

    median_h: float
    low_h: float
    high_h: float


def run_time(step: StepTime, num_steps: float) -> RunTime:
    """Of num_steps steps of one kind. The interval does not shrink with their number: what is wrong about one step, the
    speed of the host or of a kernel, is wrong about all of them. Raises UserError for a negative number."""
    if not (math.isfinite(num_steps) and num_steps >= 0):
        raise UserError(f"a run of {num_steps:g} steps has no duration")
    hours = num_steps / 3600
    return RunTime(median_h=step.median_s * hours, low_h=step.low_s * hours, high_h=step.high_s * hours)


class TimeModel:
    """Fitted to measured points.

    own: those of the user's machine, whose host answers for a GPU before any other.
    """

    def __init__(self, points: Sequence[TimedPoint], own: Sequence[TimedPoint] = ()) -> None:
        """Raises UserError if there is no point."""
        self.points, self.own = tuple(points), tuple(own)
        everything = (*self.points, *self.own)
        if not everything:
            raise UserError("there is no measured step to learn step times from")
        self.fit = time_fit.fit(
            np.array([point.work().seconds_at_peak(point.device) for point in everything]),
            np.array([point.step_s for point in everything]),
            [point.group for point in everything],
            np.array([point.error_frac for point in everything]),
        )
        self._count_of_code = Counter(point.code for point in everything)
        self._count_of_device = Counter(point.device.name for point in everything)
        self._hosts = _hosts(everything) | _hosts(self.own)
        self._largest_slots: dict[tuple[str, str], float] = {}
        for point in everything:
            key = (point.device.name, point.code)
            self._largest_slots[key] = max(point.slots, self._largest_slots.get(key, 0.0))

    def step_time(
        self,
        config: Mapping[str, Any],
        recipe: Mapping[str, Any],
        device: Device,
        *,
        batch_size: int,
        slots: float,
        key_slots: float | None = None,
        moe_path: str = STOCK,
        is_other_host: bool = False,
        graphs: bool = False,
        num_recomputed: int | None = None,
    ) -> StepTime:
        """The mean step of a run.

        config: of the model, with the depth and top_k that run. recipe: LLaMA-Factory's keys; under gradient
        accumulation the step has all its micro-batches. batch_size: queries of a micro-batch. slots: its expected token
        slots, as padding.EpochPadding.expected_slots_per_step. key_slots: keys seen, summed over the slots; by default
        as of equally long queries. moe_path: stock, loop or grouped. is_other_host: a GPU of this kind in a machine
        that was not measured, whose CPU may be slower or faster; otherwise the machine whose points there are.
        graphs, num_recomputed: as for time_work.step_work.
        Raises UserError for a model, a recipe or a path that is not modelled.
        """
        work = step_work(
            config, recipe, batch_size=batch_size, slots=slots, key_slots=key_slots, moe_path=moe_path,
            graphs=graphs, num_recomputed=num_recomputed,
        )  # fmt: skip
        code = code_of(config, recipe, moe_path, graphs=graphs)
        host = ANOTHER_HOST if is_other_host else self.host_of(device)
        return self._answer(np.array(work.seconds_at_peak(device)), (host, device.name, code), slots)

    def host_of(self, device: Device) -> str:
        """The measured host that answers for a GPU: of several the one with most points; ANOTHER_HOST without any."""
        return self._hosts.get(device.name, ANOTHER_HOST)

    def at_point(self, point: TimedPoint, *, is_other_host: bool = False) -> StepTime:
        """What is forecast for a measured point, of its own host unless asked otherwise, its own error counted in."""
        host = ANOTHER_HOST if is_other_host else point.host
        group = (host, point.device.name, point.code)
        return self._answer(np.array(point.work().seconds_at_peak(point.device)), group, point.slots, point.error_frac)

    def _answer(self, work: np.ndarray, group: time_fit.Group, slots: float, error_frac: float = 0.0) -> StepTime:
        found = self.fit.forecast(work, group, error_frac)
        factor = math.exp(found.log_half_width)
        named = dict(zip(TERM_NAMES, found.terms_s, strict=True)) | {OVERLAP_NAME: found.overlap_s}
        _, device, code = group
        largest = self._largest_slots.get((device, code))
        return StepTime(
            median_s=found.median_s,
            low_s=found.median_s / factor,
            high_s=found.median_s * factor,
            is_extrapolated=self._is_extrapolated(group),
            basis=self._basis(group),
            terms=tuple((name, seconds) for name, seconds in named.items() if seconds),
            slots_over_measured=None if largest is None else slots / largest,
        )

    def _is_extrapolated(self, group: time_fit.Group) -> bool:
        _, device, code = group
        if not self._count_of_device[device]:
            return True
        # Their kernels are tuned on one GPU, and nothing of a host hides how fast they are on another.
        is_of_another_gpu = code.endswith(GRAPHS) and (device, code) not in self._largest_slots
        return self._count_of_code[code] < MIN_POINTS_OF_A_CODE or is_of_another_gpu

    def _basis(self, group: time_fit.Group) -> str:
        host, device, code = group
        here = self.fit.num_points.get(group, 0)
        parts = []
        num_devices = len(self.fit.names[time_fit.DEVICE])
        if here:
            parts.append(f"{here} measured {'point' if here == 1 else 'points'} of {code} on {host}")
        elif not self._count_of_device[device]:
            parts.append(f"nothing measured on {device}: its data sheet, and the spread of {num_devices} GPUs")
        else:
            parts.append(f"{self._count_of_device[device]} measured points on {device}")
            if host == ANOTHER_HOST:
                parts.append(f"the spread of {len(self.fit.names[time_fit.HOST])} hosts")
        if not self._count_of_code[code]:
            parts.append(f"nothing measured of {code}: counts of its work alone")
        elif not here:
            count = self._count_of_code[code]
            parts.append(f"{count} measured {'point' if count == 1 else 'points'} of {code}")
        return "; ".join(parts)


def _hosts(points: Sequence[TimedPoint]) -> dict[str, str]:
    """GPU -> the host with most points of it."""
    counts = Counter((point.device.name, point.host) for point in points)
    return {device: host for (device, host), _ in sorted(counts.items(), key=lambda item: item[1])}


@cache
def default_model() -> TimeModel:
    """Fitted to the paper's points and this project's own."""
    return TimeModel((*paper_points(), *own_points()))


def calibrated(points: Sequence[TimedPoint], base: TimeModel | None = None) -> TimeModel:
    """The base, default_model() if none is given, refitted with the user's own points, whose host then answers.

    Points that the base has already count once, as the user's.
    """
    base = base or default_model()
    return TimeModel(without(base.points, points), (*without(base.own, points), *points))


def without(points: Sequence[TimedPoint], others: Sequence[TimedPoint]) -> tuple[TimedPoint, ...]:
    """The points that are no measurement of the others."""
    known = {point.measurement for point in others}
    return tuple(point for point in points if point.measurement not in known)
