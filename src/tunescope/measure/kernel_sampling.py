"""Opens an NVTX range around a few launches of each operator of the MoE layers, in one training step.

Nsight Compute replays a launch once for every pass of counters, a third of a second for ten passes, and one step of
Mixtral-8x7B has 50,000 launches. So it is told to look into the range SAMPLE only, and a step is run twice: seen once,
to count every operator's calls and what they have to do, then again with the range open around the calls chosen.
"""

import heapq
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback

from tunescope.measure.op_watch import Operator, OpWatch, Place
from tunescope.measure.op_work import Work, work_of
from tunescope.ncu.ranges import SAMPLE, range_name

NUM_WARMUP_STEPS = 1  # it compiles, allocates, and makes the optimizer's state
# Launches of one call, where it is not one: bitsandbytes decodes scales, shifts them, decodes weights, multiplies.
_LAUNCHES_PER_CALL = {"bitsandbytes::gemm_4bit": 4}
_MOST_CALLS = 4  # of a kind
# Of no GPU in particular: what is small and what is large is the same on all of them.
_LEAST_S, _BYTES_PER_S, _FLOP_PER_S = 2e-6, 2e12, 300e12


class Kind(NamedTuple):
    """What is sampled alike. path: of the module, without the numbers of layer and expert."""

    path: str
    phase: str
    op: str


@dataclass
class Seen:
    """What one step did of a kind. least_s: of all its calls, on some GPU."""

    num_calls: int = 0
    least_s: float = 0.0

    def add(self, work: list[Work]) -> None:
        self.num_calls += 1
        for part in work:
            moved_s = (part.read_bytes + part.written_bytes) / _BYTES_PER_S
            self.least_s += max(moved_s, part.flop / _FLOP_PER_S, _LEAST_S)


def choose(seen: Mapping[Kind, Seen], max_launches: int) -> dict[Kind, frozenset[int]]:
    """Which calls of each kind to look into, counted from 0 and spread over the step; at most max_launches in all.

    Half of them go to what takes longest, up to four calls of a kind. Then every operator and every module of a phase
    has one call looked into, then every kind, and what is left goes again to what takes longest.
    """
    by_size = sorted(seen, key=lambda kind: (-seen[kind].least_s, kind))
    quotas: dict[Kind, int] = dict.fromkeys(by_size, 0)
    left = max_launches

    def give(kind: Kind, reserved: int = 0) -> bool:
        nonlocal left
        launches = _LAUNCHES_PER_CALL.get(kind.op, 1)
        if quotas[kind] >= min(_MOST_CALLS, seen[kind].num_calls) or launches > left - reserved:
            return False
        quotas[kind] += 1
        left -= launches
        return True

    def give_to_the_largest(reserved: int) -> None:
        waiting = [(-seen[kind].least_s, order, kind) for order, kind in enumerate(by_size)]
        heapq.heapify(waiting)
        while waiting:
            _, order, kind = heapq.heappop(waiting)
            if give(kind, reserved):  # half as much is learned from a second call, a third from a third
                heapq.heappush(waiting, (-seen[kind].least_s / (quotas[kind] + 1), order, kind))

    give_to_the_largest(reserved=max_launches - max_launches // 2)
    met = {name for kind in by_size if quotas[kind] for name in ((kind.phase, kind.op), (kind.phase, kind.path))}
    for kind in by_size:
        names = {(kind.phase, kind.op), (kind.phase, kind.path)}
        if not names <= met and give(kind):
            met |= names
    for kind in by_size:
        if not quotas[kind]:
            give(kind)
    give_to_the_largest(reserved=0)
    return {
        kind: frozenset(int((number + 0.5) * seen[kind].num_calls / quota) for number in range(quota))
        for kind, quota in quotas.items()
        if quota
    }


class SampledStep(TrainerCallback):
    """Runs a step that is seen and one that is sampled, after the warm-up; then training ends.

    is_wanted: module's path -> whether its operators are to be sampled. phases: which of them. max_launches: 0 for
    all of them.
    """

    def __init__(self, is_wanted: Callable[[str], bool], phases: Collection[str], max_launches: int) -> None:
        self.is_wanted = is_wanted
        self.phases = phases
        self.max_launches = max_launches
        self.seen: dict[Kind, Seen] = {}
        self.chosen: dict[Kind, frozenset[int]] = {}
        self.is_done = False
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
                "least_s": seen.least_s,
                "sampled_calls": sorted(self.chosen.get(kind, ())),
            }
            for kind, seen in sorted(self.seen.items())
        ]
        return {"is_done": self.is_done, "max_launches": self.max_launches, "kinds": kinds}

    def _is_wanted(self, place: Place) -> bool:
        return place.module in self._wanted and place.phase in self.phases

    def _kind(self, place: Place) -> Kind:
        return Kind(re.sub(r"\.\d+\b", ".*", self._paths[place.module]), place.phase, place.op)

    def _see(self, place: Place, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], call: Operator) -> Any:
        output = call()
        if self._is_wanted(place) and (work := work_of(place.op, func, args, kwargs, output)):
            self.seen.setdefault(self._kind(place), Seen()).add(work)
        return output

    def _sample(self, place: Place, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], call: Operator) -> Any:
        if not self._is_wanted(place):
            return call()
        kind = self._kind(place)
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
