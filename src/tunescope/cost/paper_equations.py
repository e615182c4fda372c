"""The arithmetic of the paper's model (arXiv 2408.04693, section V): Equation 1, Equation 2, the least squares behind
it, and the cost of a run. The constants are in paper_model.py.

active_expert_frac: top_k / num_experts, the paper's "sparsity": 1 dense, 0.25 sparse.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunescope.errors import UserError

# The three forms Equation 2 has in the paper and its scripts. They agree on sparse points as far as FITTED and PLOTTED
# go; PRINTED is another curve.
PRINTED = "printed"  # C4 + C2 ln(batch / (frac C3)): the text. frac and C3 only shift it
FITTED = "fitted"  # C4 + C2 ln(batch) / (frac C3): what the scripts hand to the fit
PLOTTED = "plotted"  # as fitted, but dense points C4 + C2 ln(batch): what they draw and take the RMSE of
FORMS = (PRINTED, FITTED, PLOTTED)

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, kw_only=True)
class MemoryConstants:
    """Of Equation 1. c0: queries x tokens that a GB holds; c1: what part of a query's memory goes with the active
    experts; model_memory_gb: of the weights."""

    c0_query_tokens_per_gb: float
    c1_frac: float
    model_memory_gb: float


@dataclass(frozen=True, kw_only=True)
class ThroughputConstants:
    """Of Equation 2. c2: slope per unit of the natural logarithm; c3: MoE attenuation, no unit; c4: intercept."""

    c2_queries_per_s: float
    c3: float
    c4_queries_per_s: float


@dataclass(frozen=True)
class Sweep:
    """Measured throughput of one model, GPU and data set: parallel arrays."""

    batch_size: Array
    active_expert_frac: Array
    queries_per_s: Array


def positive(name: str, value: float) -> float:
    """The value. Raises UserError unless it is a finite number above 0."""
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{name} is {value!r}; it must be a number above 0")
    return value


def max_batch_unfloored(
    constants: MemoryConstants, gpu_memory_gb: float, seq_len_tokens: float, active_expert_frac: float
) -> float:
    """Equation 1 without its floor (queries); what Figure 13 draws. Negative where the weights alone do not fit.

    gpu_memory_gb: as the vendor's sheet prints it. seq_len_tokens: of the longest padded query.
    Raises UserError for a number that is not above 0.
    """
    free_gb = positive("GPU memory (GB)", gpu_memory_gb) - constants.model_memory_gb
    moe_share = 1 - constants.c1_frac + constants.c1_frac * positive("active_expert_frac", active_expert_frac)
    return constants.c0_query_tokens_per_gb * free_gb / (positive("length (tokens)", seq_len_tokens) * moe_share)


def max_batch_size(
    constants: MemoryConstants, gpu_memory_gb: float, seq_len_tokens: float, active_expert_frac: float
) -> int:
    """Equation 1 as printed, with its floor (queries); 0 where not one query fits."""
    return max(0, math.floor(max_batch_unfloored(constants, gpu_memory_gb, seq_len_tokens, active_expert_frac)))


def throughput_queries_per_s(
    constants: ThroughputConstants, batch_size: float, active_expert_frac: float, form: str
) -> float:
    """Equation 2 at one batch size, in one of FORMS. Raises UserError for a number that is not above 0."""
    positive("batch size", batch_size)
    positive("active_expert_frac", active_expert_frac)
    return float(curve_queries_per_s(constants, np.array([batch_size]), np.array([active_expert_frac]), form)[0])


def curve_queries_per_s(
    constants: ThroughputConstants, batch_size: Array, active_expert_frac: Array, form: str
) -> Array:
    """Equation 2 at many points, in one of FORMS."""
    term = _log_term(batch_size, active_expert_frac, constants.c3, form)
    return constants.c4_queries_per_s + constants.c2_queries_per_s * term


def _log_term(batch_size: Array, active_expert_frac: Array, c3: float, form: str) -> Array:
    """What C2 is multiplied by."""
    log_batch = np.log(batch_size)
    if form == PRINTED:
        return log_batch - np.log(active_expert_frac * c3)
    fitted = log_batch / (active_expert_frac * c3)
    if form == FITTED:
        return fitted
    if form == PLOTTED:
        return np.where(active_expert_frac == 1, log_batch, fitted)
    raise UserError(f"form {form!r} of Equation 2 is unknown", cure=f"use one of {', '.join(FORMS)}")


def rmse(measured: Array | Sequence[float], predicted: Array | Sequence[float]) -> float:
    """Root of the mean squared difference, over all points (not degrees of freedom), as the scripts take it."""
    return float(np.sqrt(np.mean((np.asarray(measured) - np.asarray(predicted)) ** 2)))


def fit(sweep: Sweep, c3: float, form: str) -> ThroughputConstants:
    """C2 and C4 by least squares with C3 held, as the scripts do (in form FITTED).

    C3 could not be fitted in PRINTED (only C4 - C2 ln C3 matters) nor in FITTED (only C2 / C3 does).
    Raises UserError if the points have one batch size only.
    """
    term = _log_term(sweep.batch_size, sweep.active_expert_frac, c3, form)
    solution = _least_squares([term, np.ones_like(term)], sweep.queries_per_s)
    if solution is None:
        raise UserError("Equation 2 cannot be fitted", cause="its points do not determine C2 and C4")
    return ThroughputConstants(c2_queries_per_s=solution[0], c3=c3, c4_queries_per_s=solution[1])


def fit_with_c3(sweep: Sweep) -> ThroughputConstants | None:
    """C2, C3 and C4 by least squares in form PLOTTED, the only one of the three that determines C3.

    There dense points have the slope C2 and sparse ones C2 / (frac C3), so it is linear in C2, C2 / C3 and C4. None
    where dense or sparse has no batch above 1.
    """
    dense = sweep.active_expert_frac == 1
    log_batch = np.log(sweep.batch_size)
    columns = [
        np.where(dense, log_batch, 0),
        np.where(dense, 0, log_batch / sweep.active_expert_frac),
        np.ones_like(log_batch),
    ]
    solution = _least_squares(columns, sweep.queries_per_s)
    if solution is None or solution[1] == 0:
        return None
    c2, c2_over_c3, c4 = solution
    return ThroughputConstants(c2_queries_per_s=c2, c3=c2 / c2_over_c3, c4_queries_per_s=c4)


def _least_squares(columns: Sequence[Array], target: Array) -> list[float] | None:
    """One coefficient a column; None where the columns do not determine them."""
    solution, _, rank, _ = np.linalg.lstsq(np.column_stack(columns), target, rcond=None)
    return [float(value) for value in solution] if rank == len(columns) else None


def run_hours(num_queries: float, epochs: float, queries_per_s: float) -> float:
    """Raises UserError for a number that is not above 0."""
    work_queries = positive("number of queries", num_queries) * positive("epochs", epochs)
    return work_queries / positive("throughput (queries/s)", queries_per_s) / 3600


def run_cost_usd(num_queries: float, epochs: float, queries_per_s: float, price_usd_per_hour: float) -> float:
    """Table IV's formula. queries_per_s: of all GPUs that the price is for. A price of 0 is allowed, for an own GPU.

    Raises UserError for a negative price, and for another number that is not above 0.
    """
    return run_hours(num_queries, epochs, queries_per_s) * checked_price(price_usd_per_hour)


def checked_price(price_usd_per_hour: float) -> float:
    """The price. Raises UserError unless it is a finite number of 0 or more."""
    if not (math.isfinite(price_usd_per_hour) and price_usd_per_hour >= 0):
        raise UserError(f"price (USD per hour) is {price_usd_per_hour!r}; it must be a number of 0 or more")
    return price_usd_per_hour
