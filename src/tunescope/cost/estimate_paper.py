"""`estimate --method paper`: the paper's own equations for the GPUs that it has, and the points that it measured."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tunescope import paper
from tunescope.cost import paper_constants
from tunescope.cost.estimate_inputs import DENSE, MAX_QUERIES, SPARSE
from tunescope.cost.estimate_recipes import checked_epochs
from tunescope.cost.estimate_runs import ALL, FASTEST, MAX
from tunescope.cost.estimate_table import read_batch
from tunescope.cost.lengths import paper_lengths
from tunescope.cost.paper_model import PaperEstimate, paper_estimate
from tunescope.cost.prices import read_user_prices
from tunescope.errors import UserError


def paper_rows(
    model: str,
    data: str,
    *,
    epochs: float | None = None,
    queries: int | None = None,
    gpus: Sequence[str] = ("all",),
    batch: int | str | None = None,
    sparsity: str | None = None,
    cutoff_len: int | None = None,
    prices: Sequence[str] = (),
) -> list[PaperEstimate]:
    """The paper's own estimate for its GPUs: Equation 1, Equation 2, and the price (cost/paper_model.py).

    epochs: None: 1. queries: None: those of the data set. gpus: all for the paper's four. batch: max and None: Equation
    1's. Raises UserError for what it has not.
    """
    model, data = model.lower(), data.lower() if data.lower() in paper_constants.datasets() else data
    num_epochs = checked_epochs(1.0 if epochs is None else epochs, "--epochs")
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
    if queries > MAX_QUERIES:
        raise UserError(f"--queries is {queries}; it must be up to {MAX_QUERIES:,}")
    size = MAX if batch is None else read_batch(batch)
    if size == FASTEST:
        raise UserError("the paper's method knows no fastest batch", cure="use max, a number, or --method ours")
    names = [part.strip().lower() for name in gpus for part in name.split(",") if part.strip()]
    if not names:
        raise UserError("--gpu names no GPU", cure="name some, as a40,h100-80gb, or all")
    chosen = list(paper_constants.GPU_MEMORY_GB) if ALL in names else [paper_constants.paper_gpu(n) for n in names]
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
            epochs=num_epochs,
            gpu=gpu,
            price_usd_per_hour=None if price is None else price.usd_per_hour,
            seq_len_tokens=cutoff_len,
            batch_size=size if isinstance(size, int) else None,
        )
        if price is not None:
            by_paper = replace(by_paper, price_source=f"{price.provider}, {price.date}")
        found.append(by_paper)
    return found


def _of_papers_gpus(prices: Sequence[Any]) -> list[Any]:
    kept = []
    for price in prices:
        try:
            paper_constants.paper_gpu(price.gpu)
        except UserError:
            continue
        kept.append(price)
    return kept


@dataclass(frozen=True, kw_only=True)
class FromMeasured:
    """A run by the throughput that the paper measured at the batch (queries/s), as its Table IV is made."""

    queries_per_s: float
    hours: float
    cost_usd: float | None


def from_measured(found: PaperEstimate) -> FromMeasured | None:
    """None where the paper measured no such point."""
    for row in paper.rows("throughput"):
        key = (
            row["model"],
            row["dataset"],
            row["sparsity"],
            row["gpu"],
            int(row["sweep_batch_size"] or row["batch_size"]),
        )
        if key == (found.model, found.dataset, found.sparsity, found.gpu, found.batch_size):
            queries_per_s = float(row["throughput_queries_per_s"])
            hours = found.num_queries * found.epochs / queries_per_s / 3600
            price = found.price_usd_per_hour
            return FromMeasured(
                queries_per_s=queries_per_s, hours=hours, cost_usd=None if price is None else hours * price
            )
    return None


@dataclass(frozen=True, kw_only=True)
class TableIvRow:
    """What Table IV prints (USD), and what Equation 2 gives for its own GPU, batch, queries and price."""

    gpu: str
    batch_size: int
    printed_usd: float
    by_equation_usd: float

    @property
    def difference_percent(self) -> float:
        return 100 * (self.by_equation_usd / self.printed_usd - 1)


def table_iv() -> tuple[TableIvRow, ...]:
    """All rows of it."""
    found = []
    for row in paper.rows("cost_table"):
        if row["figure"] != "Table IV":
            continue
        by_equation = paper_estimate(
            row["model"],
            row["dataset"],
            float(row["gpu_memory_gb"]),
            row["sparsity"],
            num_queries=float(row["queries_assumed"]),
            epochs=float(row["epochs"]),
            gpu=row["gpu"],
            batch_size=int(row["batch_size"]),
        )
        assert by_equation.cost_usd is not None
        found.append(
            TableIvRow(
                gpu=row["gpu"],
                batch_size=int(row["batch_size"]),
                printed_usd=float(row["cost_printed_usd"]),
                by_equation_usd=by_equation.cost_usd,
            )
        )
    return tuple(found)


def paper_records(found: Sequence[PaperEstimate]) -> list[dict[str, Any]]:
    """As rows, what is missing in one cell; measured_*: by the throughput that the paper measured at the batch."""
    return [_record(each, from_measured(each)) for each in found]


def _record(each: PaperEstimate, measured: FromMeasured | None) -> dict[str, Any]:
    return asdict(each) | {
        "missing": "; ".join(each.missing),
        "measured_queries_per_s": measured and measured.queries_per_s,
        "measured_hours": measured and measured.hours,
        "measured_cost_usd": measured and measured.cost_usd,
    }
