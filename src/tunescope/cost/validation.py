"""How far off step times are that were not used in the fit: splits of the measured points, and the paper's Equation 2
refitted on each split beside.

Everything that is fitted is fitted anew without the points held out: costs, effects, spreads, scatters and p. The form
of the model and its priors were chosen with the paper's points and the first ten of this project's known.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tunescope.cost import paper_equations as equations
from tunescope.cost.paper_constants import throughput_constants
from tunescope.cost.time_model import StepTime, TimeModel
from tunescope.cost.time_points import TimedPoint, paper_phase_points, paper_points
from tunescope.errors import UserError

LEAVE_POINT, LEAVE_GPU = "paper, one point out", "paper, one GPU out"
OTHER_RUNS, OWN_UNSEEN, OWN_POINT = "Figure 4 from the sweeps", "own, from the paper alone", "own, one point out"
SPLITS = (LEAVE_POINT, LEAVE_GPU, OTHER_RUNS, OWN_UNSEEN, OWN_POINT)
COVERAGE_LEVEL = 0.90  # of the intervals
_CONFIDENCE = 0.95  # of the interval around the coverage
_MIN_SWEEP = 3  # points that Equation 2 is refitted on; two would leave nothing to err
_C3_OF_SWEEP = ("a40", "cs")  # where the scripts' C3 of a model is looked up: they hold one a model


@dataclass(frozen=True)
class HeldOut:
    """A point and what was forecast for it. paper_step_s: by Equation 2 refitted on the same split; infinite where it
    forecasts no throughput above 0; None where the split leaves it nothing to be fitted on."""

    split: str
    point: TimedPoint
    forecast: StepTime
    paper_step_s: float | None

    @property
    def error_frac(self) -> float:
        """Forecast over measured, minus 1."""
        return self.forecast.median_s / self.point.step_s - 1

    @property
    def paper_error_frac(self) -> float | None:
        return None if self.paper_step_s is None else self.paper_step_s / self.point.step_s - 1

    @property
    def is_covered(self) -> bool:
        return self.forecast.low_s <= self.point.step_s <= self.forecast.high_s


def held_out(own: Sequence[TimedPoint], splits: Sequence[str] = SPLITS) -> list[HeldOut]:
    """The points of each split. own: this project's points, or those of a folder; without any there are none of theirs.

    One GPU out: Mixtral's points of each GPU, from all points of the other GPUs; BlackMamba has one GPU only. Figure 4
    and own points: from all of Figures 8, 14 and 15. Own, one point out: from those and the other own ones.
    """
    papers = paper_points()
    found = {
        LEAVE_POINT: lambda: _one_out(LEAVE_POINT, papers),
        LEAVE_GPU: lambda: _one_gpu_out(papers),
        OTHER_RUNS: lambda: _from(OTHER_RUNS, papers, paper_phase_points()),
        OWN_UNSEEN: lambda: _from(OWN_UNSEEN, papers, own),
        OWN_POINT: lambda: _one_out(OWN_POINT, own, papers),
    }
    return [row for split in splits for row in found[split]()]


def _one_out(split: str, points: Sequence[TimedPoint], also: Sequence[TimedPoint] = ()) -> list[HeldOut]:
    """also: points that are never held out."""
    rows = []
    for number, point in enumerate(points):
        others = (*also, *points[:number], *points[number + 1 :])
        # Equation 2 has its own constants for each GPU.
        sweep = [each for each in others if each.device == point.device]
        rows.append(_row(split, point, TimeModel(others), sweep))
    return rows


def _one_gpu_out(points: Sequence[TimedPoint]) -> list[HeldOut]:
    rows = []
    for device in dict.fromkeys(point.device for point in points):
        others = [point for point in points if point.device != device]
        codes = {point.code for point in others}
        unseen = [point for point in points if point.device == device and point.code in codes]
        rows += _from(LEAVE_GPU, others, unseen)
    return rows


def _from(split: str, points: Sequence[TimedPoint], unseen: Sequence[TimedPoint]) -> list[HeldOut]:
    model = TimeModel(points)
    return [_row(split, point, model, points) for point in unseen]


def _row(split: str, point: TimedPoint, model: TimeModel, others: Iterable[TimedPoint]) -> HeldOut:
    return HeldOut(split, point, model.at_point(point), _by_equation_2(point, others))


def _by_equation_2(point: TimedPoint, others: Iterable[TimedPoint]) -> float | None:
    """Seconds a step by C2 and C4, refitted on the other points of the model and data set in the form that the paper
    plots, with its C3. It knows batch size and sparsity, and neither length nor GPU nor depth."""
    constants = throughput_constants(point.model, *_C3_OF_SWEEP) if point.model in _MODELS else None
    alike = [
        each
        for each in others
        if (each.model, each.dataset) == (point.model, point.dataset) and _depth(each) == _depth(point)
    ]
    if constants is None or len(alike) < _MIN_SWEEP:
        return None
    sweep = equations.Sweep(
        np.array([float(each.batch_size) for each in alike]),
        np.array([_active_frac(each) for each in alike]),
        np.array([each.batch_size / each.step_s for each in alike]),
    )
    try:
        fitted = equations.fit(sweep, constants.c3, equations.PLOTTED)
    except UserError:
        return None
    queries_per_s = equations.throughput_queries_per_s(fitted, point.batch_size, _active_frac(point), equations.PLOTTED)
    return point.batch_size / queries_per_s if queries_per_s > 0 else math.inf


_MODELS = ("mixtral", "blackmamba")  # that Equation 2 has constants for


def _active_frac(point: TimedPoint) -> float:
    return float(point.top_k / point.config["num_local_experts"])


def _depth(point: TimedPoint) -> int:
    return int(point.config["num_hidden_layers"])


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Of some held-out points: absolute errors as fractions of what was measured; None without any. num_paper: how many
    Equation 2 could be refitted for, and ours over the same ones beside it."""

    num_points: int
    median_frac: float
    p90_frac: float
    largest_frac: float
    mean_frac: float
    num_covered: int
    num_paper: int
    paper_median_frac: float | None
    paper_p90_frac: float | None
    ours_median_frac: float | None

    @property
    def coverage_frac(self) -> float:
        return self.num_covered / self.num_points

    @property
    def coverage_interval(self) -> tuple[float, float]:
        """Of Clopper and Pearson, 95 %."""
        return clopper_pearson(self.num_covered, self.num_points)


