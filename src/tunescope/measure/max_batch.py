"""The largest batch that trains: which sizes to try next, what is kept of each trial, and the longest batch itself.

A trial runs a few steps in a process of its own and meets, once the optimizer's state is there, the largest batch that
a shuffle of the data can make. What was tried survives any end of the launcher, which goes on where it was.
"""

import itertools
import resource
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunescope import paper, results
from tunescope.config import MAX_BATCH, Point
from tunescope.measure.inputs import Data

# Steps of a trial. After the first the longest batch is met; a step later once more, with the allocator's blocks as
# other lengths left them.
TRIAL_STEPS = 3
TRIAL_QUERIES = 64  # of synthetic data: the longest of them is stretched to the longest of all
STATE_FOLDER = ".max_batch"  # of searches under way; no table reads it
# A guess is wrong by a share of itself: steps away from a large one begin larger.
_GUESS_PER_STEP = 64
# A measurement takes minutes. After so many the largest that was measured will do, be there one larger that fits.
MAX_MEASUREMENTS = 12


@dataclass(frozen=True, kw_only=True)
class BatchSearch:
    """What a search must know of the data.

    largest_batch_size: beyond it the data do not go. longest_tokens: longest query of the whole data set, as cut; None:
    of a file, all of which each trial reads. data, asked_queries, usual_queries: as inputs.num_training_queries has it.
    """

    largest_batch_size: int
    longest_tokens: int | None
    data: Data
    asked_queries: int | None
    usual_queries: int

    def to_json(self) -> dict[str, Any]:
        return {
            "largest_batch_size": self.largest_batch_size,
            "longest_tokens": self.longest_tokens,
            "trial_steps": TRIAL_STEPS,
        }


