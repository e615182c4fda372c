"""Opens an NVTX range around a few launches of each operator of the MoE layers, in one training step.

Nsight Compute replays a launch once for every pass of counters, ten times in 0.4 to 0.7 s (an H200, ncu 2025.3.1), and
one step of Mixtral-8x7B has 50,000 launches. So it is told to look into the range SAMPLE only, and a step is run twice:
seen once, to count every operator's calls and what they have to do, then again with the range open around the calls
chosen.
"""

import heapq
import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback

from tunescope.latency_files import BACKWARD
from tunescope.measure.op_watch import Operator, OpWatch, Place
from tunescope.measure.op_work import Work, tensors_of, work_of
from tunescope.ncu.op_costs import OpCost
from tunescope.ncu.ranges import SAMPLE, range_name

NUM_WARMUP_STEPS = 1  # it compiles, allocates, and makes the optimizer's state
# Launches of one call, where it is not one and no trace says: bitsandbytes decodes scales, shifts them, decodes
# weights, multiplies.
_LAUNCHES_PER_CALL = {"bitsandbytes::gemm_4bit": 4}
_MOST_CALLS = 4  # of a kind
_LARGE_FRAC = 0.01
# Of no GPU in particular: what is small and what is large is the same on all of them.
_LEAST_S, _BYTES_PER_S, _FLOP_PER_S = 2e-6, 2e12, 300e12


class Kind(NamedTuple):
    """What is sampled alike. path: of the module, without the numbers of layer and expert. form: of its tensors, on
    which the kernel depends: the gradients of a product's two sides are one operator and two kernels."""

    path: str
    phase: str
    op: str
    form: str = ""


