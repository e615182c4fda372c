"""Synthetic queries whose token lengths follow the paper's histograms (Figure 2). No torch.

What is in a query does not change what a step costs; how long it is does.
"""

from collections.abc import Sequence

import numpy as np

from tunescope import paper

SEED = 42
# How a query divides into prompt and answer is not in the paper, and no measured time depends on it (the loss runs
# over all positions); only `loss tokens` would.
ANSWER_FRAC = 0.25
MIN_WORDS = 2  # one of prompt, one of answer


def sample_lengths(dataset: str, num_queries: int, seed: int = SEED) -> np.ndarray:
    """Token lengths (num_queries,) int64, template included, in random order.

    Stratified: quantiles (i + 1/2) / num_queries of the histogram, so that even a few hundred queries have its
    shape, and the run-to-run scatter of throughput is the machine's and not the sample's. Raises KeyError for a
    data set without a histogram.
    """
    lengths_tokens, counts = (np.asarray(column) for column in paper.length_histogram(dataset))
    cumulative_frac = np.cumsum(counts) / counts.sum()
    quantiles = (np.arange(num_queries) + 0.5) / num_queries
    lengths = lengths_tokens[np.searchsorted(cumulative_frac, quantiles)]
    return np.random.default_rng(seed).permutation(lengths)


def queries(
    lengths_tokens: Sequence[int] | np.ndarray,
    num_template_tokens: int,
    words: Sequence[str],
    seed: int = SEED,
) -> list[dict[str, str]]:
    """Alpaca-format queries, each exactly as many tokens as asked once the template has added its own.

    words: strings that are one token each. Lengths under num_template_tokens + 2 are raised to that.
    """
    rng = np.random.default_rng(seed)
    made = []
    for length in lengths_tokens:
        num_words = max(int(length) - num_template_tokens, MIN_WORDS)
        chosen = [words[i] for i in rng.integers(0, len(words), num_words)]
        num_answer = min(max(round(num_words * ANSWER_FRAC), 1), num_words - 1)
        made.append(
            {
                "instruction": " ".join(chosen[num_answer:]),
                "input": "",
                "output": " ".join(chosen[:num_answer]),
            }
        )
    return made
