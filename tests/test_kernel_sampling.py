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
from tunescope.measure.kernel_sampling import Kind, Seen, choose
from tunescope.measure.ncu_child import SCRATCH, TASK_FILE, part_filter
from tunescope.measure.plan import Options, make_plan
from tunescope.ncu.counters import SAMPLING_FILE
from tunescope.ncu.settings import Settings

KINDS = st.dictionaries(
    st.builds(Kind, st.sampled_from("abcdefgh"), st.sampled_from(("forward", "backward")), st.just("aten::mm")),
    st.builds(Seen, st.integers(1, 300), st.floats(0, 1)),
    max_size=16,
)


@given(KINDS, st.integers(0, 200))
def test_calls_are_chosen_within_the_limit(seen: dict[Kind, Seen], max_launches: int) -> None:
    chosen = choose(seen, max_launches)
    assert sum(len(calls) for calls in chosen.values()) <= max_launches
    for kind, calls in chosen.items():
        assert calls
        assert all(0 <= call < seen[kind].num_calls for call in calls)
    if max_launches >= 2 * len(seen):
        assert set(chosen) == set(seen)


@given(KINDS)
def test_without_a_limit_that_binds_small_kinds_are_whole(seen: dict[Kind, Seen]) -> None:
    for kind, calls in choose(seen, 10**6).items():
        assert len(calls) == min(4, seen[kind].num_calls)


def test_the_largest_come_first_and_calls_are_spread() -> None:
    small, large = Kind("a", "forward", "aten::add"), Kind("b", "forward", "aten::mm")
    chosen = choose({small: Seen(100, 0.001), large: Seen(100, 1.0)}, 4)
    assert sorted(chosen[large]) == [16, 50, 83]
    assert chosen[small] == {50}
    assert choose({small: Seen(9, 0.001), large: Seen(9, 1.0)}, 1) == {large: frozenset({4})}


def test_a_call_of_several_launches_counts_as_such() -> None:
    kind = Kind("a", "forward", "bitsandbytes::gemm_4bit")
    assert choose({kind: Seen(8, 1.0)}, 3) == {}
    assert len(choose({kind: Seen(8, 1.0)}, 9)[kind]) == 2


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
    largest = max(kinds, key=lambda kind: kind["least_s"])
    assert len(largest["sampled_calls"]) > 1
    phases = Counter(kind["phase"] for kind in kinds)
    recompute = {"recompute"} if sampled["model"] == "mixtral" else set()
    assert set(phases) == {"forward", "backward"} | recompute
    for name in ("op", "path"):  # none is left out
        looked_into = {(kind["phase"], kind[name]) for kind in kinds if kind["sampled_calls"]}
        assert looked_into == {(kind["phase"], kind[name]) for kind in kinds}
    if sampled["model"] == "mixtral":  # two layers, eight experts: what runs once an expert runs 16 times
        products = [k for k in kinds if k["op"] == "bitsandbytes::gemm_4bit" and k["path"].endswith("w1.base_layer")]
        assert {kind["phase"]: kind["num_calls"] for kind in products} == {"forward": 16, "recompute": 16}


def test_ranges_are_closed_where_a_call_fails() -> None:
    from tunescope.measure import kernel_sampling
    from tunescope.measure.op_watch import Place

    open_ranges: list[str] = []
    step = kernel_sampling.SampledStep(lambda path: True, ("forward",), 0)
    step._paths, step._wanted = {0: "a"}, {0}
    step.chosen = {Kind("a", "forward", "aten::mm"): frozenset({0})}

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
