"""How many tokens each query of a training set has: from the paper, from a histogram, or from the data file itself.

Without a tokenizer a file's tokens are estimated from its words, and `Lengths.bounds` says how far that may be off.
"""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tunescope import paper
from tunescope.cost.queries import TEMPLATES, read_queries, refuse_other_scripts, tokens_by_tokenizer, words_of
from tunescope.dataset_files import FORMATS_CURE
from tunescope.errors import UserError

HISTOGRAM_COLUMNS = ("length_tokens", "count")
_HISTOGRAM_CURE = f"write a CSV with the header {','.join(HISTOGRAM_COLUMNS)} and one line for each length"


class Assumed(NamedTuple):
    """A number that was not measured here: what is taken, and the range that it is thought to lie in."""

    value: float
    low: float
    high: float


# Counted with the tokenizers of Mixtral-8x7B and GPT-NeoX-20B (BlackMamba's) on 16 public data sets of questions,
# arithmetic, instructions, tool calls and Chinese, and on Python and Markdown: 0.90 to 1.35 over all of a data set,
# mean 1.09. Words divided at spaces scatter far more, 1.09 to 1.77 in English alone.
TOKENS_PER_WORD = Assumed(1.1, 0.9, 1.35)


@dataclass(frozen=True, eq=False)
class Lengths:
    """Token lengths of a training set's queries, template included, as a histogram.

    lengths_tokens: int64, ascending, each once, from 1. counts: int64, how many queries have each, from 1.
    source: where they come from, for the reader. bounds: where they are estimated, all of them at the low and at the
    high end of what was assumed.
    Raises ValueError for arrays that are no histogram.
    """

    lengths_tokens: np.ndarray
    counts: np.ndarray
    source: str
    bounds: "tuple[Lengths, Lengths] | None" = None

    def __post_init__(self) -> None:
        for name in ("lengths_tokens", "counts"):
            array = np.array(getattr(self, name))
            if array.dtype.kind not in "iu":
                raise ValueError(f"{name} must be whole numbers, not {array.dtype}")
            array = array.astype(np.int64)
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        lengths_tokens, counts = self.lengths_tokens, self.counts
        if lengths_tokens.ndim != 1 or lengths_tokens.shape != counts.shape or not lengths_tokens.size:
            raise ValueError(f"{lengths_tokens.shape} lengths and {counts.shape} counts are no histogram")
        if lengths_tokens[0] < 1 or counts.min() < 1 or (np.diff(lengths_tokens) < 1).any():
            raise ValueError("lengths must ascend from 1, and every count must be at least 1")

    @classmethod
    def of_queries(cls, tokens_per_query: Sequence[int] | np.ndarray, source: str) -> "Lengths":
        """From the length of every single query."""
        lengths_tokens, counts = np.unique(np.asarray(tokens_per_query), return_counts=True)
        return cls(lengths_tokens, counts, source)

    @property
    def num_queries(self) -> int:
        return sum(self.counts.tolist())  # in whole numbers of any size, as below

    @property
    def total_tokens(self) -> int:
        return sum(
            length * count for length, count in zip(self.lengths_tokens.tolist(), self.counts.tolist(), strict=True)
        )

    @property
    def mean_tokens(self) -> float:
        return self.total_tokens / self.num_queries

    @property
    def longest_tokens(self) -> int:
        return int(self.lengths_tokens[-1])

    def per_query(self) -> np.ndarray:
        """The length of every query (num_queries,) int64, ascending."""
        return np.repeat(self.lengths_tokens, self.counts)

    def cut(self, cutoff_len_tokens: int) -> "Lengths":
        """As LLaMA-Factory truncates to `cutoff_len`: a query keeps min(length, cutoff) tokens.

        How a cut falls on prompt and answer (supervised.py, infer_seqlen) depends on their sizes: an answer under half
        the room stays whole, else a prompt under half of it does, else both shrink in proportion; later turns get
        what room is left. What stays always fills the room, so the sum does not depend on it. No query is dropped.
        Raises UserError for a cutoff under 1.
        """
        if cutoff_len_tokens < 1:
            raise UserError(f"a cutoff of {cutoff_len_tokens} tokens leaves nothing", cure="use 1 or more; usual: 1024")
        lengths_tokens, place = np.unique(np.minimum(self.lengths_tokens, cutoff_len_tokens), return_inverse=True)
        counts = np.zeros_like(lengths_tokens)
        np.add.at(counts, place, self.counts)
        bounds = self.bounds and (self.bounds[0].cut(cutoff_len_tokens), self.bounds[1].cut(cutoff_len_tokens))
        return Lengths(lengths_tokens, counts, self.source, bounds)

    def num_longer_than(self, cutoff_len_tokens: int) -> int:
        """How many queries a cutoff shortens."""
        return int(self.counts[self.lengths_tokens > cutoff_len_tokens].sum())