def summary(rows: Sequence[HeldOut]) -> Summary:
    """Raises ValueError without rows. mean_frac is signed: above 0 where forecasts are too long."""
    if not rows:
        raise ValueError("nothing was held out")
    errors = np.array([row.error_frac for row in rows])
    both = [(row.paper_error_frac, row.error_frac) for row in rows if row.paper_error_frac is not None]
    papers, ours = (np.abs(np.array(column)) for column in zip(*both, strict=True)) if both else (None, None)
    return Summary(
        num_points=len(rows),
        median_frac=float(np.median(np.abs(errors))),
        p90_frac=_p90(np.abs(errors)),
        largest_frac=float(np.abs(errors).max()),
        mean_frac=float(errors.mean()),
        num_covered=sum(row.is_covered for row in rows),
        num_paper=len(both),
        paper_median_frac=None if papers is None else float(np.median(papers)),
        paper_p90_frac=None if papers is None else _p90(papers),
        ours_median_frac=None if ours is None else float(np.median(ours)),
    )


def _p90(errors: np.ndarray) -> float:
    """The smallest error that nine tenths stay within; infinite ones allowed."""
    return float(np.sort(errors)[math.ceil(0.9 * len(errors)) - 1])


def clopper_pearson(num_hits: int, num_trials: int, confidence: float = _CONFIDENCE) -> tuple[float, float]:
    """Exact interval of a probability from independent trials (Clopper and Pearson 1934, Biometrika 26)."""
    from scipy.stats import beta  # takes longer to import than an estimate takes

    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, num_hits, num_trials - num_hits + 1)) if num_hits else 0.0
    high = float(beta.ppf(1 - tail, num_hits + 1, num_trials - num_hits)) if num_hits < num_trials else 1.0
    return low, high
