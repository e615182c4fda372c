"""Points, grids and their names."""

import contextlib
import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunescope import config, paper
from tunescope.config import LATENCY, Point, Protocol, paper_points, parse_points, points_at_depths
from tunescope.errors import UserError

points = st.builds(
    Point,
    model=st.just("mixtral"),
    dataset=st.from_regex(r"[a-z0-9][a-z0-9_.]{0,12}", fullmatch=True),
    top_k=st.integers(1, 8),
    per_device_batch_size=st.integers(1, config.MAX_BATCH),
    seq_len_tokens=st.none() | st.integers(1, config.MAX_SEQ_LEN_TOKENS),
    preset=st.sampled_from(config.PRESETS),
    num_layers=st.integers(1, 32),
)


def bars(grid: list[Point]) -> list[tuple[str, int, int]]:
    return [(point.dataset, point.top_k, point.per_device_batch_size) for point in grid]


# --- the paper's grid ---


def test_grid_is_exactly_what_the_papers_launcher_ran() -> None:
    launched = [
        (row["dataset"], int(row["top_k"]), int(row["batch_size"]))
        for row in paper.rows("experiment_grid")
        if row["model"] == "mixtral" and row["purpose"] == "throughput"
    ]
    assert len(launched) == 8
    assert sorted(bars(paper_points("mixtral"))) == sorted(launched)


def test_grid_is_in_the_order_of_the_figure() -> None:
    assert bars(paper_points("mixtral")) == [
        ("cs", 8, 1),
        ("cs", 8, 2),
        ("cs", 2, 1),
        ("cs", 2, 2),
        ("cs", 2, 8),
        ("math", 8, 1),
        ("math", 2, 1),
        ("math", 2, 3),
    ]


def test_grid_runs_real_lengths_at_full_depth() -> None:
    for point in paper_points("mixtral"):
        assert (point.seq_len_tokens, point.preset, point.num_layers, point.total_layers) == (None, "full", 32, 32)


def test_grid_of_the_breakdowns_is_exactly_what_the_papers_launcher_ran() -> None:
    """Sparse before dense, by batch, as Figure 4 has its bars; on random tokens of one length."""
    launched = [
        (int(row["top_k"]), int(row["batch_size"]), int(row["seq_len_tokens"]))
        for row in paper.rows("experiment_grid")
        if row["model"] == "mixtral" and row["purpose"] == "latency breakdown"
    ]
    grid = paper_points("mixtral", LATENCY)
    assert [(point.top_k, point.per_device_batch_size, point.seq_len_tokens) for point in grid] == sorted(launched)
    assert bars(grid) == [("random", 2, 1), ("random", 2, 10), ("random", 2, 32), ("random", 8, 1), ("random", 8, 10)]
    assert {point.seq_len_tokens for point in grid} == {128}
    assert parse_points("paper", "mixtral", LATENCY) == grid
    assert paper_points("mixtral", LATENCY) != paper_points("mixtral")


# --- labels and folder names ---


@pytest.mark.parametrize(("top_k", "label"), [(2, "sparse"), (8, "dense"), (1, "top-1"), (4, "top-4")])
def test_sparsity_label(top_k: int, label: str) -> None:
    assert Point(model="mixtral", dataset="cs", top_k=top_k, per_device_batch_size=1).sparsity == label


@given(points, points, st.sampled_from(["cpu", "nvidia-a40", "nvidia-a100-80gb"]))
def test_two_points_never_share_a_folder(one: Point, other: Point, slug: str) -> None:
    def measured(point: Point) -> Point:
        # Depth names a folder only where it varies; a preset has one model otherwise.
        return point if point.preset == "slice" else replace(point, num_layers=32)

    assert (one.point_id(slug) == other.point_id(slug)) == (measured(one) == measured(other))


@given(points)
def test_folder_name_is_one_plain_path_component(point: Point) -> None:
    name = point.point_id("nvidia-h200")
    assert "/" not in name
    assert not name.startswith(".")
    assert not name.endswith(".unfinished")
    assert name != "superseded"


@given(points)
def test_json_round_trip(point: Point) -> None:
    assert Point(**point.to_json()) == point


# --- checks ---

