"""Points held out: nothing of them leaks into their forecasts, the errors meet the targets, the document is current."""

import csv
import io
import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from scipy import stats

from tunescope.cost import validation
from tunescope.cost.time_model import default_model
from tunescope.cost.time_packaged import own_points
from tunescope.cost.time_points import paper_points
from tunescope.cost.validation import (
    LEAVE_GPU,
    LEAVE_POINT,
    OTHER_RUNS,
    OWN_POINT,
    OWN_UNSEEN,
    SPLITS,
    HeldOut,
    clopper_pearson,
    held_out,
    summary,
)
from tunescope.errors import UserError
from tunescope.report.validation import CSV_COLUMNS, TARGETS, constants_text, print_validation, validation_text

ROOT = Path(__file__).parents[1]


@cache
def rows() -> tuple[HeldOut, ...]:
    return tuple(held_out(own_points()))


def of(split: str) -> list[HeldOut]:
    return [row for row in rows() if row.split == split]


# --- splits ----------------------------------------------------------------------------------------------------------


def test_every_point_of_a_split_is_held_out_once() -> None:
    assert [row.point for row in of(LEAVE_POINT)] == list(paper_points())
    assert len(of(LEAVE_GPU)) == 57  # Mixtral's; BlackMamba has one GPU
    assert len({id(row.point) for row in of(LEAVE_GPU)}) == 57
    assert len(of(OTHER_RUNS)) == 10
    assert [row.point for row in of(OWN_UNSEEN)] == [row.point for row in of(OWN_POINT)] == list(own_points())
    assert {row.split for row in rows()} == set(SPLITS)


def falsified(points: tuple, is_held_out: list[bool]) -> tuple:
    """The points, with nonsense where a forecast must not look."""
    return tuple(
        replace(point, step_s=point.step_s * (5 + number % 7)) if held else point
        for number, (point, held) in enumerate(zip(points, is_held_out, strict=True))
    )


