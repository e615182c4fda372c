"""`tunescope.cost.estimate`: what a fine-tuning run takes on each GPU, as a table. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tunescope.cost.energy import PowerPoint, read_power
from tunescope.cost.estimate_inputs import Run, read_run
from tunescope.cost.estimate_memory import gpu_memory_bytes
from tunescope.cost.estimate_runs import FASTEST, MAX, Estimate, StepTimes, estimate_runs, find_gpus
from tunescope.cost.prices import Offer, break_even_usd_per_hour, cheapest, read_user_prices
from tunescope.errors import UserError
from tunescope.hardware import GIB

if TYPE_CHECKING:
    import pandas as pd

    from tunescope.cost.time_calibration import Calibration

OURS, PAPER = METHODS = ("ours", "paper")
COLUMNS = (
    "gpu", "status", "cause", "model", "sparsity", "top_k", "moe_path", "is_graph_replayed", "data", "batch_size",
    "max_batch_size", "num_queries", "epochs", "tokens_per_epoch", "padding_frac", "cutoff_len_tokens",
    "longest_tokens", "num_queries_cut",
    "num_steps", "step_s", "step_s_low", "step_s_high", "queries_per_s", "queries_per_s_low",
    "queries_per_s_high", "hours", "hours_low", "hours_high", "is_extrapolated", "basis", "needed_gib",
    "gpu_memory_gib", "peak_moment", "usd", "usd_low", "usd_high", "usd_per_hour", "price_provider", "price_date",
    "price_source", "break_even_usd_per_hour", "is_cheapest", "is_fastest", "energy_kwh", "energy_kwh_low",
    "energy_kwh_high", "energy_j_per_query", "power_w", "power_kind", "max_batch_hours", "faster_batch_size",
    "faster_hours", "slots_over_measured", "num_recomputed_layers",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Answer:
    """All GPUs' estimates of one run. calibration: by the user's points; None without."""

    run: Run
    estimates: tuple[Estimate, ...]
    calibration: "Calibration | None" = None

    @property
    def offers(self) -> list[Offer]:
        return [each.offer for each in self.estimates if each.offer is not None]

    @property
    def cheapest(self) -> Estimate | None:
        """Of those that have a price; None if none has."""
        priced = [each for each in self.estimates if each.offer is not None]
        if not priced:
            return None
        best = cheapest(self.offers)
        return next(each for each in priced if each.offer == best)

    @property
    def fastest(self) -> Estimate | None:
        """None if the run fits nowhere."""
        fitting = [each for each in self.estimates if each.hours is not None]
        return min(fitting, key=lambda each: each.hours.median if each.hours else 0, default=None)

    def break_even_usd_per_hour(self, found: Estimate) -> float | None:
        """What an hour of this GPU may cost until the run is as dear there as on the cheapest; None without a price."""
        best = self.cheapest
        if best is None or best.offer is None or found.hours is None:
            return None
        return break_even_usd_per_hour(best.offer, found.hours.median)


def answer(
    model: str = "mixtral",
    data: str = "cs",
    *,
    epochs: float | None = None,
    queries: int | None = None,
    gpus: Sequence[str] = ("all",),
    batch: int | str | None = None,
    sparsity: str | None = None,
    top_k: int | None = None,
    cutoff_len: int | None = None,
    recipe: Mapping[str, Any] | None = None,
    moe: str | None = None,
    graphs: bool | None = None,
    recompute: str | None = None,
    prices: Sequence[str] = (),
    calibrate: Path | None = None,
    step_times: StepTimes | None = None,
) -> Answer:
    """Arguments and errors as for `estimate`."""
    run = read_run(
        model,
        data,
        epochs=epochs,
        queries=queries,
        sparsity=sparsity,
        top_k=top_k,
        cutoff_len=cutoff_len,
        recipe=recipe,
        moe_path=moe,
        graphs=graphs,
        recompute=recompute,
    )
    devices, user_prices = find_gpus(gpus), read_user_prices(prices)
    size = read_batch(FASTEST if batch is None and run.recipe_batch_size is None else batch or run.recipe_batch_size)
    calibration: Calibration | None = None
    power_points: tuple[PowerPoint, ...] = ()
    if calibrate is not None:
        from tunescope.cost.time_calibration import calibrate_from

        calibration, power_points = calibrate_from(calibrate, cast(Any, step_times)), read_power(calibrate)
        step_times = calibration.model
    elif step_times is None:
        from tunescope.cost.time_model import default_model

        step_times = default_model()
    found = estimate_runs(
        run,
        devices,
        step_times,
        batch=size,
        prices=user_prices,
        power_points=power_points,
        own_devices=() if calibration is None else calibration.devices,
        before=None if calibration is None else calibration.base,
    )
    return Answer(run=run, estimates=found, calibration=calibration)


def read_batch(batch: int | str | None) -> int | str:
    """A size, FASTEST or MAX, in any case. Raises UserError for anything else."""
    if isinstance(batch, str):
        batch = batch.strip().lower()
        if batch in (FASTEST, MAX):
            return batch
        if batch.isascii() and batch.isdigit() and len(batch) < 10:
            batch = int(batch)
    if type(batch) is not int or batch < 1:
        raise UserError(f"--batch is {batch!r}; it must be a whole number from 1, {FASTEST} or {MAX}")
    return batch


def estimate(
    model: str = "mixtral",
    data: str = "cs",
    *,
    epochs: float | None = None,
    queries: int | None = None,
    gpus: Sequence[str] = ("all",),
    batch: int | str | None = None,
    sparsity: str | None = None,
    top_k: int | None = None,
    cutoff_len: int | None = None,
    recipe: Mapping[str, Any] | None = None,
    moe: str | None = None,
    graphs: bool | None = None,
    recompute: str | None = None,
    prices: Sequence[str] = (),
    calibrate: Path | None = None,
    step_times: StepTimes | None = None,
) -> "pd.DataFrame":
    """What fine-tuning takes on each GPU: one row a GPU with COLUMNS; a GPU that is too small has status `too small`.

    model: a family's name, a folder with a config.json, or a config.json. data: cs, math, a histogram (.csv) or a data
    file (.json, .jsonl). epochs: None: the recipe's, else 1. queries: trained in an epoch; None: as the recipe limits
    them, else all of the data. gpus: names, or all. batch: queries a micro-batch; max: the largest that fits; fastest:
    of those that fit, the one that takes least time; None: the recipe's, else fastest. sparsity: sparse or dense;
    top_k: instead of it. cutoff_len: instead of the recipe's (tokens). recipe: LLaMA-Factory's keys; None: the
    family's. moe: path of the experts, stock, grouped or loop; None: the family's. graphs: with grouped experts,
    whether steps are replayed as CUDA graphs; None: as the launchers do. recompute: of the layers all, none or, where
    grouped, auto: as few as memory allows; None: as the recipe says. prices: GPU=USD_PER_HOUR or a CSV, before the
    table's. calibrate: folder of measured points. step_times: instead of the default model of step times.

    Intervals (_low, _high) are of 90 %; of an energy whose power_kind is a bound energy_kwh is the upper end. Raises
    UserError for what is unknown or not modelled.
    """
    import pandas as pd

    found = answer(
        model,
        data,
        epochs=epochs,
        queries=queries,
        gpus=gpus,
        batch=batch,
        sparsity=sparsity,
        top_k=top_k,
        cutoff_len=cutoff_len,
        recipe=recipe,
        moe=moe,
        graphs=graphs,
        recompute=recompute,
        prices=prices,
        calibrate=calibrate,
        step_times=step_times,
    )
    return pd.DataFrame(rows(found), columns=list(COLUMNS))


def rows(found: Answer) -> list[dict[str, Any]]:
    """One a GPU, with COLUMNS."""
    return [dict.fromkeys(COLUMNS) | _row(found, each) for each in found.estimates]


def _row(found: Answer, each: Estimate) -> dict[str, Any]:
    run = found.run
    row: dict[str, Any] = {
        "gpu": each.device.name,
        "status": "ok" if each.why_not is None else "too small",
        "cause": each.why_not or each.no_price,
        "model": run.model.name,
        "sparsity": run.model.sparsity,
        "top_k": run.model.top_k,
        "moe_path": run.model.moe_path,
        "is_graph_replayed": each.graphs,
        "data": run.lengths.source,
        "batch_size": each.batch_size,
        "max_batch_size": each.max_batch_size,
        "num_queries": run.lengths.num_queries,
        "epochs": run.epochs,
        "tokens_per_epoch": run.lengths.total_tokens,
        "cutoff_len_tokens": run.cutoff_len_tokens,
        "longest_tokens": run.longest_tokens,
        "num_queries_cut": run.num_cut,
        "gpu_memory_gib": gpu_memory_bytes(each.device) / GIB,
    }
    if each.hours is None or each.step is None or each.padding is None:
        return row
    assert each.peak is not None
    assert each.needed_bytes is not None
    row |= {
        "padding_frac": each.padding.padding_frac,
        "num_steps": each.num_steps,
        "step_s": each.step.median_s,
        "step_s_low": each.step.low_s,
        "step_s_high": each.step.high_s,
        "is_extrapolated": each.step.is_extrapolated,
        "basis": each.step.basis,
        "needed_gib": each.needed_bytes / GIB,
        "peak_moment": each.peak.moment,
        "break_even_usd_per_hour": found.break_even_usd_per_hour(each),
        "is_cheapest": each is found.cheapest,
        "is_fastest": each is found.fastest,
        "energy_kwh": each.energy_kwh,
        "energy_kwh_low": each.energy_kwh_interval.low if each.energy_kwh_interval else None,
        "energy_kwh_high": each.energy_kwh_interval.high if each.energy_kwh_interval else None,
        "energy_j_per_query": each.energy_j_per_query,
        "power_w": each.power.watts if each.power else None,
        "power_kind": each.power.kind if each.power else None,
        "max_batch_hours": each.max_batch_hours,
        "slots_over_measured": each.step.slots_over_measured,
        "num_recomputed_layers": each.num_recomputed,
        "faster_batch_size": each.faster_batch_size,
        "faster_hours": each.faster_hours,
    }
    for name, value in (("queries_per_s", each.queries_per_s), ("hours", each.hours), ("usd", each.usd)):
        if value is not None:
            row |= {name: value.median, f"{name}_low": value.low, f"{name}_high": value.high}
    if each.price is not None:
        row |= {
            "usd_per_hour": each.price.usd_per_hour,
            "price_provider": each.price.provider,
            "price_date": each.price.date,
            "price_source": each.price.source,
        }
    return row
