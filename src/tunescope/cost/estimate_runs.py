"""Hours, USD and energy of a fine-tuning run on each GPU, with a 90 % interval. No torch.

Tokens and padding from the data, the batch from memory, seconds of a step from the model of step times, and from these
what the run takes. docs/estimating.md says how far each part is to be trusted.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from tunescope.cost import memory
from tunescope.cost.energy import BOUND, Power, PowerPoint, power_of
from tunescope.cost.estimate_inputs import AUTO, Run
from tunescope.cost.estimate_memory import (
    fewest_recomputed,
    gpu_memory_bytes,
    max_batch_size,
    needed_bytes,
    why_not,
)
from tunescope.cost.lengths import Lengths
from tunescope.cost.padding import BatchLengths, EpochPadding, pad_epoch
from tunescope.cost.prices import Offer, Price, find_gpu, find_price
from tunescope.errors import UserError
from tunescope.hardware import DEVICES, Device

# Instead of a batch size: the one that takes least time, and the largest that fits.
FASTEST, MAX = "fastest", "max"
ALL = "all"
# A smaller batch is named as the faster one if it saves at least this part of the hours.
_WORTH_NAMING_FRAC = 0.03
_ONE_GROUPED_MATMUL = ((9, 0), (10, 0))  # tunescope.kernels.moe: elsewhere it goes group by group


class StepTimeLike(Protocol):
    """time_model.StepTime."""

    @property
    def median_s(self) -> float: ...
    @property
    def low_s(self) -> float: ...
    @property
    def high_s(self) -> float: ...
    @property
    def is_extrapolated(self) -> bool: ...
    @property
    def basis(self) -> str: ...
    @property
    def terms(self) -> tuple[tuple[str, float], ...]: ...
    @property
    def slots_over_measured(self) -> float | None: ...


class StepTimes(Protocol):
    """time_model.TimeModel, as far as it is asked here."""

    def step_time(
        self,
        config: Mapping[str, Any],
        recipe: Mapping[str, Any],
        device: Device,
        *,
        batch_size: int,
        slots: float,
        key_slots: float | None = None,
        moe_path: str = "stock",
        is_other_host: bool = False,
        graphs: bool = False,
        num_recomputed: int | None = None,
    ) -> StepTimeLike: ...


@dataclass(frozen=True)
class Hours:
    """Of a whole run, with a 90 % interval: a step's error is that of all steps, so it does not average out."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Energy:
    """Of a whole run (kWh). low, high: with the interval of its hours. Of a bound only the upper end is known."""

    median: float | None
    low: float | None
    high: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimate:
    """One GPU's answer. What is None is not known: why_not says why nothing fits, no_price why there is no price.

    batch_size: None where none fits. num_steps: optimizer steps of the whole run, the last of an epoch with what
    micro-batches are left. price: with its date and source. power: mean of the run, or its bound. step: of a usual
    batch; step_before: the same one by the model that was not calibrated, None without calibration. max_batch_hours:
    what the largest batch would take, where the fastest is another. faster_batch_size: where the largest was asked for,
    one that takes less time, with its hours; None where there is none worth naming. num_recomputed: layers, where
    memory decided how many; None: as the recipe says.
    """

    run: Run
    device: Device
    max_batch_size: int
    batch_size: int | None = None
    why_not: str | None = None
    peak: memory.Peak | None = None
    needed_bytes: int | None = None
    padding: EpochPadding | None = None
    num_steps: float | None = None
    step: StepTimeLike | None = None
    step_before: StepTimeLike | None = None
    hours: Hours | None = None
    price: Price | None = None
    no_price: str | None = None
    power: Power | None = None
    max_batch_hours: float | None = None
    faster_batch_size: int | None = None
    faster_hours: float | None = None
    num_recomputed: int | None = None

    @property
    def graphs(self) -> bool:
        """Whether steps are replayed as CUDA graphs."""
        return self.run.graphs and can_replay(self.device)

    @cached_property
    def num_queries(self) -> float:
        """Of all epochs."""
        return self.run.lengths.num_queries * self.run.epochs

    @property
    def queries_per_s(self) -> Hours | None:
        """With its interval; not hours, but of the same form."""
        if self.hours is None:
            return None
        rate = self.num_queries / 3600
        return Hours(rate / self.hours.median, rate / self.hours.high, rate / self.hours.low)

    @property
    def usd(self) -> Hours | None:
        if self.hours is None or self.price is None:
            return None
        price = self.price.usd_per_hour
        return Hours(self.hours.median * price, self.hours.low * price, self.hours.high * price)

    @property
    def offer(self) -> Offer | None:
        return None if self.hours is None or self.price is None else Offer(self.price, self.hours.median)

    @property
    def energy_kwh(self) -> float | None:
        """Of the GPU alone; with a bound of the power an upper bound, at the upper end of the hours."""
        energy = self.energy_kwh_interval
        return None if energy is None else energy.high if energy.median is None else energy.median

    @property
    def energy_kwh_interval(self) -> Energy | None:
        if self.hours is None or self.power is None:
            return None
        kilowatts = self.power.watts / 1000
        high = kilowatts * self.hours.high
        if self.power.kind == BOUND:
            return Energy(None, None, high)
        return Energy(kilowatts * self.hours.median, kilowatts * self.hours.low, high)

    @property
    def energy_j_per_query(self) -> float | None:
        """As energy_kwh."""
        return None if self.energy_kwh is None else self.energy_kwh * 3.6e6 / self.num_queries