@pytest.mark.parametrize("number", [37, 95])
def test_a_point_left_out_does_not_leak(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    points = paper_points()
    wrong = falsified(points, [place == number for place in range(len(points))])
    monkeypatch.setattr(validation, "paper_points", lambda: wrong)
    found = held_out((), [LEAVE_POINT])
    pairs = list(zip(found, of(LEAVE_POINT), strict=True))
    assert pairs[number][0].forecast == pairs[number][1].forecast
    assert pairs[number][0].paper_step_s == pairs[number][1].paper_step_s
    # All the others do see it.
    assert sum(one.forecast != other.forecast for one, other in pairs) == len(points) - 1


@pytest.mark.parametrize("device", sorted({point.device.name for point in paper_points()}))
def test_a_gpu_left_out_does_not_leak(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    points = paper_points()
    wrong = falsified(points, [point.device.name == device for point in points])
    monkeypatch.setattr(validation, "paper_points", lambda: wrong)
    found = [row for row in held_out((), [LEAVE_GPU]) if row.point.device.name == device]
    expected = [row for row in of(LEAVE_GPU) if row.point.device.name == device]
    assert [row.forecast for row in found] == [row.forecast for row in expected]
    assert [row.paper_step_s for row in found] == [row.paper_step_s for row in expected]
    assert all(row.forecast.is_extrapolated for row in found)


def test_own_points_do_not_leak_into_their_forecasts_from_the_paper() -> None:
    wrong = falsified(own_points(), [True] * len(own_points()))
    found = held_out(wrong, [OWN_UNSEEN])
    assert [row.forecast for row in found] == [row.forecast for row in of(OWN_UNSEEN)]


def test_equation_2_is_the_fit_of_its_sweep() -> None:
    """One point out of the A40's CS sweep of Mixtral, by hand: q = c4 + c2 x, x = ln b, over 0.25 C3 where sparse."""
    row = next(row for row in of(LEAVE_POINT) if (row.point.dataset, row.point.batch_size) == ("cs", 5))
    sweep = [
        point
        for point in paper_points()
        if (point.model, point.device, point.dataset) == ("mixtral", row.point.device, "cs") and point != row.point
    ]
    assert len(sweep) == 9
    abscissa = [math.log(point.batch_size) / (1 if point.top_k == 8 else 0.25 * 1.8) for point in sweep]
    line = stats.linregress(abscissa, [point.batch_size / point.step_s for point in sweep])
    queries_per_s = line.intercept + line.slope * math.log(5) / (0.25 * 1.8)
    assert row.paper_step_s == pytest.approx(5 / queries_per_s)


# --- what comes out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [LEAVE_POINT, LEAVE_GPU])
def test_targets_of_the_paper_s_points_are_met(split: str) -> None:
    found = summary(of(split))
    assert found.median_frac <= TARGETS[split]
    assert found.paper_median_frac is not None
    assert found.ours_median_frac is not None
    assert found.ours_median_frac < found.paper_median_frac


def test_ninety_percent_intervals_cover_about_that() -> None:
    found = summary(rows())
    assert found.num_points >= 100
    low, high = found.coverage_interval
    assert low <= found.coverage_frac <= high
    assert found.coverage_frac >= validation.COVERAGE_LEVEL - 0.05


def test_a_summary_is_of_its_errors() -> None:
    some = of(OTHER_RUNS)
    found = summary(some)
    errors = sorted(abs(row.forecast.median_s / row.point.step_s - 1) for row in some)
    assert found.median_frac == pytest.approx((errors[4] + errors[5]) / 2)
    assert found.p90_frac == errors[8]
    assert found.largest_frac == errors[9]
    assert (found.num_paper, found.paper_median_frac) == (0, None)
    with pytest.raises(ValueError, match="nothing"):
        summary([])


@pytest.mark.parametrize(
    ("hits", "trials", "expected"),
    [(0, 10, (0.0, 0.30850)), (10, 10, (0.69150, 1.0)), (90, 100, (0.82378, 0.95099)), (5, 10, (0.18709, 0.81291))],
)
def test_clopper_pearson(hits: int, trials: int, expected: tuple[float, float]) -> None:
    """Against the tables of the exact interval, and its definition: each end leaves 2.5 %."""
    low, high = clopper_pearson(hits, trials)
    assert (low, high) == pytest.approx(expected, abs=1e-4)
    if hits:
        assert stats.binom.sf(hits - 1, trials, low) == pytest.approx(0.025, abs=1e-6)
    if hits < trials:
        assert stats.binom.cdf(hits, trials, high) == pytest.approx(0.025, abs=1e-6)


# --- as printed ------------------------------------------------------------------------------------------------------


def test_the_document_has_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails: paste the output of `tunescope table validation` into docs/time_model.md."""
    print_validation("text")
    document = (ROOT / "docs" / "time_model.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() in document


def test_text_has_a_line_for_each_group_and_the_verdicts() -> None:
    text = validation_text(rows())
    for split in SPLITS:
        assert sum(line.startswith(split) for line in text.splitlines()) >= 1
    assert "met" in text
    assert f"{summary(rows()).num_covered} of {len(rows())}" in text
    without_own = validation_text(held_out((), [LEAVE_GPU]))
    assert "no points" in without_own


def test_constants_are_those_of_the_fit() -> None:
    fit = default_model().fit
    text = constants_text(fit)
    assert f"{fit.costs['launches']:.1f}" in text
    for kind in range(3):
        assert all(name in text for name in fit.effects(kind))


def test_csv_and_json_have_every_held_out_point(capsys: pytest.CaptureFixture[str]) -> None:
    print_validation("csv")
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(table) == len(rows())
    assert tuple(table[0]) == CSV_COLUMNS
    for line, row in zip(table, rows(), strict=True):
        assert float(line["forecast_step_s"]) == row.forecast.median_s
        assert float(line["error_percent"]) == pytest.approx(
            100 * (float(line["forecast_step_s"]) / float(line["measured_step_s"]) - 1)
        )
        inside = float(line["low_step_s"]) <= float(line["measured_step_s"]) <= float(line["high_step_s"])
        assert line["is_covered"] == str(inside)
    print_validation("json")
    assert len(json.loads(capsys.readouterr().out)) == len(rows())


def test_another_folder_is_held_out_instead(capsys: pytest.CaptureFixture[str]) -> None:
    print_validation("csv", ROOT / "docs" / "results" / "h200" / "slice")
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len([line for line in table if line["split"] == OWN_UNSEEN]) == 2


def test_bad_input_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--format"):
        print_validation("yaml")
    with pytest.raises(UserError, match="no point that step times"):
        print_validation("text", tmp_path)
