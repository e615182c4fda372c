"""How long batches become, when each is padded to its longest query and a multiple: exact, from a histogram of lengths.

An epoch is a random permutation of the queries, cut into batches; the last one takes what is left over (drop_last is
off, as in the Trainer). Every batch, the last too, is then a uniformly random set without replacement, and its longest
query follows from order statistics alone: P(all b of N are among the n shortest) = C(n, b) / C(N, b).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tunescope.cost.lengths import Lengths
from tunescope.errors import UserError

PAD_MULTIPLE = 8  # LLaMA-Factory's collator in training (train/sft/workflow.py)
_DRAWS_AT_ONCE = 1024  # keeps a huge batch from needing a huge matrix


@dataclass(frozen=True, eq=False)
class BatchLengths:
    """Distribution of the padded length of a random batch.

    padded_tokens: (K,) int64, ascending. probability: (K,), sums to 1.
    """

    batch_size: int
    padded_tokens: np.ndarray
    probability: np.ndarray

    @property
    def mean_tokens(self) -> float:
        return float(self.padded_tokens @ self.probability)

    @property
    def longest_tokens(self) -> int:
        return int(self.padded_tokens[-1])

    def mean_of(self, value: Callable[[np.ndarray], np.ndarray]) -> float:
        """Expectation of what a padded length entails, as the seconds of a step; value: (K,) -> (K,)."""
        return float(value(self.padded_tokens) @ self.probability)

    def quantile_tokens(self, frac: float) -> int:
        """The smallest padded length that at least this fraction of batches stays within. Raises ValueError."""
        if not 0 <= frac <= 1:
            raise ValueError(f"a quantile of {frac} is not between 0 and 1")
        possible = np.flatnonzero(self.probability)
        # The last sum may round to just under 1.
        place = np.searchsorted(np.cumsum(self.probability[possible])[:-1], frac)
        return int(self.padded_tokens[possible[place]])


@dataclass(frozen=True, eq=False)
class EpochPadding:
    """What one epoch trains on. Expectations are over the shuffle.

    tokens: real ones, the same in every epoch. usual: the batches of the full size, or the only one if that is
    smaller. last: the smaller batch at the end, None where none is left over.
    """

    num_queries: int
    tokens: int
    num_steps: int
    usual: BatchLengths
    last: BatchLengths | None

    @property
    def expected_slots(self) -> float:
        """Token slots of the epoch, padding included."""
        num_usual = self.num_steps - (self.last is not None)
        slots = num_usual * self.usual.batch_size * self.usual.mean_tokens
        return slots + (self.last.batch_size * self.last.mean_tokens if self.last else 0)

    @property
    def expected_slots_per_step(self) -> float:
        return self.expected_slots / self.num_steps

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / self.num_steps

    @property
    def padding_frac(self) -> float:
        """Of all slots, those that hold no token of a query."""
        return 1 - self.tokens / self.expected_slots

    @property
    def largest_step_slots(self) -> int:
        """Slots of the largest batch that a shuffle can make: what memory must hold."""
        return self.usual.batch_size * self.usual.longest_tokens


def pad_epoch(lengths: Lengths, batch_size: int, *, pad_multiple: int = PAD_MULTIPLE) -> EpochPadding:
    """An epoch over all queries of `lengths`, which a cutoff has cut already. Raises UserError for a batch under 1."""
    if batch_size < 1:
        raise UserError(f"a batch of {batch_size} queries trains nothing", cure="use a batch size of 1 or more")
    num_queries = lengths.num_queries
    usual_size = min(batch_size, num_queries)
    num_full, num_left = divmod(num_queries, usual_size)
    return EpochPadding(
        num_queries=num_queries,
        tokens=lengths.total_tokens,
        num_steps=num_full + (num_left > 0),
        usual=batch_lengths(lengths, usual_size, pad_multiple=pad_multiple),
        last=batch_lengths(lengths, num_left, pad_multiple=pad_multiple) if num_left else None,
    )


def batch_lengths(lengths: Lengths, batch_size: int, *, pad_multiple: int = PAD_MULTIPLE) -> BatchLengths:
    """Of a batch drawn without replacement. Raises ValueError unless 1 <= batch_size <= lengths.num_queries."""
    if not 1 <= batch_size <= lengths.num_queries:
        raise ValueError(f"no batch of {batch_size} can be drawn from {lengths.num_queries} queries")
    padded_tokens, first = np.unique(padded(lengths.lengths_tokens, pad_multiple), return_index=True)
    num_within = np.cumsum(np.add.reduceat(lengths.counts, first))
    within_frac = np.ones(len(padded_tokens))
    for start in range(0, batch_size, _DRAWS_AT_ONCE):
        drawn = np.arange(start, min(start + _DRAWS_AT_ONCE, batch_size))[:, np.newaxis]
        # A batch larger than num_within meets the factor 0 on its way, which makes it impossible, exactly.
        within_frac *= np.prod(np.maximum(num_within - drawn, 0) / (lengths.num_queries - drawn), axis=0)
    return BatchLengths(batch_size, padded_tokens, np.diff(within_frac, prepend=0.0))


def padded(lengths_tokens: np.ndarray, pad_multiple: int = PAD_MULTIPLE) -> np.ndarray:
    """Each length rounded up to a multiple. Raises ValueError for a multiple under 1."""
    if pad_multiple < 1:
        raise ValueError(f"lengths cannot be padded to a multiple of {pad_multiple}")
    return -(-lengths_tokens // pad_multiple) * pad_multiple


def simulate_epochs(
    lengths: Lengths,
    batch_size: int,
    num_epochs: int,
    rng: np.random.Generator,
    *,
    pad_multiple: int = PAD_MULTIPLE,
) -> np.ndarray:
    """Padded length of every batch (num_epochs, num_steps) of epochs that are really shuffled: the reference, which
    `pad_epoch` must equal on average. Three digits of a mean take hundreds of epochs."""
    per_query = lengths.per_query()
    starts = np.arange(0, len(per_query), batch_size)
    longest = [np.maximum.reduceat(rng.permutation(per_query), starts) for _ in range(num_epochs)]
    return padded(np.array(longest), pad_multiple)