def can_replay(device: Device) -> bool:
    """Whether steps of grouped experts can be CUDA graphs: torch's grouped matmul waits for the host on other GPUs."""
    return device.compute_capability in _ONE_GROUPED_MATMUL


def find_gpus(names: Sequence[str]) -> tuple[Device, ...]:
    """Of hardware.py, in its order for ALL. Raises UserError for an unknown or ambiguous name, and for none."""
    wanted = [part.strip() for name in names for part in name.split(",") if part.strip()]
    if not wanted:
        raise UserError("--gpu names no GPU", cure="name some, as a40,h100, or all")
    if ALL in (name.lower() for name in wanted):
        return DEVICES
    return tuple(dict.fromkeys(find_gpu(name) for name in wanted))


def estimate_runs(
    run: Run,
    devices: Sequence[Device],
    step_times: StepTimes,
    *,
    batch: int | str = FASTEST,
    prices: Sequence[Price] = (),
    power_points: Sequence[PowerPoint] = (),
    own_devices: Sequence[str] = (),
    before: StepTimes | None = None,
) -> tuple[Estimate, ...]:
    """One for each GPU, in the order given.

    batch: queries of a micro-batch; FASTEST: of those that fit the one that takes least time; MAX: the largest that
    fits. prices: the user's, before the table's. own_devices: names of GPUs whose host step_times was calibrated on;
    others are taken to be in a host that was not measured. before: the model that was calibrated.
    Raises UserError for what is not modelled, and for a batch that the data cannot fill.
    """
    if isinstance(batch, int) and not 1 <= batch <= run.lengths.num_queries:
        raise UserError(
            f"a batch of {batch} queries cannot be made of {run.lengths.num_queries}",
            cause="; ".join(f"{device.name} would hold {_held(run, device)}" for device in devices[:3]),
            cure=f"use --batch from 1 to {run.lengths.num_queries}, {FASTEST} or {MAX}",
        )
    made = _Estimator(run, step_times, power_points, frozenset(own_devices), before)
    return tuple(made.estimate(device, batch, prices) for device in devices)


def _held(run: Run, device: Device) -> int:
    """The largest batch that memory holds, however many queries there are."""
    return memory.max_batch_size(
        run.model.config, run.recipe, gpu_memory_bytes(device), run.longest_tokens, moe_path=run.model.moe_path
    )


