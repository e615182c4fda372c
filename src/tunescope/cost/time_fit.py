"""How fast hosts and GPUs get through a step's work, fitted to measured steps: a small hierarchical Bayesian model.

    step_s = (host_s ** p + gpu_s ** p) ** (1 / p)
    host_s = launches x cost of a launch;   gpu_s = sum over terms of work / peak of the data sheet x cost of the term

A cost is 1 over the part of the peak that is reached; 1 to 3 is usual. On a logarithmic scale it is the sum of what all
machines share and of effects: of the host, of the GPU and of the model's code. Effects come from normal distributions
around 0, so that a machine with few points borrows from the rest, and one with none gets their width as its interval.
docs/time_model.md explains it.

T terms, P parameters, N points.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

TERMS = ("launches", "weights", "matmul", "activations", "scan", "optimizer", "kernels", "decoding")
_NUM_TERMS = len(TERMS)
# Costs before anything is seen: median, and standard deviation of the logarithm. A launch of PyTorch takes the host
# some 25 us with Python, PEFT and dispatch around it (its unit is 1 us); kernels reach half to nine tenths of a peak. A
# kernel that a CUDA graph replays has some microseconds of a GPU for itself, however little it does. Decoding inside a
# product was timed apart, at 180 to 290 us a projection of Mixtral on an H200 (bench/nf4_grouped.py, few rows).
_COST_PRIOR = np.log([25.0, 1.3, 2.0, 1.5, 4.0, 1.2, 4.0, 1.2])
_COST_PRIOR_SD = np.array([0.5, 0.3, 0.4, 0.5, 1.0, 0.3, 0.5, 0.4])
# p - 1: 0 adds host and GPU up, infinity hides the shorter behind the longer. 0.5 is in between.
_OVERLAP_PRIOR, _OVERLAP_PRIOR_SD = math.log(0.5), 0.5

_OVERLAP = _NUM_TERMS  # place of log(p - 1) among the parameters
_FIRST_EFFECT = _NUM_TERMS + 1

HOST, DEVICE, CODE = KINDS = (0, 1, 2)
# Of each kind, the effects that one of it has, each as the terms it touches.
EFFECTS = (
    (("launches",),),
    (("weights", "activations", "scan", "optimizer"), ("matmul", "decoding")),
    (("launches",), ("weights", "activations", "scan"), ("matmul",)),
)
# Spread of each kind's effects before anything is seen, and how many hosts that is worth. Those of GPUs and codes stay
# as they are, for a handful of each tell little of them, and GPUs came with stacks: when fitted, the H100 of 2024 and
# the H200 of 2026, one silicon, differed by 2.7 in DRAM traffic. That of codes is what counts of work may get wrong.
_SPREAD_PRIOR = (np.array([0.2]), np.array([0.15, 0.15]), np.array([0.25, 0.25, 0.25]))
_SPREAD_PRIOR_COUNT = 4
_IS_SPREAD_FITTED = (True, False, False)
# Scatter of the points of one host, device and code around their curve, likewise.
_SCATTER_PRIOR, _SCATTER_PRIOR_COUNT = 0.04, 4

_MAX_ROUNDS, _ROUND_TOLERANCE = 60, 1e-4
_MAX_STEP = 0.5  # of a logarithm in one Newton step: far from the optimum the quadratic is wrong
_Z90 = 1.6448536269514722  # 95 % quantile of the normal distribution

Group = tuple[str, str, str]  # host, device, code


@dataclass(frozen=True)
class Forecast:
    """terms_s: seconds of each of TERMS if it ran alone; overlap_s: what host and GPU do at once, not positive. They
    add up to median_s. log_half_width: half of the 90 % interval, as a logarithm."""

    median_s: float
    terms_s: tuple[float, ...]
    overlap_s: float
    log_half_width: float


@dataclass(frozen=True)
class Fit:
    """What is known after the points.

    names: of the hosts, devices and codes that were measured. mean (P,), covariance (P, P): costs, log(p - 1), effects;
    all logarithms. spread: of hosts, devices and codes, standard deviations of their effects. scatter: of the points of
    a group around its curve, standard deviation of a logarithm; num_points: of each.
    """

    names: tuple[tuple[str, ...], ...]
    mean: np.ndarray
    covariance: np.ndarray
    spread: tuple[np.ndarray, ...]
    scatter: Mapping[Group, float]
    num_points: Mapping[Group, int]

    @property
    def overlap_exponent(self) -> float:
        """p."""
        return 1 + math.exp(self.mean[_OVERLAP])

    @property
    def costs(self) -> dict[str, float]:
        """Term -> what all machines share: us a launch, or 1 over the part of a peak."""
        return dict(zip(TERMS, np.exp(self.mean[:_NUM_TERMS]).tolist(), strict=True))

    def effects(self, kind: int) -> dict[str, tuple[float, ...]]:
        """Name of a host, device or code -> its factors on the costs, in the order of EFFECTS."""
        return {
            name: tuple(np.exp(self.mean[place : place + len(EFFECTS[kind])]).tolist())
            for name, place in _places(self.names)[kind].items()
        }

    def forecast(self, work: np.ndarray, group: Group, error_frac: float = 0.0) -> Forecast:
        """Of one step of a group. work (T,): seconds at cost 1. A host, device or code that was never measured has the
        spread of its kind. error_frac: standard error of what the forecast will be compared with."""
        names, mean, covariance = self._with(group)
        design = _design((group,), names, len(mean))
        logs, jacobian = _predict(mean, work[np.newaxis], design)
        if group in self.scatter:
            scatter, count = self.scatter[group], self.num_points[group]
        else:
            scatter, count = math.sqrt(np.mean(np.square(list(self.scatter.values())))), len(self.scatter)
        variance = float(jacobian[0] @ covariance @ jacobian[0]) + scatter**2 + error_frac**2
        alone = work * np.exp(design[0] @ mean)
        median_s = math.exp(logs[0])
        return Forecast(
            median_s=median_s,
            terms_s=tuple(alone.tolist()),
            overlap_s=median_s - float(alone.sum()),
            log_half_width=_t95(_SCATTER_PRIOR_COUNT + count) * math.sqrt(variance),
        )

    def _with(self, group: Group) -> tuple[tuple[tuple[str, ...], ...], np.ndarray, np.ndarray]:
        """Names, mean and covariance with what of the group is new."""
        names = tuple(known if group[kind] in known else (*known, group[kind]) for kind, known in enumerate(self.names))
        if names == self.names:
            return names, self.mean, self.covariance
        places = _places(names)
        num_parameters = _num_parameters(names)
        kept = list(range(_FIRST_EFFECT))
        variances = np.zeros(num_parameters)
        for kind in KINDS:
            for name, place in places[kind].items():
                its = range(place, place + len(EFFECTS[kind]))
                if name in self.names[kind]:
                    kept += its
                else:
                    variances[list(its)] = self.spread[kind] ** 2
        mean, covariance = np.zeros(num_parameters), np.diag(variances)
        mean[kept] = self.mean
        covariance[np.ix_(kept, kept)] = self.covariance
        return names, mean, covariance


def fit(work: np.ndarray, step_s: np.ndarray, groups: Sequence[Group], error_frac: np.ndarray) -> Fit:
    """work (N, T): seconds at cost 1. step_s (N,): measured. error_frac (N,): standard errors that are known of them.

    Alternates between the most probable parameters given the spreads and scatters (Gauss-Newton), and these given the
    parameters and their uncertainty (expectation-maximisation).
    """
    names = tuple(tuple(sorted({group[kind] for group in groups})) for kind in KINDS)
    places, num_parameters = _places(names), _num_parameters(names)
    design = _design(groups, names, num_parameters)
    series = sorted(set(groups))
    of_point = np.array([series.index(group) for group in groups])
    prior_mean = np.zeros(num_parameters)
    prior_mean[:_FIRST_EFFECT] = [*_COST_PRIOR, _OVERLAP_PRIOR]
    spread: tuple[np.ndarray, ...] = _SPREAD_PRIOR
    scatter = np.full(len(series), _SCATTER_PRIOR)
    mean = prior_mean.copy()
    log_s = np.log(step_s)
    for _ in range(_MAX_ROUNDS):
        before = np.concatenate([mean, np.log(scatter)])
        prior_variance = _prior_variance(names, spread, num_parameters)
        weight = 1 / (scatter[of_point] ** 2 + error_frac**2)
        mean, covariance = _most_probable(mean, prior_mean, prior_variance, work, log_s, design, weight)
        logs, jacobian = _predict(mean, work, design)
        square = (log_s - logs) ** 2 + np.einsum("np,pq,nq->n", jacobian, covariance, jacobian)
        scatter = _scatter(square, scatter[of_point] ** 2, error_frac**2, of_point, len(series))
        spread = _spread(places, mean, np.diag(covariance))
        if np.abs(np.concatenate([mean, np.log(scatter)]) - before).max() < _ROUND_TOLERANCE:
            break
    return Fit(
        names=names,
        mean=mean,
        covariance=covariance,
        spread=spread,
        scatter=dict(zip(series, scatter.tolist(), strict=True)),
        num_points={group: int((of_point == place).sum()) for place, group in enumerate(series)},
    )


def _places(names: tuple[tuple[str, ...], ...]) -> list[dict[str, int]]:
    """Of each kind, name -> place of its first effect among the parameters."""
    places: list[dict[str, int]] = []
    place = _FIRST_EFFECT
    for kind in KINDS:
        step = len(EFFECTS[kind])
        places.append({name: place + step * number for number, name in enumerate(names[kind])})
        place += step * len(names[kind])
    return places


def _num_parameters(names: tuple[tuple[str, ...], ...]) -> int:
    return _FIRST_EFFECT + sum(len(EFFECTS[kind]) * len(names[kind]) for kind in KINDS)


def _design(groups: Sequence[Group], names: tuple[tuple[str, ...], ...], num_parameters: int) -> np.ndarray:
    """(N, T, P) of 0 and 1: which parameters add up to the logarithm of a term's cost."""
    places = _places(names)
    design = np.zeros((len(groups), _NUM_TERMS, num_parameters))
    design[:, range(_NUM_TERMS), range(_NUM_TERMS)] = 1
    for number, group in enumerate(groups):
        for kind in KINDS:
            for step, terms in enumerate(EFFECTS[kind]):
                for term in terms:
                    design[number, TERMS.index(term), places[kind][group[kind]] + step] = 1
    return design


