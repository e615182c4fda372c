"""The paper's bars that a folder has no point for: they are drawn all the same, and ours beside them as missing."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tunescope import paper
from tunescope.config import RANDOM_TOKENS
from tunescope.paper import latency
from tunescope.report.figures.chart import PAPERS, has_papers_size, machine

NOT_MEASURED_YET = "not measured"
_SPARSE_TOP_K = 2  # the paper's, of both models


class Bar(NamedTuple):
    """One bar of the paper that nobody measured. panel: where it stands. row: as a point of it would be, by the columns
    that label() and key_of() read. is_told: another panel shows what the folder has of the model, so that none of
    ours is missing beside it."""

    panel: str
    row: dict[str, Any]
    is_told: bool


def models(names: Iterable[str]) -> list[str]:
    """Those of `names` that the paper has, in their order."""
    known = {row["model"] for row in paper.rows("throughput")}
    return [name for name in dict.fromkeys(names) if name in known]


def own_panel(model: str) -> str:
    """Where a model's bars of the paper stand if no point may stand beside them."""
    return f"{model}, {PAPERS}"


def breakdown_bars(rows: Sequence[Mapping[str, Any]], more_models: Iterable[str] = ()) -> Iterator[Bar]:
    """Bars of Figures 4, 5, 6, 9 and 10 that no row has: beside each machine that measured others of them, else apart.

    rows: points, any status. more_models: of which there may be no row.
    """
    for model in models([*(str(row["model"]) for row in rows), *more_models]):
        every = [
            _row(model, RANDOM_TOKENS, top_k, batch) | {"seq_len_tokens": latency.SEQ_LEN_TOKENS}
            for top_k, batch in latency.points(model)
        ]
        yield from _missing(model, rows, every, ("top_k", "per_device_batch_size", "seq_len_tokens"))


def throughput_bars(rows: Sequence[Mapping[str, Any]], more_models: Iterable[str] = ()) -> Iterator[Bar]:
    """Bars of Figure 8 that no row has, as breakdown_bars()."""
    for model in models([*(str(row["model"]) for row in rows), *more_models]):
        every = [_row(model, *bar) for bar in paper.figure8_order(model)]
        yield from _missing(model, rows, every, ("top_k", "per_device_batch_size", "dataset"))


def _row(model: str, dataset: str, top_k: int, batch_size: int) -> dict[str, Any]:
    return {
        "model": model,
        "dataset": dataset,
        "top_k": top_k,
        "sparsity": "sparse" if top_k == _SPARSE_TOP_K else "dense",
        "per_device_batch_size": batch_size,
        "preset": "full",
        "status": NOT_MEASURED_YET,
    }


def _missing(
    model: str, rows: Sequence[Mapping[str, Any]], every: Sequence[dict[str, Any]], bar: tuple[str, ...]
) -> Iterator[Bar]:
    """Of `every` bar of a model, those whose columns `bar` no row of the paper's size has."""
    of_model = [row for row in rows if row["model"] == model]
    measured: dict[str, set[tuple[Any, ...]]] = {}
    for row in of_model:
        if has_papers_size(row):
            measured.setdefault(machine(row), set()).add(tuple(row[name] for name in bar))
    if not measured:
        yield from (Bar(own_panel(model), each, bool(of_model)) for each in every)
    for panel, found in measured.items():
        yield from (Bar(panel, each, False) for each in every if tuple(each[name] for name in bar) not in found)
