"""Which launches are looked into, and that the step is sampled as it was seen."""

import pickle
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tunescope import results
from tunescope.measure.kernel_sampling import Kind, Seen, choose, form_of, in_time_of_trace
from tunescope.measure.ncu_child import SCRATCH, TASK_FILE, part_filter
from tunescope.measure.plan import Options, make_plan
from tunescope.ncu.counters import SAMPLING_FILE
from tunescope.ncu.op_costs import OpCost
from tunescope.ncu.settings import Settings

KINDS = st.dictionaries(
    st.builds(
        Kind, st.sampled_from("abcdefgh"), st.sampled_from(("forward", "recompute", "backward")),
        st.sampled_from(("aten::mm", "aten::mul", "aten::sort")),
    ),
    st.builds(Seen, st.integers(1, 300), st.floats(0, 1), st.integers(0, 8)),
    max_size=16,
)  # fmt: skip


def launches(chosen: dict[Kind, frozenset[int]], seen: dict[Kind, Seen]) -> int:
    return sum(len(calls) * seen[kind].launches_per_call for kind, calls in chosen.items())


@given(KINDS, st.integers(0, 200))
def test_calls_are_chosen_within_the_limit(seen: dict[Kind, Seen], max_launches: int) -> None:
    chosen = choose(seen, max_launches)
    assert launches(chosen, seen) <= max_launches
    for kind, calls in chosen.items():
        assert calls
        assert all(0 <= call < seen[kind].num_calls for call in calls)
        assert seen[kind].launches_per_call  # of others ncu sees nothing
    if max_launches >= sum(what.launches_per_call for what in seen.values()) * 2:
        largest = max(seen.values(), key=lambda what: what.busy_s * bool(what.launches_per_call), default=None)
        assert not largest or not largest.launches_per_call or largest in [seen[kind] for kind in chosen]


@given(KINDS)
def test_without_a_limit_that_binds_small_kinds_are_whole(seen: dict[Kind, Seen]) -> None:
    chosen = choose(seen, 10**6)
    assert set(chosen) == {kind for kind, what in seen.items() if what.launches_per_call}
    for kind, calls in chosen.items():
        assert len(calls) == min(4, seen[kind].num_calls)


@given(KINDS)
def test_what_takes_a_hundredth_of_the_time_comes_first(seen: dict[Kind, Seen]) -> None:
    """With as many launches as one call of each large operator needs, no launch goes elsewhere."""
    times_s: Counter[str] = Counter()
    most: Counter[str] = Counter()
    for kind, what in seen.items():
        if what.launches_per_call:
            times_s[kind.op] += what.busy_s  # type: ignore[assignment]
            most[kind.op] = max(most[kind.op], what.launches_per_call)
    large = {op for op, time_s in times_s.items() if time_s >= 0.01 * sum(times_s.values()) and time_s}
    chosen = choose(seen, sum(most[op] for op in large))
    assert {kind.op for kind in chosen} >= large


def test_the_largest_come_first_and_calls_are_spread() -> None:
    small, large = Kind("a", "forward", "aten::add"), Kind("b", "forward", "aten::mm")
    chosen = choose({small: Seen(100, 0.001), large: Seen(100, 1.0)}, 4)
    assert sorted(chosen[large]) == [16, 50, 83]
    assert chosen[small] == {50}
    assert choose({small: Seen(9, 0.001), large: Seen(9, 1.0)}, 1) == {large: frozenset({4})}


def test_a_call_of_several_launches_counts_as_such() -> None:
    kind = Kind("a", "forward", "bitsandbytes::gemm_4bit")
    seen = {kind: Seen(8, 1.0, launches_per_call=4)}
    assert choose(seen, 3) == {}
    assert len(choose(seen, 9)[kind]) == 2
    # As much time in one launch as in four: the one comes first.
    single = Kind("a", "backward", "aten::mm")
    assert len(choose(seen | {single: Seen(8, 1.0)}, 8)[single]) == 4


def test_forward_and_recompute_share_their_calls() -> None:
    forward, recompute = (Kind("a", phase, "aten::mm") for phase in ("forward", "recompute"))
    other = Kind("b", "forward", "aten::mm")
    seen = {forward: Seen(9, 1.0), recompute: Seen(9, 1.0), other: Seen(9, 0.9)}
    assert {kind: len(calls) for kind, calls in choose(seen, 2).items()} == {forward: 1, other: 1}
    assert {kind: len(calls) for kind, calls in choose(seen, 3).items()} == {forward: 1, recompute: 1, other: 1}


