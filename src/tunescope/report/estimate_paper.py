"""The paper's own method in words: a line for each GPU, and what must be known to read it."""

from collections.abc import Sequence

from tunescope.cost.estimate_paper import from_measured, table_iv
from tunescope.cost.paper_model import PaperEstimate
from tunescope.report.text import number


def paper_text(found: Sequence[PaperEstimate]) -> str:
    first = found[0]
    notes = [
        f"By the paper's own method (arXiv 2408.04693, section V): {first.model} {first.sparsity}, {first.dataset}, "
        f"{first.num_queries:,.0f} queries x {first.epochs:g} epochs, batch by Equation 1 at {first.seq_len_tokens} "
        f"tokens ({first.memory_set} constants), queries/s by Equation 2 ({first.throughput_set} constants).",
        "It has no interval, no length in Equation 2, and its own software of 2024; docs/paper_model.md has how far it "
        "is off.",
    ]
    if first.dataset == "math":
        rows = "; ".join(
            f"{row.gpu} at batch {row.batch_size}: {row.by_equation_usd:.2f} where it prints {row.printed_usd:g} "
            f"({row.difference_percent:+.1f} %)"
            for row in table_iv()
        )
        notes.append(
            f"Table IV's own inputs by Equation 2 (USD): {rows}. It was made from measured throughput, not from the "
            "curve: `table paper-model` has it so, to within its rounding. Its inputs are 10 epochs of 15,000 queries, "
            "the size of CS; its text says MATH, which has 13,921. --queries 15000 --epochs 10, and --batch 17 for the "
            "two GPUs of 80 GB, go by that."
        )
    return "\n".join(map(_line, found)) + "\n\n" + "\n".join(notes)


def _line(each: PaperEstimate) -> str:
    where = each.gpu or f"{each.gpu_memory_gb:g} GB"
    parts = [f"{each.batch_size} per batch{_beside(each)}"]
    if each.queries_per_s is not None:
        parts.append(f"{number(each.queries_per_s)} queries/s")
    if each.hours is not None:
        parts.append(f"{number(each.hours)} h")
    if each.cost_usd is not None:
        parts.append(f"{each.cost_usd:,.2f} USD ({each.price_usd_per_hour:g} USD/h; {each.price_source})")
    line = f"{where}: {', '.join([*parts, *each.missing])}"
    measured = from_measured(each)
    if measured is None:
        return line
    cost = "" if measured.cost_usd is None else f", {measured.cost_usd:,.2f} USD"
    return (
        f"{line}\n  by the throughput that the paper measured there, {number(measured.queries_per_s, 4)} queries/s: "
        f"{number(measured.hours)} h{cost}"
    )


def _beside(each: PaperEstimate) -> str:
    """What the paper itself says of the batch, where that is another."""
    ran = each.paper_max_batch_size
    said = []
    if each.batch_size > each.max_batch_size:
        said.append(f"beyond Equation 1, by which {each.max_batch_size} fit")
    if ran not in (None, each.batch_size):
        said.append(f"the paper ran up to {ran}")
    return f" ({'; '.join(said)})" if said else ""
