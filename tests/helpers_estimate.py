"""A model of step times that tests can see through."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunescope.cost.estimate_runs import Estimate
from tunescope.cost.estimate_table import Answer, answer
from tunescope.hardware import Device

FLOOR_S = 1.0
FLOP_PER_SLOT = 1e11


@dataclass(frozen=True)
class FakeStep:
    median_s: float
    low_s: float
    high_s: float
    is_extrapolated: bool
    basis: str
    terms: tuple[tuple[str, float], ...]
    slots_over_measured: float | None = None


class FakeTimes:
    """A floor, and so much FLOP a slot and expert at the GPU's peak; +- 20 %, 40 % in a host that was not measured."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

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
    ) -> FakeStep:
        self.asked.append(
            {"device": device.name, "batch_size": batch_size, "slots": slots, "key_slots": key_slots,
             "moe_path": moe_path, "is_other_host": is_other_host, "graphs": graphs,
             "num_recomputed": num_recomputed}
        )  # fmt: skip
        work_s = slots * (1 + config.get("num_experts_per_tok", 1)) * FLOP_PER_SLOT / device.peak_bf16_flop_per_s
        median_s = FLOOR_S + work_s
        factor = 1.4 if is_other_host else 1.2
        terms = (("floor", FLOOR_S), ("work", work_s))
        return FakeStep(median_s, median_s / factor, median_s * factor, "L40S" in device.name, "a fake", terms)


def only(asked: Answer) -> Estimate:
    (found,) = asked.estimates
    return found


def ask(model: str = "mixtral", data: str = "math", **more: Any) -> Answer:
    """On the A40 by FakeTimes, unless asked otherwise."""
    return answer(model, data, **{"gpus": ["a40"], "step_times": FakeTimes()} | more)


def hours(**more: Any) -> float:
    found = only(ask(**more)).hours
    assert found is not None
    return found.median