def make_search(point: Point, data: Data, asked_queries: int | None, usual_queries: int, cutoff: int) -> BatchSearch:
    """For one point. cutoff: the recipe's cutoff_len (tokens)."""
    limits = [MAX_BATCH]
    if data.num_queries is not None:
        limits.append(data.num_queries // 2)  # one batch warms up, one is timed
    if asked_queries is not None:
        limits.append(asked_queries - 1)
    longest = point.seq_len_tokens
    if longest is None and data.num_queries is None:
        longest = min(max(paper.length_histogram(point.dataset)[0]), cutoff)
    return BatchSearch(
        largest_batch_size=min(limits),
        longest_tokens=longest,
        data=data,
        asked_queries=asked_queries,
        usual_queries=usual_queries,
    )


# --- which size next ---


@dataclass(frozen=True, kw_only=True)
class Trial:
    """status: ok, or oom. is_measurement: it was the whole measurement, which the trial before had promised to fit."""

    batch_size: int
    status: str
    cause: str | None = None
    peak_allocated_bytes: int | None = None
    is_measurement: bool = False


def bracket(trials: Sequence[Trial]) -> tuple[int, int | None]:
    """(largest size that fitted below all that did not, 0 if none; smallest that did not, None if all did).

    One size fits or not as luck has it where memory is nearly full: a size that fitted above one that did not is taken
    for luck. Once a measurement did not fit that a trial had promised, trials promise nothing, and only measurements
    count as fitting.
    """
    counting = [trial for trial in trials if trial.is_measurement] or trials
    too_large = min((trial.batch_size for trial in trials if trial.status == "oom"), default=None)
    fitting = [t.batch_size for t in counting if t.status == "ok" and (too_large is None or t.batch_size < too_large)]
    return max(fitting, default=0), too_large


def next_batch_size(trials: Sequence[Trial], guess: int, largest: int) -> int | None:
    """The size to try next, or to measure where a measurement has not fitted; None where the search is over.

    From the guess in doubling steps to a size on the other side of the limit, then bisection. From a guess of 1 that
    is doubling. Below a measurement that did not fit the same in measurements, MAX_MEASUREMENTS of them once one fits.
    """
    low, high = bracket(trials)
    guess = min(max(guess, 1), largest)
    measured = [trial for trial in trials if trial.is_measurement]
    if high is None:
        if low == 0:
            return guess
        num_steps = sum(trial.status == "ok" and trial.batch_size >= guess for trial in trials)
        return None if low >= largest else min(low + _step(guess, num_steps), largest)
    if high - low <= 1 or (low and len(measured) >= MAX_MEASUREMENTS):
        return None
    if low == 0:
        num_steps = sum(trial.status == "oom" for trial in measured or trials)
        return max(high - _step(1 if measured else guess, num_steps), 1)
    return (low + high) // 2


def _step(guess: int, num_steps: int) -> int:
    return max(guess // _GUESS_PER_STEP, 1) * 2 ** max(num_steps - 1, 0)


# --- the search ---


@dataclass(frozen=True, kw_only=True)
class Found:
    """How a search ended. outcome: of the last process, with what was tried under `max_batch`."""

    batch_size: int
    outcome: dict[str, Any]


class TrialLog:
    """The trials of one search, in a file, so that a killed search goes on where it was.

    Those of another search_hash are dropped: they were of other settings.
    """

    def __init__(self, out_dir: Path, point_id: str, search_hash: str, *, fresh: bool = False) -> None:
        self._file = out_dir / STATE_FOLDER / f"{point_id}.json"
        self._search_hash = search_hash
        self.trials: list[Trial] = []
        if fresh:
            self.remove()
        try:
            content = results.read_json(self._file)
            if content["search_hash"] == search_hash:
                self.trials = [Trial(**trial) for trial in content["trials"]]
        except (results.PointFormatError, LookupError, TypeError):  # there is none, or none that can be read
            self.trials = []

    def add(self, trial: Trial) -> None:
        self.trials.append(trial)
        self._file.parent.mkdir(exist_ok=True)
        new = self._file.with_suffix(".new")
        content = {"search_hash": self._search_hash, "trials": [asdict(trial) for trial in self.trials]}
        results.write_json(new, content)
        new.rename(self._file)

    def remove(self) -> None:
        self._file.unlink(missing_ok=True)
        if self._file.parent.is_dir() and not any(self._file.parent.iterdir()):
            self._file.parent.rmdir()


def find_max_batch(
    search: BatchSearch,
    log: TrialLog,
    guess: int | None,
    run: Callable[[int, bool], dict[str, Any]],
    note: Callable[[str], None],
) -> Found:
    """Tries sizes until the largest that fits is known, and measures it.

    run: (batch size, is a trial) -> outcome of its process. Of a process that failed for another reason than memory the
    search ends with status failed, and is the failure's row. guess: where to begin; None: at 1.
    """
    if bracket(log.trials) == (0, 1):  # killed before that row was published; its outcome is gone
        log.trials.pop()
    start = guess if guess is not None else 1
    while True:
        size = next_batch_size(log.trials, start, search.largest_batch_size)
        is_over, is_measuring = size is None, any(trial.is_measurement for trial in log.trials)
        is_trial = not is_over and not is_measuring
        size = size or bracket(log.trials)[0]
        outcome = run(size, is_trial)
        status = outcome["status"]
        if status == "failed":
            outcome["cause"] = f"{'trying' if is_trial else 'measuring'} batch {size}: {outcome['cause']}"
        elif not is_over or status == "oom":
            note(f"batch {size} {'fits' if status == 'ok' else 'does not fit'}")
            peak_bytes = outcome.get("peak_allocated_bytes")
            log.add(
                Trial(
                    batch_size=size,
                    status=status,
                    cause=outcome["cause"],
                    peak_allocated_bytes=peak_bytes,
                    is_measurement=not is_trial,
                )
            )
            is_result = (
                status == "ok"
                and is_measuring
                and next_batch_size(log.trials, start, search.largest_batch_size) is None
            )
            if bracket(log.trials) != (0, 1) and not is_result:
                continue  # of (0, 1) the row is this outcome: not even one query fits
        outcome["max_batch"] = facts(search, log.trials, guess)
        return Found(batch_size=size, outcome=outcome)


def facts(search: BatchSearch, trials: Sequence[Trial], guess: int | None) -> dict[str, Any]:
    """What outcome.json says of a search."""
    low, high = bracket(trials)
    return {
        "batch_size": low,
        "first_oom_batch_size": high,
        "largest_batch_size_of_data": search.largest_batch_size,
        "longest_tokens": search.longest_tokens,
        "guess": guess,
        "trials": [asdict(trial) for trial in trials],
    }


# --- in the process of a trial ---


def longest_batch_callback(longest_tokens: int | None) -> Any:
    """A Trainer callback that meets the largest batch that a shuffle can make, after every step of a trial.

    That is the longest queries, padded to the longest; the longest is stretched to longest_tokens where the trial's own
    data do not reach it. Only memory is of interest: gradients are dropped.
    """
    import torch
    from transformers import TrainerCallback

    class MeetLongestAfterSteps(TrainerCallback):
        def on_step_end(
            self, args: Any, state: Any, control: Any, model: Any = None, train_dataloader: Any = None, **_: Any
        ) -> None:
            dataset = train_dataloader.dataset
            lengths = [len(ids) for ids in dataset["input_ids"]]
            longest_first = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
            numbers = itertools.islice(itertools.cycle(longest_first), args.per_device_train_batch_size)
            rows = [dict(dataset[number]) for number in numbers]
            rows[0] = stretched(rows[0], longest_tokens or 0)
            batch = train_dataloader.collate_fn(rows)
            tensors = {name: value.to(args.device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
            # Under accumulation the gradients of one micro-step are there while the next one runs.
            for _number in range(2 if args.gradient_accumulation_steps > 1 else 1):
                model(**tensors).loss.backward()
            model.zero_grad(set_to_none=True)

    return MeetLongestAfterSteps()


def host_budget_callback(budget_bytes: int) -> Any:
    """A Trainer callback that gives the whole process no more memory than that, from the start of training.

    So that a search on a CPU ends before the machine's memory does. Not sooner: libraries that cannot be loaded would
    be failures, not a batch that is too large.
    """
    from transformers import TrainerCallback

    class HostBudget(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            resource.setrlimit(resource.RLIMIT_DATA, (budget_bytes, resource.RLIM_INFINITY))

    return HostBudget()


def stretched(row: dict[str, Any], length_tokens: int) -> dict[str, Any]:
    """A query repeated until it has that many tokens; unchanged if it has them."""
    length = len(row["input_ids"])
    if length >= length_tokens:
        return row
    times = -(-length_tokens // length)
    return {
        name: (list(value) * times)[:length_tokens] if isinstance(value, list) and len(value) == length else value
        for name, value in row.items()
    }
