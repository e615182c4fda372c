"""`tunescope.cost.estimate`: what a fine-tuning run takes on each GPU, as a table. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunescope.cost.energy import PowerPoint, read_power
from tunescope.cost.estimate_inputs import DENSE, SPARSE, Run, read_run
from tunescope.cost.estimate_memory import gpu_memory_bytes
from tunescope.cost.estimate_runs import MAX, Estimate, StepTimes, estimate_runs, find_gpus
from tunescope.cost.paper_model import PaperEstimate, paper_estimate
from tunescope.cost.prices import Offer, break_even_usd_per_hour, cheapest, read_user_prices
from tunescope.errors import UserError
from tunescope.hardware import GIB

if TYPE_CHECKING:
    import pandas as pd

OURS, PAPER = METHODS = ("ours", "paper")
COLUMNS = (
    "gpu", "status", "cause", "model", "sparsity", "top_k", "moe_path", "data", "batch_size", "max_batch_size",
    "num_queries", "epochs", "tokens_per_epoch", "padding_frac", "cutoff_len_tokens", "longest_tokens",
    "num_queries_cut", "num_steps", "step_s", "step_s_low", "step_s_high", "queries_per_s", "queries_per_s_low",
    "queries_per_s_high", "hours", "hours_low", "hours_high", "is_extrapolated", "basis", "needed_gib",
    "gpu_memory_gib", "peak_moment", "usd", "usd_low", "usd_high", "usd_per_hour", "price_provider", "price_date",
    "price_source", "break_even_usd_per_hour", "is_cheapest", "is_fastest", "energy_kwh", "energy_j_per_query",
    "power_w", "power_kind", "faster_batch_size", "faster_hours",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Answer:
    """All GPUs' estimates of one run. calibration: what the user's points changed, a sentence; None without."""

    run: Run
    estimates: tuple[Estimate, ...]
    calibration: str | None = None

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
    epochs: float = 1.0,
    queries: int | None = None,
    gpus: Sequence[str] = ("all",),
    batch: int | str = MAX,
    sparsity: str | None = None,
    top_k: int | None = None,
    cutoff_len: int | None = None,
    recipe: Mapping[str, Any] | None = None,
    moe_path: str | None = None,
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
        moe_path=moe_path,
    )
    devices, user_prices, size = find_gpus(gpus), read_user_prices(prices), _batch(batch)
    calibration: str | None = None
    own: tuple[str, ...] = ()
    power_points: tuple[PowerPoint, ...] = ()
    if calibrate is not None:
        step_times, calibration, own, power_points = _calibrated(calibrate, step_times)
    elif step_times is None:
        from tunescope.cost.time_model import default_model

        step_times = default_model()
    found = estimate_runs(
        run, devices, step_times, batch=size, prices=user_prices, power_points=power_points, own_devices=own
    )
    return Answer(run=run, estimates=found, calibration=calibration)


def _calibrated(folder: Path, base: Any) -> tuple[StepTimes, str, tuple[str, ...], tuple[PowerPoint, ...]]:
    from tunescope.cost.time_calibration import calibrate_from

    found = calibrate_from(folder, base)
    return found.model, str(found), found.devices, read_power(folder)


def _batch(batch: int | str) -> int | None:
    """None for `max`."""
    if batch == MAX:
        return None
    if isinstance(batch, str) and batch.isascii() and batch.isdigit() and len(batch) < 10:
        batch = int(batch)
    if type(batch) is not int or batch < 1:
        raise UserError(f"--batch is {batch!r}; it must be a whole number from 1, or max")
    return batch


def estimate(
    model: str = "mixtral",
    data: str = "cs",
    *,
    epochs: float = 1.0,
    queries: int | None = None,
    gpus: Sequence[str] = ("all",),
    batch: int | str = MAX,
    sparsity: str | None = None,
    top_k: int | None = None,
    cutoff_len: int | None = None,
    recipe: Mapping[str, Any] | None = None,
    moe_path: str | None = None,
    prices: Sequence[str] = (),
    calibrate: Path | None = None,
    step_times: StepTimes | None = None,
) -> "pd.DataFrame":
    """What fine-tuning takes on each GPU: one row a GPU with COLUMNS; a GPU that is too small has status `too small`.

    model: a family's name, a folder with a config.json, or a config.json. data: cs, math, a histogram (.csv) or a data
    file (.json, .jsonl). queries: trained in an epoch; None: all of the data. gpus: names, or all. batch: queries a
    micro-batch, or max. sparsity: sparse or dense; top_k: instead of it. cutoff_len: instead of the recipe's (tokens).
    recipe: LLaMA-Factory's keys; None: the family's. moe_path: stock, grouped or loop; None: the family's.
    prices: GPU=USD_PER_HOUR or a CSV, before the table's. calibrate: folder of measured points. step_times: instead of
    the default model of step times.

    Intervals (_low, _high) are of 90 %. Raises UserError for what is unknown or not modelled.
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
        moe_path=moe_path,
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
        "energy_j_per_query": each.energy_j_per_query,
        "power_w": each.power.watts if each.power else None,
        "power_kind": each.power.kind if each.power else None,
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