GOOD = {"model": "mixtral", "dataset": "cs", "top_k": 2, "per_device_batch_size": 1}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "llama"),
        ("dataset", "a/b"),
        ("dataset", "CS"),
        ("dataset", ""),
        ("dataset", ".."),
        ("dataset", "a\n"),
        ("top_k", 0),
        ("top_k", 9),
        ("per_device_batch_size", 0),
        ("per_device_batch_size", -1),
        ("per_device_batch_size", config.MAX_BATCH + 1),
        ("seq_len_tokens", 0),
        ("num_layers", 0),
        ("num_layers", 33),
        ("preset", "huge"),
        ("preset", "auto"),
    ],
)
def test_a_point_that_makes_no_sense_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(UserError) as refusal:
        Point(**GOOD | {field: value})
    assert field.removesuffix("set") in str(refusal.value).replace("data set", "dataset")


def test_protocol_refuses_nonsense() -> None:
    for settings in ({"num_queries": 0}, {"max_timed_s": 0.0}, {"max_timed_s": float("nan")}):
        with pytest.raises(UserError):
            Protocol(**settings)


def test_steps_after_the_timed_ones_are_those_of_the_profiler() -> None:
    """One to start it, those it records, one to start it again, one with memory; none for throughput."""
    assert Protocol().num_steps_after == config.TINY_PROTOCOL.num_steps_after == 0
    assert [Protocol(num_profiled_steps=number).num_steps_after for number in (1, 2, 5)] == [4, 5, 8]
    assert config.LATENCY_PROTOCOL.num_steps_after == config.TINY_LATENCY_PROTOCOL.num_steps_after == 5


def test_a_protocol_without_profiled_steps_says_nothing_of_them() -> None:
    """Or every throughput point measured before would be another point."""
    assert "num_profiled_steps" not in Protocol().to_json()
    assert Protocol(**config.LATENCY_PROTOCOL.to_json()) == config.LATENCY_PROTOCOL
    assert Protocol(**Protocol().to_json()) == Protocol()


# --- --points ---


def test_points_example_of_the_help() -> None:
    example = config.POINTS_HELP.rpartition("Example: ")[2].strip("'")
    assert bars(parse_points(example, "mixtral")) == [("cs", 2, b) for b in (1, 2, 4, 8, 16)] + [("math", 8, 1)]


def test_paper_stands_for_the_figure() -> None:
    assert parse_points("paper", "mixtral") == paper_points("mixtral")


def test_order_is_kept_and_repeats_are_dropped() -> None:
    given_points = parse_points("math:dense:bs=1;cs:sparse:bs=8,1,8 cs:k=2:bs=1", "mixtral")
    assert bars(given_points) == [("math", 8, 1), ("cs", 2, 8), ("cs", 2, 1)]


def test_fixed_length() -> None:
    (point,) = parse_points("cs:k=4:bs=2:seq=128", "mixtral")
    assert (point.top_k, point.per_device_batch_size, point.seq_len_tokens) == (4, 2, 128)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ; ",
        "cs",
        "cs:sparse",
        "cs:sparse:bs=",
        "cs:sparse:bs=1,",
        "cs:sparse:bs=x",
        "cs:sparse:bs=-1",
        "cs:sparse:bs=0",
        "cs:k=9:bs=1",
        "cs:k=0:bs=1",
        "cs:thin:bs=1",
        "cs:sparse:bs=1:seq=0",
        "cs:sparse:bs=1:len=3",
        "CS:sparse:bs=1",
        "../x:sparse:bs=1",
        "paper,cs:sparse:bs=1",
        "cs:sparse:bs=99999999999999999999",
    ],
)
def test_points_that_are_not_understood_are_refused(text: str) -> None:
    with pytest.raises(UserError):
        parse_points(text, "mixtral")


@given(st.lists(points.map(lambda p: replace(p, preset="full", num_layers=32)), min_size=1, max_size=6, unique=True))
def test_what_is_written_as_points_is_what_is_parsed(grid: list[Point]) -> None:
    text = " ".join(
        f"{p.dataset}:k={p.top_k}:bs={p.per_device_batch_size}"
        + (f":seq={p.seq_len_tokens}" if p.seq_len_tokens else "")
        for p in grid
    )
    assert parse_points(text, "mixtral") == grid


@given(st.text(max_size=40))
def test_any_text_gives_points_or_a_user_error(text: str) -> None:
    with contextlib.suppress(UserError):
        assert parse_points(text, "mixtral")


# --- depths ---


def test_depths_stay_together_and_change_nothing_else() -> None:
    grid = paper_points("mixtral")
    deep = points_at_depths(grid, "slice", [18, 4], 32)
    assert [point.num_layers for point in deep] == [18, 4] * len(grid)
    for point, original in zip(deep, itertools.chain.from_iterable((p, p) for p in grid), strict=True):
        assert replace(point, preset="full", num_layers=32) == original
