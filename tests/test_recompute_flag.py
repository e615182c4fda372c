"""--recompute and --no-graphs: what they make of a plan's points, on which machine, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
from test_plan import gpu, machine  # noqa: F401  machine is a fixture of every test

from tunescope.cli import _layers_to_recompute
from tunescope.config import LATENCY
from tunescope.errors import UserError
from tunescope.families import find_family
from tunescope.measure.inputs import check_recompute
from tunescope.measure.plan import FAST_SETTINGS, Options, PointSpec, make_plan

H200 = gpu("NVIDIA H200", 140.4)


def spec_of(points: str = "random:sparse:bs=32:seq=128", **flags: Any) -> PointSpec:
    (spec,) = make_plan(Options(points=points, **flags), _layers_to_recompute).specs
    return spec


def test_grouped_on_a_gpu_replays_graphs_and_fuses_the_optimizer(machine) -> None:  # noqa: F811
    machine(H200)
    stock, grouped = spec_of(), spec_of(moe="grouped")
    assert (stock.workload.graphs, grouped.workload.graphs) == (False, True)
    assert grouped.workload.recipe == stock.workload.recipe | FAST_SETTINGS
    assert not {"graphs", "checkpointed_layers"} & set(stock.workload.to_json())
    without = spec_of(moe="grouped", graphs=False)
    assert without.point_id == f"{grouped.point_id}-no-graphs"
    assert without.point_json()["recipe_hash"] != grouped.point_json()["recipe_hash"]
    # A breakdown sees layers, which a graph hides.
    assert not spec_of("random:sparse:bs=1:seq=128", moe="grouped", kind=LATENCY).workload.graphs


def test_without_a_gpu_nothing_of_it_applies(machine) -> None:  # noqa: F811
    machine()
    grouped = spec_of(preset="tiny", moe="grouped")
    assert not grouped.workload.graphs
    assert grouped.workload.recipe["optim"] == spec_of(preset="tiny").workload.recipe["optim"]


def test_auto_recomputes_what_memory_needs(machine) -> None:  # noqa: F811
    """On an H200 everything of a small batch stays; the larger the batch and the smaller the budget, the less."""
    machine(H200)

    def layers(batch: int, budget_gib: float | None = None) -> int:
        spec = spec_of(
            f"random:sparse:bs={batch}:seq=128", moe="grouped", recompute="auto", memory_budget_gib=budget_gib
        )
        assert spec.point_id.endswith("-grouped-recompute-auto")
        found = spec.workload.checkpointed_layers
        assert found == tuple(range(len(found or ())))
        return len(found or ())

    assert layers(1) == 0
    counts = [layers(32, budget_gib=budget) for budget in (100, 50, 40, 34)]
    assert counts == sorted(counts)
    assert 0 < counts[2] < 32
    assert layers(64, 40) > counts[2]


def test_none_is_of_the_recipe_and_of_any_path(machine) -> None:  # noqa: F811
    machine(H200)
    for moe in ("stock", "grouped"):
        spec = spec_of(moe=moe, recompute="none")
        assert spec.workload.recipe["disable_gradient_checkpointing"] is True
        assert spec.workload.checkpointed_layers is None
        assert spec.point_id.endswith("-recompute-none")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"recompute": "some"}, "no such setting"),
        ({"recompute": "auto"}, "stock path cannot"),
        ({"recompute": "auto", "moe": "grouped", "points": "cs:sparse:bs=max"}, "needs a GPU, a batch size"),
        ({"recompute": "auto", "moe": "grouped", "preset": "slice"}, "needs a GPU, a batch size"),
    ],
)
def test_what_cannot_be_followed_is_refused(machine, flags: dict[str, Any], words: str) -> None:  # noqa: F811
    machine(replace(H200, name="NVIDIA L4", memory_total_bytes=24 * 2**30) if flags.get("preset") else H200)
    with pytest.raises(UserError, match=words):
        spec_of(**flags)


def test_auto_without_a_gpu_is_refused(machine) -> None:  # noqa: F811
    machine()
    with pytest.raises(UserError, match="needs a GPU"):
        spec_of(preset="tiny", moe="grouped", recompute="auto")


def test_where_the_recipe_recomputes_nothing_there_is_nothing_to_say() -> None:
    with pytest.raises(UserError, match="recomputes nothing"):
        check_recompute(find_family("blackmamba"), "none", {"disable_gradient_checkpointing": True}, is_grouped=False)
