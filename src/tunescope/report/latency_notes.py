"""What a reader of the latency tables must know to believe them, and what the paper concluded from its own."""

import textwrap
from typing import Any

import pandas as pd

from tunescope import paper
from tunescope.analyze.latency_tables import LatencyTables
from tunescope.analyze.points import ATTACHED, UNREADABLE
from tunescope.families import FAMILIES
from tunescope.paper import latency as papers
from tunescope.report.text import number

_WIDTH = 120
# The paper's conclusion from Figure 5: the MoE layer's part of what it shows, on average over both of its models.
PAPERS_MOE_PCT = 85
# And from Figure 4: up to 53 % of a step of BlackMamba at batch 1.
PAPERS_LARGE_OPTIMIZER_PCT = 25


def phases(group: pd.DataFrame) -> str:
    on_gpu = (group["clock"] == "cuda_event").any()
    clock = "CUDA events at module and callback boundaries" if on_gpu else "the host's clock at the same boundaries"
    lines = [
        f"Unprofiled steps, by {clock}; mean ± half of the 95 % bootstrap interval. forward, backward, clip, "
        "optimizer and rest add up to the step. Recompute is part of backward: the layers' forward run again there "
        "by gradient checkpointing. clip has the Trainer's NaN check in it; rest is data, logging and zero_grad.",
        f"A40 paper: Figure 4, on an {paper.GPU} with pretrained weights; its backward has the recompute in it, too.",
    ]
    rows = group.to_dict("records")
    shown = [row for row in rows if pd.notna(row.get("paper_a40_ablation_s"))]
    if shown:
        lines.append(
            "The paper's length ablation has forward + backward at this length and batch: "
            + "; ".join(f"{_bar(row)} {number(row['paper_a40_ablation_s'])} s" for row in shown) + "."
        )  # fmt: skip
    return _wrapped(_with_paper(lines, group))


def layers(tables: LatencyTables, group: pd.DataFrame) -> str:
    on_gpu = group["source"].eq("kernels").all()
    busy = "GPU time of the kernels, copies and memsets that the part launched"
    if not on_gpu:
        busy = "For lack of a GPU, self time of the part's CPU operators, without the Python between them"
    lines = [
        f"{busy}; per step, from profiled steps. span: from the part's first to its last moment by events in "
        "unprofiled steps, idle time included; a layer's backward span is from the end of its recompute to the "
        "begin of the next one's. 'layer itself': residual additions, and as span the whole layer. Names in "
        "parentheses are work outside of modules. other: clip, optimizer and rest.",
    ]
    if fractions := papers.layers_of_step_frac(str(group["model"].iloc[0])):
        lines.append(
            "A40 paper: Figure 5, forward and backward together, so compare it with total. Its sums are "
            f"{min(fractions):.2f} to {max(fractions):.2f} of Figure 4's forward + backward (embedding, head and loss "
            "are not in it, which explains little of that), and its artifact scales forward times by the number of "
            "layers but not backward ones: compare its shares, not its milliseconds."
        )
    return _wrapped(_with_paper(lines, group) + _takeaways(tables, group))


def _takeaways(tables: LatencyTables, group: pd.DataFrame) -> list[str]:
    rows = group[group["is_papers_model"].eq(True) & group["preset"].eq("full")].to_dict("records")
    if not rows:
        return []
    moe_pct = [100 * row["op_part_of_layers_frac"] for row in rows]
    mean_pct = sum(moe_pct) / len(moe_pct)
    theirs_pct = papers.moe_pct(str(rows[0]["model"]))
    verdict = "holds" if mean_pct > 50 else "does not hold"
    lines = [
        f"Paper's takeaway, the MoE layer takes most of the layers' time ({PAPERS_MOE_PCT} % on average over both its "
        f"models, {number(theirs_pct)} % over this one's bars): {verdict} here by busy time, {number(mean_pct)} % ("
        + ", ".join(f"{_bar(row)} {number(pct)}" for row, pct in zip(rows, moe_pct, strict=True)) + ")."
    ]  # fmt: skip
    shares = []
    for row in rows:
        of_point = tables.phases[tables.phases["folder"] == row["folder"]].set_index("phase")
        theirs = papers.phase_s(row["model"], row["top_k"], row["per_device_batch_size"], row["seq_len_tokens"])
        ours_pct = 100 * of_point["share_frac"]["optimizer"]
        theirs_pct = 100 * theirs["optimizer"] / sum(theirs.values()) if theirs else float("nan")
        shares.append((row, ours_pct, theirs_pct))
    if rows[0]["model"] == "blackmamba":
        claim = "with all parameters trained the optimizer takes a large part at small batches"
        holds = max(ours for _, ours, _ in shares) >= PAPERS_LARGE_OPTIMIZER_PCT
    else:
        claim = "with QLoRA the optimizer is next to nothing"
        holds = all(ours <= 5 for _, ours, _ in shares)
    lines.append(
        f"Paper's takeaway, {claim}: {'holds' if holds else 'fails'} here ("
        + ", ".join(f"{_bar(row)} {number(ours)} %, paper {number(theirs)} %" for row, ours, theirs in shares) + ")."
    )  # fmt: skip
    return lines