def _predict(mean: np.ndarray, work: np.ndarray, design: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logarithm of the step's seconds (N,), and its derivatives (N, P)."""
    seconds = work * np.exp(design @ mean)
    host, gpu = seconds[:, 0], seconds[:, 1:].sum(axis=1)
    p = 1 + math.exp(mean[_OVERLAP])
    both = host + gpu
    # Over their sum, so that no power under- or overflows.
    host_part, gpu_part = (host / both) ** p, (gpu / both) ** p
    parts = host_part + gpu_part
    logs = np.log(both) + np.log(parts) / p
    shares = np.column_stack([host_part / parts, seconds[:, 1:] * (gpu_part / parts / gpu)[:, np.newaxis]])
    jacobian = np.einsum("nt,ntp->np", shares, design)
    by_p = (host_part * np.log(host / both) + gpu_part * np.log(gpu / both)) / (p * parts) - np.log(parts) / p**2
    jacobian[:, _OVERLAP] = by_p * (p - 1)
    return logs, jacobian


def _most_probable(
    mean: np.ndarray,
    prior_mean: np.ndarray,
    prior_variance: np.ndarray,
    work: np.ndarray,
    log_s: np.ndarray,
    design: np.ndarray,
    weight: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Three Gauss-Newton steps, and the covariance there."""
    for _ in range(3):
        logs, jacobian = _predict(mean, work, design)
        precision = jacobian.T * weight @ jacobian + np.diag(1 / prior_variance)
        slope = jacobian.T * weight @ (log_s - logs) - (mean - prior_mean) / prior_variance
        mean = mean + np.clip(np.linalg.solve(precision, slope), -_MAX_STEP, _MAX_STEP)
    return mean, np.linalg.inv(precision)


def _prior_variance(
    names: tuple[tuple[str, ...], ...], spread: tuple[np.ndarray, ...], num_parameters: int
) -> np.ndarray:
    variance = np.empty(num_parameters)
    variance[:_FIRST_EFFECT] = np.square([*_COST_PRIOR_SD, _OVERLAP_PRIOR_SD])
    variance[_FIRST_EFFECT:] = np.concatenate([np.tile(spread[kind] ** 2, len(names[kind])) for kind in KINDS])
    return variance


def _scatter(
    square: np.ndarray, scatter_square: np.ndarray, error_square: np.ndarray, of_point: np.ndarray, num_series: int
) -> np.ndarray:
    """Of each series, its points' squares without the part that their known errors explain, the prior among them."""
    part = scatter_square / (scatter_square + error_square)
    squares = square * part**2 + error_square * part
    sums = np.bincount(of_point, weights=squares, minlength=num_series)
    counts = np.bincount(of_point, minlength=num_series)
    prior = _SCATTER_PRIOR_COUNT * _SCATTER_PRIOR**2
    return np.sqrt((prior + sums) / (_SCATTER_PRIOR_COUNT + counts))


def _spread(places: list[dict[str, int]], mean: np.ndarray, variance: np.ndarray) -> tuple[np.ndarray, ...]:
    spreads = []
    for kind in KINDS:
        prior = _SPREAD_PRIOR[kind]
        if _IS_SPREAD_FITTED[kind]:
            its = np.array([range(place, place + len(prior)) for place in places[kind].values()])
            squares = (mean[its] ** 2 + variance[its]).sum(axis=0)
            prior = np.sqrt((_SPREAD_PRIOR_COUNT * prior**2 + squares) / (_SPREAD_PRIOR_COUNT + len(its)))
        spreads.append(prior)
    return tuple(spreads)


def _t95(freedom: float) -> float:
    """95 % quantile of Student's t, by Cornish and Fisher's expansion: within 0.3 % from 4 degrees of freedom on. scipy
    has it, and takes longer to import than an estimate takes."""
    z = _Z90
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