def form_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Type, dimensions and order of each tensor, as `bfloat16:2t` for a matrix that is not in rows."""
    return ",".join(
        f"{str(tensor.dtype).removeprefix('torch.')}:{tensor.dim()}{'' if tensor.is_contiguous() else 't'}"
        for tensor in tensors_of((args, kwargs))
    )


@dataclass
class Seen:
    """What one step did of a kind. busy_s: of all its calls; until `in_time_of_trace`, the least on some GPU.
    launches_per_call: of kernels; 0 for a kind of which ncu would see nothing."""

    num_calls: int = 0
    busy_s: float = 0.0
    launches_per_call: int = 1


def least_s(work: list[Work]) -> float:
    """What a call takes at least, on no GPU in particular."""
    return sum(
        max((part.read_bytes + part.written_bytes) / _BYTES_PER_S, part.flop / _FLOP_PER_S, _LEAST_S) for part in work
    )


def in_time_of_trace(
    seen: Mapping[Kind, Seen], least_by_op_s: Mapping[str, float], costs: Mapping[str, OpCost]
) -> dict[Kind, Seen]:
    """The kinds with launches_per_call and busy_s as a trace has them: it gives the time of each operator, and what
    each kind does at least says how that is divided among its kinds. Where the trace lacks an operator, as they are.

    least_by_op_s: of all calls of an operator in a step, in every module.
    """
    least_all_s = sum(least_by_op_s[name] for name in least_by_op_s if name in costs)
    traced_s = sum(costs[name].busy_ns for name in least_by_op_s if name in costs) / 1e9
    found = {}
    for kind, what in seen.items():
        launches, busy_s = _LAUNCHES_PER_CALL.get(kind.op, 1), what.busy_s
        if traced_s and (cost := costs.get(kind.op)) is not None:
            launches = math.ceil(cost.num_launches / cost.num_calls)
            busy_s = cost.busy_ns / 1e9 * what.busy_s / least_by_op_s[kind.op]
        elif traced_s:
            busy_s *= traced_s / least_all_s
        found[kind] = Seen(what.num_calls, busy_s, launches)
    return found


def choose(seen: Mapping[Kind, Seen], max_launches: int) -> dict[Kind, frozenset[int]]:
    """Which calls of each kind to look into, counted from 0 and spread over the step; at most max_launches in all.

    First comes one call of every operator that takes 1 % of the time or more, then of every operator of a module that
    does, then of every kind that does: each time the longest first. Then every operator of a module and of a phase that
    has none yet. What is left goes to what has most time for a launch, a second call counting half of a first. Forward
    and its recompute do the same, so that a call of one is a call of both.
    """
    kinds = sorted((kind for kind in seen if seen[kind].launches_per_call), key=lambda k: (-seen[k].busy_s, k))
    total_s = sum(seen[kind].busy_s for kind in kinds)
    quotas: dict[Kind, int] = dict.fromkeys(kinds, 0)
    left = max_launches

    def give(kind: Kind) -> bool:
        nonlocal left
        if quotas[kind] >= min(_MOST_CALLS, seen[kind].num_calls) or seen[kind].launches_per_call > left:
            return False
        quotas[kind] += 1
        left -= seen[kind].launches_per_call
        return True

    def groups_by(key: Callable[[Kind], Any]) -> dict[Any, list[Kind]]:
        groups: dict[Any, list[Kind]] = {}
        for kind in kinds:
            groups.setdefault(key(kind), []).append(kind)
        return groups

    twins = groups_by(_twin)
    times_s = {twin: sum(seen[kind].busy_s for kind in members) for twin, members in twins.items()}
    for groups in (groups_by(lambda kind: kind.op), groups_by(lambda kind: (kind.path, kind.op)), twins):
        of_group_s = {group: sum(seen[kind].busy_s for kind in members) for group, members in groups.items()}
        for group in sorted(groups, key=lambda group: -of_group_s[group]):
            if of_group_s[group] >= _LARGE_FRAC * total_s and not any(quotas[kind] for kind in groups[group]):
                any(give(kind) for kind in groups[group])
    met = {name for kind in kinds if quotas[kind] for name in _names(kind)}
    for kind in kinds:
        if not _names(kind) <= met and give(kind):
            met |= _names(kind)

    def waits(kind: Kind) -> tuple[float, int, Kind]:
        given = sum(quotas[twin] for twin in twins[_twin(kind)])
        return -times_s[_twin(kind)] / seen[kind].launches_per_call / (given + 1), quotas[kind], kind

    waiting = [waits(kind) for kind in kinds]
    heapq.heapify(waiting)
    while waiting:
        entry = heapq.heappop(waiting)
        kind = entry[-1]
        if entry != (now := waits(kind)):  # its twin was given a call since
            heapq.heappush(waiting, now)
        elif give(kind):
            heapq.heappush(waiting, waits(kind))
    return {
        kind: frozenset(int((number + 0.5) * seen[kind].num_calls / quota) for number in range(quota))
        for kind, quota in quotas.items()
        if quota
    }


def _twin(kind: Kind) -> tuple[str, bool, str, str]:
    return kind.path, kind.phase == BACKWARD, kind.op, kind.form


def _names(kind: Kind) -> set[tuple[str, str]]:
    return {(str(kind.phase == BACKWARD), kind.op), (kind.path, kind.op)}


class SampledStep(TrainerCallback):
    """Runs a step that is seen and one that is sampled, after the warm-up; then training ends.

    is_wanted: module's path -> whether its operators are to be sampled. phases: which of them. max_launches: 0 for
    all of them. costs: operator -> its cost, by the trace of another run; without it those of some GPU.
    """

    def __init__(
        self,
        is_wanted: Callable[[str], bool],
        phases: Collection[str],
        max_launches: int,
        costs: Mapping[str, OpCost] | None = None,
    ) -> None:
        self.costs = costs or {}
        self.is_wanted = is_wanted
        self.phases = phases
        self.max_launches = max_launches
        self.seen: dict[Kind, Seen] = {}
        self.chosen: dict[Kind, frozenset[int]] = {}
        self.is_done = False
        self._least_by_op_s: dict[str, float] = defaultdict(float)
        self._num_calls: dict[Kind, int] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._watch = OpWatch(model, self._see)
        self._paths = self._watch.paths
        self._wanted = {number for number, path in self._paths.items() if self.is_wanted(path)}
        self._num_steps = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._num_steps >= NUM_WARMUP_STEPS:
            self._watch.watcher = self._see if self._num_steps == NUM_WARMUP_STEPS else self._sample
            self._watch.install()
            self._watch.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._num_steps >= NUM_WARMUP_STEPS:
            self._watch.__exit__(None, None, None)
            self._watch.remove()
        if self._num_steps == NUM_WARMUP_STEPS:
            self.seen = in_time_of_trace(self.seen, self._least_by_op_s, self.costs)
            if not self.max_launches:
                self.chosen = {kind: frozenset(range(seen.num_calls)) for kind, seen in self.seen.items()}
            else:
                self.chosen = choose(self.seen, self.max_launches)
        elif self._num_steps > NUM_WARMUP_STEPS:
            if args.device.type == "cuda":
                torch.cuda.synchronize()
            self.is_done = control.should_training_stop = True
        self._num_steps += 1

    def to_json(self) -> dict[str, Any]:
        """What the step did of each kind, and which calls were looked into."""
        kinds = [
            {
                **kind._asdict(),
                "num_calls": seen.num_calls,
                "busy_s": seen.busy_s,
                "launches_per_call": seen.launches_per_call,
                "sampled_calls": sorted(self.chosen.get(kind, ())),
            }
            for kind, seen in sorted(self.seen.items())
        ]
        return {"is_done": self.is_done, "max_launches": self.max_launches, "kinds": kinds}

    def _is_wanted(self, place: Place) -> bool:
        return place.module in self._wanted and place.phase in self.phases

    def _kind(self, place: Place, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Kind:
        path = re.sub(r"\.\d+\b", ".*", self._paths[place.module])
        return Kind(path, place.phase, place.op, form_of(args, kwargs))

    def _see(self, place: Place, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], call: Operator) -> Any:
        output = call()
        if work := work_of(place.op, func, args, kwargs, output):
            call_s = least_s(work)
            self._least_by_op_s[place.op] += call_s
            if self._is_wanted(place):
                seen = self.seen.setdefault(self._kind(place, args, kwargs), Seen())
                seen.num_calls += 1
                seen.busy_s += call_s
        return output

    def _sample(self, place: Place, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], call: Operator) -> Any:
        if not self._is_wanted(place):
            return call()
        kind = self._kind(place, args, kwargs)
        number = self._num_calls.get(kind, 0)
        self._num_calls[kind] = number + 1
        if number not in self.chosen.get(kind, ()):
            return call()
        torch.cuda.nvtx.range_push(SAMPLE)
        torch.cuda.nvtx.range_push(range_name(place.phase, self._paths[place.module], place.op, place.node))
        try:
            return call()
        finally:
            torch.cuda.nvtx.range_pop()
            torch.cuda.nvtx.range_pop()