def test_times_are_those_of_the_trace() -> None:
    gate, expert = Kind("gate", "forward", "aten::mm"), Kind("expert", "forward", "aten::mm")
    sort, unknown = Kind("gate", "forward", "aten::sort"), Kind("gate", "forward", "x::y")
    seen = {gate: Seen(2, 1.0), expert: Seen(8, 2.0), sort: Seen(2, 1.0), unknown: Seen(2, 0.5)}
    # Products outside of the part have as much work again; a sort makes three launches, and a copy.
    least_s = {"aten::mm": 6.0, "aten::sort": 1.0, "x::y": 0.5}
    costs = {"aten::mm": OpCost(20, 20, int(12e9)), "aten::sort": OpCost(2, 5, int(9e9)), "z::z": OpCost(1, 1, 10**9)}
    found = in_time_of_trace(seen, least_s, costs)
    assert found == {gate: Seen(2, 2.0), expert: Seen(8, 4.0), sort: Seen(2, 9.0, 3), unknown: Seen(2, 0.5 * 21 / 7)}
    assert in_time_of_trace(seen, least_s, {}) == seen


def test_two_sides_of_a_product_are_two_kinds() -> None:
    tall, wide = torch.ones(4, 2), torch.ones(4, 3, dtype=torch.bfloat16)
    assert form_of((tall.t(), wide), {}) == "float32:2t,bfloat16:2"
    assert form_of((tall, None, [wide, 3]), {"out": torch.ones(())}) == "float32:2,bfloat16:2,float32:0"


def test_part_of_the_layers() -> None:
    is_wanted = part_filter("mixtral", "moe")
    assert is_wanted("base_model.model.model.layers.31.block_sparse_moe.experts.7.w1.lora_A.default")
    assert is_wanted("model.layers.0.block_sparse_moe")
    assert not is_wanted("model.layers.0.self_attn.q_proj")
    assert not is_wanted("model.norm")
    assert not part_filter("mixtral", "moe", layers=(3,))("model.layers.0.block_sparse_moe")
    assert part_filter("mixtral", "moe", layers=(3,))("model.layers.3.block_sparse_moe")


@pytest.fixture(scope="module", params=["mixtral", "blackmamba"])
def sampled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny point, run as ncu would run it, but without ncu."""
    work_dir = tmp_path_factory.mktemp(request.param)
    settings = Settings(max_launches=150)
    plan = make_plan(
        Options(kind="ncu", model=request.param, preset="tiny", points="random:sparse:bs=2:seq=32", ncu=settings)
    )
    (work_dir / TASK_FILE).write_bytes(pickle.dumps(plan.specs[0]))
    command = [sys.executable, "-m", "tunescope.measure.ncu_child", str(work_dir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not (work_dir / SCRATCH).exists()
    return {"model": request.param} | dict(results.read_json(work_dir / SAMPLING_FILE))


def test_a_real_step_is_sampled(sampled: dict[str, Any]) -> None:
    assert sampled["is_done"]
    kinds = sampled["kinds"]
    assert kinds
    assert all(max(kind["sampled_calls"], default=0) < kind["num_calls"] for kind in kinds)
    largest = max(kinds, key=lambda kind: kind["busy_s"])
    assert largest["sampled_calls"]
    phases = Counter(kind["phase"] for kind in kinds)
    recompute = {"recompute"} if sampled["model"] == "mixtral" else set()
    assert set(phases) == {"forward", "backward"} | recompute
    looked_into = {(kind["path"], kind["op"]) for kind in kinds if kind["sampled_calls"]}
    assert looked_into == {(kind["path"], kind["op"]) for kind in kinds}  # none is left out
    assert sum(len(kind["sampled_calls"]) * kind["launches_per_call"] for kind in kinds) <= 150
    if sampled["model"] == "mixtral":  # two layers, eight experts: what runs once an expert runs 16 times
        products = [k for k in kinds if k["op"] == "bitsandbytes::gemm_4bit" and k["path"].endswith("w1.base_layer")]
        assert {kind["phase"]: kind["num_calls"] for kind in products} == {"forward": 16, "recompute": 16}


def test_ranges_are_closed_where_a_call_fails() -> None:
    from tunescope.measure import kernel_sampling
    from tunescope.measure.op_watch import Place

    open_ranges: list[str] = []
    step = kernel_sampling.SampledStep(lambda path: True, ("forward",), 0)
    step._paths, step._wanted = {0: "a"}, {0}
    step.chosen = {Kind("a", "forward", "aten::mm", ""): frozenset({0})}

    class Nvtx:
        range_push = staticmethod(open_ranges.append)
        range_pop = staticmethod(open_ranges.pop)

    def fails() -> None:
        assert open_ranges == ["tunescope", "forward|a|aten.mm|"]
        raise RuntimeError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "nvtx", Nvtx)
        with pytest.raises(RuntimeError):
            step._sample(Place(0, "forward", "aten::mm", ""), None, (), {}, fails)
    assert open_ranges == []