def read_lengths(
    data: str,
    *,
    template: str = "mistral",
    tokens_per_word: Assumed | None = None,
    tokenizer_json: Path | None = None,
) -> Lengths:
    """What `--data` stands for: `cs` or `math` (the paper's), a histogram (.csv), or a data file (.json, .jsonl).

    template, tokens_per_word, tokenizer_json: of a data file, see `lengths_of_file`. Raises UserError.
    """
    if data in ("cs", "math"):
        return paper_lengths(data)
    path = Path(data).expanduser()
    if path.suffix.lower() == ".csv":
        return read_histogram(path)
    if path.suffix in (".json", ".jsonl"):  # in lower case, as the engine has it
        return lengths_of_file(path, template=template, tokens_per_word=tokens_per_word, tokenizer_json=tokenizer_json)
    raise UserError(
        f"{data} is no data: neither cs nor math, nor a .csv, .json or .jsonl file",
        cure=f"use cs or math; {_HISTOGRAM_CURE}; or {FORMATS_CURE}",
    )


def paper_lengths(dataset: str) -> Lengths:
    """The paper's histogram of `cs` or `math` (Figure 2). Its tokenizer and template are not recorded.

    Raises UserError for another data set.
    """
    try:
        lengths_tokens, counts = paper.length_histogram(dataset)
    except KeyError:
        raise UserError(f"the paper has no lengths of data set {dataset!r}", cure="use cs or math") from None
    return Lengths(np.array(lengths_tokens), np.array(counts), f"{dataset}: the paper's Figure 2")


def read_histogram(path: Path) -> Lengths:
    """From a CSV with the columns length_tokens and count; others are ignored, counts of 0 allowed.

    Raises UserError with the line of the first fault.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"there is no histogram {path}", cure="check the path given with --data") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}", cure=_HISTOGRAM_CURE) from None
    reader = csv.DictReader(text.splitlines())
    if missing := [column for column in HISTOGRAM_COLUMNS if column not in (reader.fieldnames or ())]:
        raise UserError(f"{path}, line 1: no column {' and no column '.join(missing)}", cure=_HISTOGRAM_CURE)
    line_of: dict[int, int] = {}
    count_of: dict[int, int] = {}
    try:
        for row in reader:
            if None in row:
                raise UserError(
                    f"{path}, line {reader.line_num}: more cells than the header has columns",
                    cause="a comma within a number, perhaps",
                    cure=_HISTOGRAM_CURE,
                )
            length, count = (_whole(path, reader.line_num, name, row[name]) for name in HISTOGRAM_COLUMNS)
            if length < 1:
                raise UserError(
                    f"{path}, line {reader.line_num}: a query of {length} tokens", cure="lengths start at 1"
                )
            if length in line_of:
                raise UserError(
                    f"{path}: length {length} stands on lines {line_of[length]} and {reader.line_num}",
                    cause="the file holds several data sets, or several parts of one",
                    cure="keep one data set in it, and add up the counts of a length",
                )
            line_of[length], count_of[length] = reader.line_num, count
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}", cure=_HISTOGRAM_CURE) from None
    lengths = sorted(length for length, count in count_of.items() if count)
    if not lengths:
        raise UserError(f"{path} counts no query", cause="it has only its header, or zeros", cure=_HISTOGRAM_CURE)
    return Lengths(np.array(lengths), np.array([count_of[length] for length in lengths]), f"{path.name}: histogram")


def _whole(path: Path, line: int, column: str, text: str | None) -> int:
    if re.fullmatch(r"\s*\d{1,15}\s*", text or "", re.ASCII):
        return int(text or "")
    raise UserError(
        f"{path}, line {line}: {column} is {text!r}", cure="write a whole number from 0, without unit or separators"
    )


def lengths_of_file(
    path: Path,
    *,
    template: str = "mistral",
    tokens_per_word: Assumed | None = None,
    tokenizer_json: Path | None = None,
) -> Lengths:
    """Lengths of the queries of a data file in LLaMA-Factory's formats, before any cutoff.

    template: the recipe's, one of TEMPLATES. tokenizer_json: a Hugging Face tokenizer.json, by which tokens
    are counted exactly (turns of tools as plain ones); needs the package tokenizers. Without one a query has
    tokens_per_word tokens a word, TOKENS_PER_WORD if not given, and the template's own. Raises UserError.
    """
    if template not in TEMPLATES:
        raise UserError(
            f"template {template!r} is not known here", cure=f"use the nearest of {', '.join(sorted(TEMPLATES))}"
        )
    queries = read_queries(path)
    wrapping = TEMPLATES[template]
    if tokenizer_json is not None:
        counted = tokens_by_tokenizer(queries, wrapping, tokenizer_json)
        return Lengths.of_queries(counted, f"{path.name}: counted with {tokenizer_json}, template {template}")
    if tokens_per_word is None:
        refuse_other_scripts(path, queries)
        tokens_per_word = TOKENS_PER_WORD
    low, value, high = tokens_per_word.low, tokens_per_word.value, tokens_per_word.high
    if not 0 < low <= value <= high < float("inf"):
        raise UserError(
            f"{value:g} tokens a word, from {low:g} to {high:g}", cure="give positive numbers, low <= value <= high"
        )
    words = np.array([words_of(query) for query in queries])
    added = np.array([wrapping.added_tokens(query) for query in queries])

    at_low, at_value, at_high = (
        Lengths.of_queries(np.rint(words * ratio).astype(np.int64) + added, f"{path.name}: {ratio:g} tokens a word")
        for ratio in (low, value, high)
    )
    return replace(at_value, bounds=(at_low, at_high))