# --- the paper's method ---


def paper_rows(
    model: str,
    data: str,
    *,
    epochs: float = 1.0,
    queries: int | None = None,
    gpus: Sequence[str] = ("all",),
    batch: int | str = MAX,
    sparsity: str | None = None,
    cutoff_len: int | None = None,
    prices: Sequence[str] = (),
) -> list[PaperEstimate]:
    """The paper's own estimate for its GPUs: Equation 1, Equation 2, and the price (cost/paper_model.py).

    queries: None: those of the data set. gpus: all for the paper's four. Raises UserError for what it has not.
    """
    from tunescope.cost import paper_constants
    from tunescope.cost.lengths import paper_lengths

    if queries is None:
        queries = paper_lengths(data).num_queries if data in ("cs", "math") else None
    if queries is None:
        raise UserError(
            f"the paper's method has no number of queries for data {data!r}",
            cause="it knows data sets by name, and lengths of cs and math only",
            cure="give --queries, or use --method ours",
        )
    if sparsity not in (None, SPARSE, DENSE):
        raise UserError(f"--sparsity {sparsity!r} is unknown to the paper's model", cure=f"use {SPARSE} or {DENSE}")
    names = [part.strip() for name in gpus for part in name.split(",") if part.strip()]
    chosen = list(paper_constants.GPU_MEMORY_GB) if "all" in names else [paper_constants.paper_gpu(n) for n in names]
    given = {paper_constants.paper_gpu(price.gpu): price for price in _of_papers_gpus(read_user_prices(prices))}
    found = []
    for gpu in dict.fromkeys(chosen):
        price = given.get(gpu)
        by_paper = paper_estimate(
            model,
            data,
            paper_constants.GPU_MEMORY_GB[gpu],
            sparsity or SPARSE,
            num_queries=queries,
            epochs=epochs,
            gpu=gpu,
            price_usd_per_hour=None if price is None else price.usd_per_hour,
            seq_len_tokens=cutoff_len,
            batch_size=_batch(batch),
        )
        if price is not None:
            by_paper = replace(by_paper, price_source=f"{price.provider}, {price.date}")
        found.append(by_paper)
    return found


def _of_papers_gpus(prices: Sequence[Any]) -> list[Any]:
    from tunescope.cost import paper_constants

    kept = []
    for price in prices:
        try:
            paper_constants.paper_gpu(price.gpu)
        except UserError:
            continue
        kept.append(price)
    return kept


def paper_records(found: Sequence[PaperEstimate]) -> list[dict[str, Any]]:
    """As rows, what is missing in one cell."""
    return [asdict(each) | {"missing": "; ".join(each.missing)} for each in found]
