"""The paper's model: its constants, both equations, the fit and the cost."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunescope import paper
from tunescope.cost import paper_constants as constants
from tunescope.cost import paper_equations as equations
from tunescope.cost.paper_equations import FITTED, FORMS, PLOTTED, PRINTED, Sweep, ThroughputConstants
from tunescope.errors import UserError

SPARSE, DENSE = 0.25, 1.0
MODELS_AND_SETS = [("mixtral", "coded"), ("mixtral", "printed"), ("blackmamba", "printed")]
SWEEPS = [
    ("mixtral", "a40", "cs"),
    ("blackmamba", "a40", "cs"),
    ("mixtral", "a40", "math"),
    ("blackmamba", "a40", "math"),
    ("mixtral", "a100-40gb", "math"),
    ("mixtral", "a100-80gb", "math"),
    ("mixtral", "h100-80gb", "math"),
]

memory_gb = st.floats(min_value=1, max_value=1000)
length_tokens = st.integers(min_value=1, max_value=40_000)
fraction = st.floats(min_value=0.01, max_value=1)
positive = st.floats(min_value=1e-3, max_value=1e6)
model_and_set = st.sampled_from(MODELS_AND_SETS)
sweep_of = st.sampled_from(SWEEPS)


# --- Equation 1 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameter_set", "gpu_memory_gb", "queries"),
    [("coded", 100, 27.915), ("coded", 120, 35.199), ("printed", 100, 42.699), ("printed", 120, 53.840)],
)
def test_projections_of_figure_13(parameter_set: str, gpu_memory_gb: float, queries: float) -> None:
    mixtral = constants.memory_constants("mixtral", parameter_set)
    assert equations.max_batch_unfloored(mixtral, gpu_memory_gb, 512, SPARSE) == pytest.approx(queries, abs=5e-4)
    assert equations.max_batch_size(mixtral, gpu_memory_gb, 512, SPARSE) == math.floor(queries)


@pytest.mark.parametrize(
    ("dataset", "share", "queries"), [("cs", DENSE, 6), ("cs", SPARSE, 20), ("math", DENSE, 3), ("math", SPARSE, 10)]
)
def test_blackmambas_printed_constants_give_the_sweeps_limits(dataset: str, share: float, queries: int) -> None:
    blackmamba = constants.memory_constants("blackmamba", "printed")
    assert equations.max_batch_size(blackmamba, 48, constants.seq_len_tokens(dataset), share) == queries


def test_what_does_not_fit_has_no_batch() -> None:
    mixtral = constants.memory_constants("mixtral", "coded")
    assert equations.max_batch_unfloored(mixtral, 16, 512, SPARSE) < 0
    assert equations.max_batch_size(mixtral, 16, 512, SPARSE) == 0
    assert equations.max_batch_size(mixtral, 24, 512, SPARSE) == 0  # 0.65 GB beside the weights hold 0.24 queries


@given(model_and_set, memory_gb, memory_gb, length_tokens, length_tokens, fraction, fraction)
@settings(deadline=None)
def test_more_memory_shorter_queries_and_fewer_experts_never_lower_the_batch(
    which: tuple[str, str],
    memory_a: float,
    memory_b: float,
    length_a: int,
    length_b: int,
    share_a: float,
    share_b: float,
) -> None:
    used = constants.memory_constants(*which)
    hardest = (min(memory_a, memory_b), max(length_a, length_b), max(share_a, share_b))
    easiest = (max(memory_a, memory_b), min(length_a, length_b), min(share_a, share_b))
    assert equations.max_batch_size(used, *hardest) <= equations.max_batch_size(used, *easiest)


@given(model_and_set, memory_gb, length_tokens, fraction)
@settings(deadline=None)
def test_the_floor_loses_less_than_a_query(which: tuple[str, str], memory: float, length: int, share: float) -> None:
    used = constants.memory_constants(*which)
    unfloored = equations.max_batch_unfloored(used, memory, length, share)
    floored = equations.max_batch_size(used, memory, length, share)
    assert floored >= 0
    assert 0 <= max(unfloored, 0) - floored < 1


@given(model_and_set, length_tokens, fraction)
@settings(deadline=None)
def test_batch_times_length_is_what_memory_holds(which: tuple[str, str], length: int, share: float) -> None:
    """Twice the room beside the weights, or half the length, holds twice the queries."""
    used = constants.memory_constants(*which)
    room_gb = 10.0
    one = equations.max_batch_unfloored(used, used.model_memory_gb + room_gb, 2 * length, share)
    assert equations.max_batch_unfloored(used, used.model_memory_gb + 2 * room_gb, 2 * length, share) == pytest.approx(
        2 * one
    )
    assert equations.max_batch_unfloored(used, used.model_memory_gb + room_gb, length, share) == pytest.approx(2 * one)
    dense = equations.max_batch_unfloored(used, used.model_memory_gb + room_gb, length, DENSE)
    assert dense == pytest.approx(used.c0_query_tokens_per_gb * room_gb / length)


def test_lengths_that_go_into_equation_1() -> None:
    assert constants.seq_len_tokens("cs") == 512
    assert constants.seq_len_tokens("math") == 1024  # 3 queries are longer, the longest 1470; they are cut
    assert [constants.seq_len_tokens(name, "median") for name in ("cs", "math", "he", "gs")] == [79, 174, 272, 148]
    for dataset in ("cs", "math"):
        assert constants.seq_len_tokens(dataset) == min(max(paper.length_histogram(dataset)[0]), 1024)


# --- Equation 2 ------------------------------------------------------------------------------------------------------


def test_forms_by_hand() -> None:
    used = ThroughputConstants(c2_queries_per_s=2.0, c3=1.8, c4_queries_per_s=0.5)

    def at(batch: float, share: float, form: str) -> float:
        return equations.throughput_queries_per_s(used, batch, share, form)

    assert at(4, SPARSE, PRINTED) == pytest.approx(0.5 + 2 * math.log(4 / 0.45))
    assert at(4, SPARSE, FITTED) == pytest.approx(0.5 + 2 * math.log(4) / 0.45)
    assert at(4, SPARSE, PLOTTED) == at(4, SPARSE, FITTED)
    assert at(4, DENSE, PRINTED) == pytest.approx(0.5 + 2 * math.log(4 / 1.8))
    assert at(4, DENSE, FITTED) == pytest.approx(0.5 + 2 * math.log(4) / 1.8)
    assert at(4, DENSE, PLOTTED) == pytest.approx(0.5 + 2 * math.log(4))
    # The text says that the logarithm vanishes at batch 1. In the form it prints it does not.
    assert at(1, SPARSE, FITTED) == at(1, DENSE, PLOTTED) == 0.5
    assert at(1, SPARSE, PRINTED) != 0.5


@pytest.mark.parametrize(("model", "gpu", "dataset"), SWEEPS)
def test_our_fit_is_the_scripts_fit(model: str, gpu: str, dataset: str) -> None:
    coded = constants.throughput_constants(model, gpu, dataset)
    assert coded is not None
    assert coded.c3 == {"mixtral": 1.8, "blackmamba": 2.5}[model]
    ours = equations.fit(constants.sweep(model, gpu, dataset), coded.c3, FITTED)
    assert ours.c2_queries_per_s == pytest.approx(coded.c2_queries_per_s, abs=1e-7)
    assert ours.c4_queries_per_s == pytest.approx(coded.c4_queries_per_s, abs=1e-7)


def test_only_figure_15_has_printed_constants() -> None:
    for key in SWEEPS:
        coded, printed = constants.throughput_constants(*key), constants.throughput_constants(*key, "printed")
        assert coded is not None
        if key[1] == "a40":
            assert printed is None
        else:
            assert printed is not None
            assert printed.c2_queries_per_s == round(coded.c2_queries_per_s, 3)
            assert printed.c4_queries_per_s == round(coded.c4_queries_per_s, 3)
    assert constants.throughput_constants("mixtral", "h100-80gb", "cs") is None


def test_sizes_of_the_sweeps() -> None:
    counts = {
        (row["model"], row["gpu"], row["dataset"], row["parameter"]): int(row["value"])
        for row in paper.rows("throughput_model")
        if row["status"] == "count"
    }
    for key in SWEEPS:
        dense = constants.sweep(*key).active_expert_frac == 1
        assert dense.sum() == counts[*key, "n_points_dense"]
        assert (~dense).sum() == counts[*key, "n_points_sparse"]
        # The H100's reading "script's split" counts on it.
        assert not np.any(np.diff(dense.astype(int)) > 0), "dense points come first"
    assert len(constants.sweep("mixtral", "h100-80gb", "cs").batch_size) == 0


@given(
    st.sampled_from(FORMS),
    st.floats(min_value=0.1, max_value=10),
    st.floats(min_value=1, max_value=4),
    st.floats(min_value=0.1, max_value=10),
    st.lists(st.integers(1, 40), min_size=2, max_size=8, unique=True),
)
@settings(deadline=None)
def test_points_on_a_curve_give_back_its_constants(
    form: str, c2: float, c3: float, c4: float, batches: list[int]
) -> None:
    truth = ThroughputConstants(c2_queries_per_s=c2, c3=c3, c4_queries_per_s=c4)
    batch = np.array([*batches, *batches], dtype=float)
    share = np.repeat([DENSE, SPARSE], len(batches))
    points = Sweep(batch, share, equations.curve_queries_per_s(truth, batch, share, form))
    found = equations.fit(points, c3, form)
    assert (found.c2_queries_per_s, found.c4_queries_per_s) == pytest.approx((c2, c4), rel=1e-6)
    if form == PLOTTED:
        with_c3 = equations.fit_with_c3(points)
        assert with_c3 is not None
        assert (with_c3.c2_queries_per_s, with_c3.c3, with_c3.c4_queries_per_s) == pytest.approx((c2, c3, c4), rel=1e-6)


@given(sweep_of, st.sampled_from(FORMS), st.floats(-0.5, 0.5), st.floats(-0.5, 0.5))
@settings(deadline=None)
def test_no_other_constants_are_nearer_than_the_fit(
    key: tuple[str, str, str], form: str, other_c2: float, other_c4: float
) -> None:
    points = constants.sweep(*key)
    best = equations.fit(points, 1.8, form)

    def rmse(used: ThroughputConstants) -> float:
        return equations.rmse(
            points.queries_per_s,
            equations.curve_queries_per_s(used, points.batch_size, points.active_expert_frac, form),
        )

    moved = replace(
        best,
        c2_queries_per_s=best.c2_queries_per_s + other_c2,
        c4_queries_per_s=best.c4_queries_per_s + other_c4,
    )
    assert rmse(best) <= rmse(moved) + 1e-12


@pytest.mark.parametrize("form", [PRINTED, FITTED])
def test_c3_cannot_be_fitted_in_the_forms_of_the_text_and_of_the_fit(form: str) -> None:
    """Whatever C3 is held at, the fitted curve is the same."""
    points = constants.sweep("mixtral", "a100-80gb", "math")
    curves = [
        equations.curve_queries_per_s(
            equations.fit(points, c3, form), points.batch_size, points.active_expert_frac, form
        )
        for c3 in (0.5, 1.8, 7.0)
    ]
    np.testing.assert_allclose(curves[1], curves[0])
    np.testing.assert_allclose(curves[2], curves[0])


def test_c3_fitted_where_dense_goes_beyond_batch_1() -> None:
    fitted = {key: equations.fit_with_c3(constants.sweep(*key)) for key in SWEEPS}
    c3 = {key: round(found.c3, 2) if found else None for key, found in fitted.items()}
    assert list(c3.values()) == [2.05, 3.0, None, 2.54, None, 1.9, 2.5]


def test_one_batch_size_is_not_a_sweep() -> None:
    points = Sweep(np.array([3.0, 3.0]), np.array([DENSE, DENSE]), np.array([1.0, 1.1]))
    with pytest.raises(UserError, match="cannot be fitted"):
        equations.fit(points, 1.8, FITTED)
    assert equations.fit_with_c3(points) is None


@given(sweep_of, st.sampled_from(FORMS), st.integers(1, 64), st.integers(1, 64), st.sampled_from([DENSE, SPARSE]))
@settings(deadline=None)
def test_throughput_never_falls_with_the_batch(
    key: tuple[str, str, str], form: str, batch_a: int, batch_b: int, share: float
) -> None:
    used = constants.throughput_constants(*key)
    assert used is not None
    low, high = (equations.throughput_queries_per_s(used, batch, share, form) for batch in sorted((batch_a, batch_b)))
    assert 0 < low <= high


@given(sweep_of, st.sampled_from(FORMS), st.integers(1, 64))
@settings(deadline=None)
def test_sparse_is_never_slower_than_dense(key: tuple[str, str, str], form: str, batch: int) -> None:
    used = constants.throughput_constants(*key)
    assert used is not None
    dense, sparse = (equations.throughput_queries_per_s(used, batch, share, form) for share in (DENSE, SPARSE))
    assert dense <= sparse


# --- cost ------------------------------------------------------------------------------------------------------------


@given(positive, positive, positive, positive, st.floats(0, 1e3))
@settings(deadline=None)
def test_cost_never_falls_with_queries_epochs_or_price(
    queries_a: float, queries_b: float, epochs_a: float, epochs_b: float, price: float
) -> None:
    low = equations.run_cost_usd(min(queries_a, queries_b), min(epochs_a, epochs_b), 1.5, price)
    high = equations.run_cost_usd(max(queries_a, queries_b), max(epochs_a, epochs_b), 1.5, price + 1)
    assert 0 <= low <= high


@given(positive, positive, st.floats(0.01, 1e3), st.floats(0.01, 1e3))
@settings(deadline=None)
def test_a_faster_gpu_at_one_price_never_costs_more(queries: float, price: float, rate_a: float, rate_b: float) -> None:
    slow, fast = (equations.run_cost_usd(queries, 10, rate, price) for rate in sorted((rate_a, rate_b)))
    assert fast <= slow


def test_cost_by_hand() -> None:
    assert equations.run_hours(7200, 2, 4.0) == 1.0
    assert equations.run_cost_usd(7200, 2, 4.0, 1.67) == 1.67
    assert equations.run_cost_usd(7200, 2, 4.0, 0.0) == 0.0


def test_prices_are_table_4s_alone() -> None:
    assert {gpu: constants.price_usd_per_hour(gpu) for gpu in constants.GPU_MEMORY_GB} == {
        "a40": 0.79,
        "a100-40gb": None,  # the 4.097 of a script's "a100" is no price of the paper
        "a100-80gb": 1.67,
        "h100-80gb": 2.1,
    }
    assert constants.price_usd_per_hour("a100") is None