def _sizes_to_try(largest: int) -> list[int]:
    """Two an octave, the same ones below every limit, and the largest: padding and steps change little in between."""
    octaves = range(largest.bit_length())
    grid = {size for power in octaves for size in (2**power, 3 * 2**power // 2) if 1 <= size < largest}
    return [*sorted(grid), largest]


class _Estimator:
    """Keeps what several GPUs and batch sizes share: padding by batch size."""

    def __init__(
        self,
        run: Run,
        step_times: StepTimes,
        power_points: Sequence[PowerPoint],
        own_devices: frozenset[str],
        before: StepTimes | None,
    ) -> None:
        self._run, self._step_times, self._before = run, step_times, before
        self._power_points, self._own_devices = power_points, own_devices
        self._paddings: dict[tuple[int, int], EpochPadding] = {}
        self._recomputed: dict[tuple[str, int], int] = {}
        self._accumulation = int(run.recipe.get("gradient_accumulation_steps", 1))

    def estimate(self, device: Device, batch: int | str, prices: Sequence[Price]) -> Estimate:
        run = self._run
        config, recipe, longest = run.model.config, run.recipe, run.longest_tokens
        moe_path = run.model.moe_path
        largest = max_batch_size(config, recipe, gpu_memory_bytes(device), longest, run.lengths.num_queries, moe_path)
        asked = batch if isinstance(batch, int) else None
        if largest < (asked or 1):
            return Estimate(
                run=run,
                device=device,
                max_batch_size=largest,
                why_not=why_not(config, recipe, device, asked or 1, longest, moe_path),
            )
        by_hours: dict[int, float] = {}
        if asked is None:
            by_hours = {size: self._median_hours(device, run.lengths, size) for size in _sizes_to_try(largest)}
        fastest = min(by_hours, key=by_hours.__getitem__, default=largest)
        size = asked or (fastest if batch == FASTEST else largest)
        faster = batch == MAX and by_hours[fastest] <= (1 - _WORTH_NAMING_FRAC) * by_hours[largest]
        padding = self._padding(run.lengths, size)
        recomputed = self._num_recomputed(device, size)
        price, no_price = _price(device, prices)
        return Estimate(
            run=run,
            device=device,
            max_batch_size=largest,
            batch_size=size,
            peak=memory.peak(config, recipe, size, longest, moe_path=moe_path, num_recomputed=recomputed),
            needed_bytes=needed_bytes(config, recipe, size, longest, moe_path, recomputed),
            padding=padding,
            num_steps=math.ceil(padding.num_steps / self._accumulation) * run.epochs,
            step=self._step(device, padding.usual, size),
            step_before=None if self._before is None else self._step(device, padding.usual, size, before=self._before),
            hours=self._hours(device, size),
            price=price,
            no_price=no_price,
            power=power_of(device, config, size, self._power_points),
            max_batch_hours=by_hours[largest] if batch == FASTEST and fastest != largest else None,
            faster_batch_size=fastest if faster else None,
            faster_hours=by_hours[fastest] if faster else None,
            num_recomputed=recomputed,
        )

    def _num_recomputed(self, device: Device, size: int) -> int | None:
        """Of micro-batches of so many queries; None where memory does not decide it."""
        run = self._run
        if run.recompute != AUTO:
            return None
        key = (device.name, size)
        if key not in self._recomputed:
            self._recomputed[key] = fewest_recomputed(
                run.model.config, run.recipe, gpu_memory_bytes(device), size, run.longest_tokens
            )
        return self._recomputed[key]

    def _padding(self, lengths: Lengths, size: int) -> EpochPadding:
        key = (id(lengths), size)
        if key not in self._paddings:
            self._paddings[key] = pad_epoch(lengths, size)
        return self._paddings[key]

    def _step(
        self,
        device: Device,
        batch: BatchLengths,
        full_size: int,
        *,
        accumulation: int | None = None,
        before: StepTimes | None = None,
    ) -> StepTimeLike:
        """full_size: queries of all but an epoch's last batch. accumulation: micro-batches of the
        step, if others than the recipe's. before: the model to ask, of a host that was not measured, instead of this
        one."""
        size, recipe = batch.batch_size, self._run.recipe
        return (before or self._step_times).step_time(
            self._run.model.config,
            recipe if accumulation is None else recipe | {"gradient_accumulation_steps": accumulation},
            device,
            batch_size=size,
            slots=size * batch.mean_tokens,
            key_slots=size * batch.mean_of(lambda tokens: tokens * tokens / 2.0),
            moe_path=self._run.model.moe_path,
            is_other_host=before is not None or device.name not in self._own_devices,
            graphs=self._run.graphs and can_replay(device),
            num_recomputed=self._num_recomputed(device, full_size),
        )

    def _median_hours(self, device: Device, lengths: Lengths, size: int) -> float:
        """Of all epochs: the usual batches and the smaller one at the end of each."""
        padding, each = self._padding(lengths, size), self._accumulation
        num_usual = padding.num_steps - (padding.last is not None)
        usual_s = self._step(device, padding.usual, size).median_s
        seconds = num_usual * usual_s / each
        if padding.last is not None:
            seconds += self._step(device, padding.last, size).median_s / each
        if num_left := padding.num_steps % each:  # an epoch's last step has fewer micro-batches and a whole update
            seconds += (
                self._step(device, padding.usual, size, accumulation=num_left).median_s - num_left / each * usual_s
            )
        return seconds * self._run.epochs / 3600

    def _hours(self, device: Device, size: int) -> Hours:
        lengths = self._run.lengths
        step = self._step(device, self._padding(lengths, size).usual, size)
        median = self._median_hours(device, lengths, size)
        # Where tokens are estimated, the whole range of what was assumed about them is added to the interval.
        low, high = (self._median_hours(device, each, size) for each in lengths.bounds or (lengths, lengths))
        return Hours(
            median, min(low, median) * step.low_s / step.median_s, max(high, median) * step.high_s / step.median_s
        )


def _price(device: Device, prices: Sequence[Price]) -> tuple[Price | None, str | None]:
    try:
        return find_price(device.name, prices), None
    except UserError as error:
        return None, f"{error.what}: {error.cure}"