def operators(group: pd.DataFrame) -> str:
    lines = [
        "us each: mean of one launch. gather/scatter/index: all that sends tokens to experts and adds their outputs "
        f"up, copies to the host included. {_op_note(group)}",
        "A40 paper: Figure 6, the mean of one launch of the forward kernel for one expert (for Mixtral taken where "
        "backward recomputes it), so compare it with forward or recompute 'us each'.",
    ]
    if not group["source"].eq("kernels").all():
        lines.append("Without a GPU a launch is an operator, the ones that only make views included.")
    return _wrapped(_with_paper(lines, group))


def _op_note(group: pd.DataFrame) -> str:
    family = FAMILIES.get(str(group["model"].iloc[0]))
    return family.layout.op_note if family is not None else ""


def memory(group: pd.DataFrame) -> str:
    if group["source"].eq("kernels").all():
        text = (
            "Allocated by torch's allocator, followed through one more step with the profiler's memory events and "
            "anchored at the allocator's own count before the optimizer. activations: the highest of forward, "
            "recompute and backward less weights, buffers and optimizer state; what gradients there are by then is "
            "in it."
        )
    else:
        text = (
            "Without a GPU: growth since the step began, so weights are not in the peak. Memory that was there "
            "before and is freed within the step is not seen."
        )
    return _wrapped([text])


def quality(group: pd.DataFrame) -> str:
    lines = [
        "profiled step: the profiler is on, with a range for every module; ratio: what it costs. busy: union of all "
        "work; cells' sum: the same work added up, larger only where work overlaps. idle: the part of an unprofiled "
        "step in which the GPU does nothing. attributed: work whose launch was found in the recording; what is "
        "outside of modules has its own cells. layer spans: decoder layers' forward and recompute, by events around "
        "them in unprofiled steps, and from their first to their last work in profiled ones.",
    ]
    if not group["source"].eq("kernels").all():
        lines.append(
            "Without a GPU busy is operators' self time, and idle is the rest of a profiled step: Python, mostly."
        )
    return _wrapped(lines)


def failures(others: pd.DataFrame) -> str:
    lines = []
    for row in others.to_dict("records"):
        peak_gib = row["peak_allocated_gib"]
        peak = "" if pd.isna(peak_gib) else f" (peak {number(peak_gib)} GiB allocated)"
        lines.append(f"{row['point_id']}: {row['status']}{peak}: {row['cause']}")
        if isinstance(row.get("oom_snapshot"), str):
            lines.append(
                f"{row['point_id']}: what held memory is in {row['folder']}/{row['oom_snapshot']}; "
                "https://pytorch.org/memory_viz draws it."
            )
    return _wrapped(lines)


def provenance(points: pd.DataFrame) -> str:
    known = points[points["status"] != UNREADABLE]
    if known.empty:
        return ""

    def names(column: str) -> str:
        return ", ".join(sorted({str(value) for value in known[column].dropna()})) or "-"

    lines = [
        f"weights: {names('weights')}; data: {names('data')}; tokenizer: {names('tokenizer')}; MoE path: "
        f"{names('moe')}; attention: {names('attention')}; scan: {names('scan')}; compute: "
        f"{names('compute_dtype')}; torch: {names('torch')}."
    ]
    if "tiny" in set(known["preset"]):
        lines.append(
            "Preset tiny is a small model of the same architecture on whatever runs it: its rows show that "
            "everything works, and say nothing of the paper's model."
        )
    if "slice" in set(known["preset"]):
        lines.append(
            "Preset slice runs some of the layers at full width; sums are over those, nothing is extrapolated."
        )
    lines += _machine(known[known["status"] == "ok"])
    return _wrapped(lines)


def _machine(ok: pd.DataFrame) -> list[str]:
    lines = []
    for row in ok.to_dict("records"):
        if isinstance(row["expert_probe_why_not"], str):
            lines.append(f"{row['point_id']}: tokens per expert were not counted, {row['expert_probe_why_not']}.")
        if pd.notna(row.get("profiled_over_unprofiled")) and not 0.8 < row["profiled_over_unprofiled"] < 2:
            lines.append(
                f"{row['point_id']}: a profiled step took {number(row['profiled_over_unprofiled'])} times an "
                "unprofiled one; trust busy times, not spans, of the profiled steps."
            )
    return lines


def _bar(row: dict[Any, Any]) -> str:
    return f"{row['sparsity']} {row['per_device_batch_size']:g}"


def _with_paper(lines: list[str], group: pd.DataFrame) -> list[str]:
    """Without what is said of the paper, where everything is of somebody's own Trainer."""
    is_own = group["preset"].eq(ATTACHED).all()
    return [line for line in lines if not (is_own and line.startswith("A40 paper:"))]


def _wrapped(lines: list[str]) -> str:
    return "\n".join(part for line in lines for part in textwrap.wrap(line, _WIDTH))
