"""An estimate by the paper's model: what it says, what it leaves empty and why, and what it refuses."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunescope.cost import paper_constants as constants
from tunescope.cost import paper_equations as equations
from tunescope.cost.paper_equations import FITTED, ThroughputConstants
from tunescope.cost.paper_model import paper_estimate
from tunescope.errors import UserError

# --- what it says ----------------------------------------------------------------------------------------------------


def test_estimate_of_table_4s_a40() -> None:
    found = paper_estimate("mixtral", "math", 48, "sparse", num_queries=15_000, gpu="a40")
    assert (found.max_batch_size, found.batch_size, found.paper_max_batch_size) == (4, 4, 4)
    assert found.max_batch_unfloored == pytest.approx(4.4887, abs=1e-4)
    assert found.queries_per_s == pytest.approx(0.98541, abs=1e-5)  # the curve; 1.00548 was measured
    assert found.hours == pytest.approx(42.284, abs=1e-3)
    assert found.cost_usd == pytest.approx(33.404, abs=1e-3)
    assert "2024-08" in found.price_source
    assert found.missing == ()


def test_memory_alone_settles_a_gpu_that_is_the_only_one_of_its_size() -> None:
    by_name = paper_estimate("mixtral", "math", 48, "sparse", num_queries=15_000, gpu="NVIDIA A40")
    assert paper_estimate("mixtral", "math", 48, "sparse", num_queries=15_000) == by_name


def test_80_gb_need_a_name() -> None:
    found = paper_estimate("mixtral", "math", 80, "sparse", num_queries=15_000)
    assert (found.gpu, found.queries_per_s, found.hours, found.cost_usd) == (None, None, None, None)
    assert found.max_batch_size == 10
    assert found.paper_max_batch_size == 17
    assert "a100-80gb and h100-80gb; name one" in found.missing[0]


def test_the_batch_that_the_paper_ran_may_be_given() -> None:
    found = paper_estimate("mixtral", "math", 80, "sparse", num_queries=15_000, gpu="h100", batch_size=17)
    assert (found.gpu, found.max_batch_size, found.batch_size) == ("h100-80gb", 10, 17)
    assert found.cost_usd == pytest.approx(19.69, abs=0.005)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("mixtral", "cs", 80, "sparse", "a100-80gb"), "no coded constants of mixtral on a100-80gb with cs"),
        (("blackmamba", "math", 80, "sparse", "h100-80gb"), "no coded constants of blackmamba on h100-80gb"),
        (("mixtral", "cs", 100, "sparse", None), "no GPU of 100 GB"),
        (("mixtral", "cs", 23, "sparse", None), "not one query of 512 tokens fits"),
    ],
)
def test_nothing_is_borrowed_for_what_the_paper_has_not(
    arguments: tuple[str, str, float, str, str | None], said: str
) -> None:
    *positional, gpu = arguments
    found = paper_estimate(*positional, num_queries=1000, gpu=gpu)  # type: ignore[arg-type]
    assert (found.queries_per_s, found.hours, found.cost_usd) == (None, None, None)
    assert any(said in reason for reason in found.missing)


def test_a_missing_price_leaves_the_hours() -> None:
    found = paper_estimate("mixtral", "math", 40, "dense", num_queries=15_000)
    assert found.hours == pytest.approx(101.487, abs=1e-3)
    assert (found.price_usd_per_hour, found.cost_usd) == (None, None)
    assert "Table IV has none of a100-40gb" in found.missing[0]
    priced = paper_estimate("mixtral", "math", 40, "dense", num_queries=15_000, price_usd_per_hour=1.2)
    assert priced.cost_usd == pytest.approx(1.2 * 101.487, abs=2e-3)
    assert (priced.price_source, priced.missing) == ("given", ())


def test_another_length_changes_the_batch_and_forgets_the_papers() -> None:
    for dataset in ("gs", "cs"):
        found = paper_estimate("mixtral", dataset, 48, "sparse", num_queries=1000, seq_len_tokens=256)
        assert found.max_batch_size == 17
        assert found.paper_max_batch_size is None
    assert paper_estimate("mixtral", "cs", 48, "sparse", num_queries=1000).paper_max_batch_size == 8


def test_sets_and_forms_may_be_chosen() -> None:
    printed = paper_estimate("mixtral", "cs", 48, "dense", num_queries=1000, gpu="a40", memory_set="printed")
    assert (printed.max_batch_size, printed.memory_set) == (3, "printed")
    plotted = paper_estimate("mixtral", "cs", 48, "dense", num_queries=1000, gpu="a40", batch_size=2)
    fitted = paper_estimate("mixtral", "cs", 48, "dense", num_queries=1000, gpu="a40", batch_size=2, form=FITTED)
    assert plotted.queries_per_s == pytest.approx(0.31687355 + 0.28083637 * math.log(2))
    assert fitted.queries_per_s == pytest.approx(0.31687355 + 0.28083637 * math.log(2) / 1.8)


@given(
    st.sampled_from([(model, dataset) for model in ("mixtral", "blackmamba") for dataset in ("cs", "math")]),
    st.sampled_from(["dense", "sparse"]),
    st.integers(1, 10**7),
    st.integers(1, 10**7),
    st.integers(1, 100),
    st.integers(1, 100),
)
@settings(deadline=None)
def test_an_estimate_never_falls_with_the_work(
    which: tuple[str, str], sparsity: str, queries_a: int, queries_b: int, epochs_a: int, epochs_b: int
) -> None:
    less, more = (
        paper_estimate(*which, 48, sparsity, num_queries=queries, epochs=epochs, gpu="a40")
        for queries, epochs in zip(sorted((queries_a, queries_b)), sorted((epochs_a, epochs_b)), strict=True)
    )
    assert less.queries_per_s == more.queries_per_s
    assert less.cost_usd is not None
    assert more.cost_usd is not None
    assert 0 < less.cost_usd <= more.cost_usd
    assert more.cost_usd == pytest.approx(more.hours * 0.79)


# --- GPU names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "memory", "gpu"),
    [
        ("A40", None, "a40"),
        ("nvidia a40", 48, "a40"),
        ("A100", 40, "a100-40gb"),
        ("A100", 80, "a100-80gb"),
        ("a100-pcie", 80, "a100-80gb"),
        ("H100", None, "h100-80gb"),
        ("h100-80gb", 80, "h100-80gb"),
    ],
)
def test_gpu_names(name: str, memory: float | None, gpu: str) -> None:
    assert constants.paper_gpu(name, memory) == gpu


@pytest.mark.parametrize(
    ("name", "memory"), [("H200", None), ("A40", 24), ("a40", 80), ("A100", None), ("A100", 41), ("L4", 24), ("", None)]
)
def test_a_gpu_without_a_sweep_is_refused(name: str, memory: float | None) -> None:
    with pytest.raises(UserError, match="knows no GPU") as caught:
        constants.paper_gpu(name, memory)
    assert "a100-40gb (40 GB)" in caught.value.cure


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model": "llama"}, "model 'llama' is unknown"),
        ({"dataset": "alpaca"}, "data set 'alpaca' is unknown"),
        ({"dataset": "he"}, "does not give the longest query of 'he'"),
        ({"sparsity": "half"}, "sparsity 'half' is unknown"),
        ({"gpu_memory_gb": 0}, "GPU memory"),
        ({"gpu_memory_gb": math.nan}, "GPU memory"),
        ({"seq_len_tokens": 0}, "length"),
        ({"num_queries": 0}, "number of queries"),
        ({"num_queries": -5}, "number of queries"),
        ({"epochs": math.inf}, "epochs"),
        ({"batch_size": 0}, "batch size 0"),
        ({"price_usd_per_hour": -1}, "price"),
        ({"price_usd_per_hour": math.nan}, "price"),
        ({"gpu": "h200"}, "knows no GPU 'h200'"),
        ({"memory_set": "best"}, "no 'best' constants"),
        ({"throughput_set": "best"}, "set of constants 'best'"),
        ({"throughput_set": "best", "gpu_memory_gb": 100}, "set of constants 'best'"),
        ({"form": "exact"}, "form of Equation 2 'exact'"),
        ({"model": "blackmamba", "memory_set": "coded"}, "no 'coded' constants of Equation 1 for blackmamba"),
    ],
)
def test_bad_input_is_refused_with_a_reason(changed: dict[str, object], said: str) -> None:
    arguments: dict[str, object] = {
        "model": "mixtral",
        "dataset": "cs",
        "gpu_memory_gb": 48,
        "sparsity": "sparse",
        "num_queries": 1000,
    }
    with pytest.raises(UserError) as caught:
        paper_estimate(**arguments | changed)  # type: ignore[arg-type]
    assert said in str(caught.value)


@pytest.mark.parametrize("price", [-0.01, math.inf, math.nan])
def test_a_price_that_cannot_be(price: float) -> None:
    with pytest.raises(UserError, match="price"):
        equations.run_cost_usd(1000, 10, 1.0, price)


def test_an_unknown_form_is_refused() -> None:
    used = ThroughputConstants(c2_queries_per_s=1, c3=1, c4_queries_per_s=1)
    with pytest.raises(UserError, match="form 'exact'"):
        equations.throughput_queries_per_s(used, 1, 1, "exact")
