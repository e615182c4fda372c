"""What a fine-tuning run takes: the answer in a line for each GPU, a table, and then why."""

import csv
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from tunescope import paper
from tunescope.cost.energy import BOUND
from tunescope.cost.estimate_inputs import Run
from tunescope.cost.estimate_memory import gpu_memory_bytes
from tunescope.cost.estimate_runs import Estimate, Hours
from tunescope.cost.estimate_table import METHODS, OURS, Answer, answer, paper_records, paper_rows, rows
from tunescope.cost.paper_model import PaperEstimate
from tunescope.errors import UserError
from tunescope.hardware import GIB
from tunescope.report.text import check_format, number, text_table

# Of more GPUs only the cheapest and the fastest get a line; all are in the table.
_MAX_LINES = 3
_HEADER = (
    "GPU", "batch", "queries/s", "90 % interval", "hours", "90 % interval", "USD", "90 % interval", "USD/h",
    "break-even", "kWh", "GiB of", "GiB", "",
)  # fmt: skip
_EXTRAPOLATED = "extrapolated"
_LOPSIDED_FRAC = 0.05


def print_estimate(
    model: str = "mixtral", data: str = "cs", *, method: str = OURS, format: str = "text", **asked: Any
) -> bool:
    """Prints the estimate to stdout. False if the run fits none of the GPUs, or the paper's method has no answer.

    asked: as estimate_table.answer() takes it; as paper_rows() does with method `paper`. Raises UserError.
    """
    check_format(format)
    if method not in METHODS:
        raise UserError(f"--method {method!r} is unknown", cure=f"use one of {', '.join(METHODS)}")
    if method == OURS:
        found = answer(model, data, **asked)
        _print(rows(found), format, lambda: estimate_text(found))
        return any(each.hours is not None for each in found.estimates)
    ours_only = ("top_k", "recipe", "moe_path", "calibrate", "step_times")
    if refused := [name for name in ours_only if asked.pop(name, None) is not None]:
        names = ", ".join("--" + name.removesuffix("_path").replace("_", "-") for name in refused)
        raise UserError(f"the paper's method knows no {names}", cure="drop it, or use --method ours")
    by_paper = paper_rows(model, data, **asked)
    _print(paper_records(by_paper), format, lambda: paper_text(by_paper))
    return any(each.queries_per_s is not None for each in by_paper)


def _print(records: Sequence[dict[str, Any]], format: str, text: Any) -> None:
    if format == "csv":
        writer = csv.DictWriter(sys.stdout, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    elif format == "json":
        print(json.dumps(records, indent=1, allow_nan=False))
    else:
        print(text())


# --- ours ---


def estimate_text(found: Answer) -> str:
    """The whole text. Of one GPU it says why in full: the cheapest, else the fastest."""
    fitting = [each for each in found.estimates if each.hours is not None]
    too_small = [each for each in found.estimates if each.hours is None]
    lines = [_line(each) for each in _headed(found, fitting)]
    if not fitting:
        lines = [f"{_what(found.run)} fits none of these GPUs."]
    elif len(found.estimates) > 1:
        lines.append(_best(found))
    blocks = ["\n".join(lines)]
    if fitting:
        blocks.append(_table(found, fitting))
    if too_small:
        blocks.append("\n".join(f"Too small: {each.why_not}." for each in too_small))
    if fitting:
        explained = found.cheapest or found.fastest
        assert explained is not None
        blocks += ["\n".join(_why(found, explained, fitting)), _terms(explained)]
    return "\n\n".join(blocks)


def _headed(found: Answer, fitting: Sequence[Estimate]) -> list[Estimate]:
    if len(fitting) <= _MAX_LINES:
        return list(fitting)
    return list(dict.fromkeys(each for each in (found.cheapest, found.fastest) if each is not None))


def _line(each: Estimate) -> str:
    rate, hours, usd = each.queries_per_s, each.hours, each.usd
    assert rate is not None
    assert hours is not None
    parts = [
        f"{each.batch_size} per batch",
        f"{number(rate.median)} queries/s {_spread(rate)}",
        f"{number(hours.median)} h",
    ]
    if usd is not None and each.price is not None:
        price = each.price
        parts.append(f"{_money(usd.median)} USD ({price.usd_per_hour:g} USD/h, {price.provider}, {price.date})")
    mark = f" [{_EXTRAPOLATED}]" if each.step is not None and each.step.is_extrapolated else ""
    return f"{each.device.name}: {', '.join(parts)}{mark}"


def _spread(value: Hours) -> str:
    """`+- 6 %`, on a logarithmic scale; both sides where they differ much."""
    down, up = 1 - value.low / value.median, value.high / value.median - 1
    if up - down > _LOPSIDED_FRAC:
        return f"-{100 * down:.0f}/+{100 * up:.0f} %"
    return f"+- {100 * (math.sqrt(value.high / value.low) - 1):.0f} %"


def _best(found: Answer) -> str:
    best, fast = found.cheapest, found.fastest
    assert fast is not None
    assert fast.hours is not None
    fastest = f"Fastest: {fast.device.name}, {number(fast.hours.median)} h."
    if best is None or best.usd is None:
        return f"{fastest} No GPU of these has a price: give some with --price GPU=USD_PER_HOUR."
    return f"Cheapest: {best.device.name}, {_money(best.usd.median)} USD. {fastest}"


def _table(found: Answer, fitting: Sequence[Estimate]) -> str:
    cells = []
    for each in fitting:
        rate, hours, usd = each.queries_per_s, each.hours, each.usd
        assert rate is not None
        assert hours is not None
        energy_mark = "<" if each.power is not None and each.power.kind == BOUND else ""
        cells.append(
            [
                each.device.name.removeprefix("NVIDIA "),
                str(each.batch_size),
                number(rate.median),
                _interval(rate),
                number(hours.median),
                _interval(hours),
                "-" if usd is None else _money(usd.median),
                "-" if usd is None else f"{_money(usd.low)} to {_money(usd.high)}",
                "-" if each.price is None else f"{each.price.usd_per_hour:g}",
                number(found.break_even_usd_per_hour(each)),
                f"{energy_mark}{number(each.energy_kwh)}",
                number((each.needed_bytes or 0) / GIB),
                number(gpu_memory_bytes(each.device) / GIB),
                _EXTRAPOLATED if each.step is not None and each.step.is_extrapolated else "",
            ]
        )
    kept = [i for i in range(len(_HEADER)) if i in (6, 8) or any(row[i] not in ("-", "") for row in cells)]
    return text_table([_HEADER[i] for i in kept], [[row[i] for i in kept] for row in cells], left_columns=1)


def _interval(value: Hours) -> str:
    return f"{number(value.low)} to {number(value.high)}"


def _money(usd: float) -> str:
    return f"{usd:,.2f}" if usd < 100 else f"{usd:,.0f}"


def _what(run: Run) -> str:
    return f"{run.model.name}, {run.model.sparsity}"


def _why(found: Answer, explained: Estimate, fitting: Sequence[Estimate]) -> list[str]:
    run, padding = found.run, explained.padding
    assert padding is not None
    lengths = run.lengths
    cut = f"{run.num_cut:,} of {run.num_queries_of_data:,} queries are longer and cut" if run.num_cut else "none is cut"
    lines = [
        f"Model: {_what(run)}, MoE path {run.model.moe_path}; {_recipe_text(run.recipe)}."
        if run.model.num_experts
        else f"Model: {_what(run)}; {_recipe_text(run.recipe)}.",
        f"Data: {lengths.source}; {lengths.num_queries:,} queries and {lengths.total_tokens:,} tokens an epoch, times "
        f"{run.epochs:g}; longest {run.longest_tokens} tokens at a cutoff of {run.cutoff_len_tokens}: {cut}.",
        f"Padding: at batch {explained.batch_size} it takes {100 * padding.padding_frac:.0f} % of all slots; "
        f"{number(padding.expected_slots_per_step, 4)} slots a step, and {explained.num_steps:,.0f} steps in all.",
    ]
    lines += [line for each in fitting if (line := _papers_batch(run, each))]
    for each in fitting:
        if each.faster_batch_size is not None:
            lines.append(
                f"{each.device.name}: batch {each.faster_batch_size} would take less time, {number(each.faster_hours)} "
                f"h, for it pads less. It also makes more optimizer steps of an epoch."
            )
    if found.calibration is not None:
        lines.append(f"Time: {found.calibration}.")
    bases = dict.fromkeys(each.step.basis for each in fitting if each.step is not None)
    shown = [basis for basis in bases if basis == (explained.step.basis if explained.step else "")]
    lines.append(f"Time on {explained.device.name} rests on {shown[0]}. An interval is of 90 %, and of the whole run.")
    if any(each.step is not None and each.step.is_extrapolated for each in fitting):
        lines.append(f"{_EXTRAPOLATED}: nothing was ever measured on that GPU, or of this way of training it.")
    lines += _money_and_energy(found, fitting)
    return [*lines, *run.notes]


def _papers_batch(run: Run, each: Estimate) -> str | None:
    """What the paper's A40 held, where it is the same model and data: far less, which would surprise its readers."""
    family, dataset = run.model.family, run.lengths.source.partition(":")[0]
    if family is None or each.device.name != paper.GPU or each.batch_size != each.max_batch_size:
        return None
    if not family.is_papers_model(run.model.config, run.model.config["num_hidden_layers"]):
        return None
    held = [
        f"{row['max_batch_size']} ({row['figure']})"
        for row in paper.rows("max_batch")
        if (row["gpu"], row["model"], row["dataset"]) == ("a40", family.name, dataset)
        and int(row["top_k"]) == run.model.top_k
        and row["figure"] in ("Table III", "Fig. 14")
    ]
    if not held:
        return None
    return (
        f"The paper's A40 held {' and '.join(held)} queries a batch, with its software of 2024 (docs/memory_model.md); "
        "--batch N estimates one of these."
    )


def _money_and_energy(found: Answer, fitting: Sequence[Estimate]) -> list[str]:
    prices = dict.fromkeys(each.price for each in fitting if each.price is not None)
    lines = [f"Price of {price}{'; ' + price.note if price.note else ''}." for price in prices]
    unpriced = [each.device.name for each in fitting if each.price is None]
    if unpriced:
        lines.append(f"No price is known for {', '.join(unpriced)}: give one, as --price a40=0.37.")
    if prices and len(fitting) > 1:
        lines.append("break-even: USD an hour at which a GPU is as dear for this run as the cheapest; above it, stay.")
    if any(each.power is not None and each.power.kind == BOUND for each in fitting):
        lines.append(
            "kWh: < is an upper bound, the board's power for all hours. Points with measured energy replace it."
        )
    for each in fitting:
        if each.power is not None and each.power.kind != BOUND:
            lines.append(
                f"kWh of {each.device.name}: {number(each.power.watts)} W, {each.power.source}; "
                f"{number(each.energy_j_per_query)} J a query."
            )
    return [*lines, "kWh is of the GPU alone, without its machine and cooling."]


def _recipe_text(recipe: dict[str, Any]) -> str:
    method = recipe.get("finetuning_type", "lora")
    if method == "lora":
        base = "NF4 QLoRA" if recipe.get("quantization_bit") else "LoRA"
        how = f"{base} of rank {recipe.get('lora_rank', 8)} on {recipe.get('lora_target', 'all')}"
    else:
        how = "full fine-tuning in " + (
            "pure bf16" if recipe.get("pure_bf16") else "bf16" if recipe.get("bf16") else "fp32"
        )
    checkpointing = "no gradient checkpointing" if recipe.get("disable_gradient_checkpointing") else "checkpointed"
    accumulation = recipe.get("gradient_accumulation_steps") or 1
    return f"{how}, {checkpointing}" + (f", {accumulation} micro-batches a step" if accumulation > 1 else "")


def _terms(each: Estimate) -> str:
    """Where memory and time of one GPU go."""
    assert each.peak is not None
    assert each.step is not None
    terms = sorted(each.peak.terms.items(), key=lambda term: -term[1])
    held = [(name, f"{num_bytes / GIB:.2f}") for name, num_bytes in terms if num_bytes >= GIB / 200]
    held.append(("all of it", f"{each.peak.num_bytes / GIB:.2f}"))
    shown = [(name, f"{seconds:.3f}") for name, seconds in each.step.terms if abs(seconds) >= 0.0005]
    shown.append(("a step", f"{each.step.median_s:.3f}"))
    return (
        f"Memory of {each.device.name} at its peak: {each.peak.moment}, batch {each.batch_size} of the longest queries:"
        f"\n\n{text_table(('term', 'GiB'), held, left_columns=1)}\n\n"
        f"Time of a step there, at the slots of a usual batch:\n\n{text_table(('term', 's'), shown, left_columns=1)}"
    )


# --- the paper's ---


def paper_text(found: Sequence[PaperEstimate]) -> str:
    """The paper's own method: a line for each GPU, and what must be known to read it."""
    lines = []
    for each in found:
        where = each.gpu or f"{each.gpu_memory_gb:g} GB"
        ran = each.paper_max_batch_size
        beside = f" (the paper ran up to {ran})" if ran not in (None, each.batch_size) else ""
        parts = [f"{each.batch_size} per batch{beside}"]
        if each.queries_per_s is not None:
            parts.append(f"{number(each.queries_per_s)} queries/s")
        if each.hours is not None:
            parts.append(f"{number(each.hours)} h")
        if each.cost_usd is not None:
            parts.append(f"{_money(each.cost_usd)} USD ({each.price_usd_per_hour:g} USD/h; {each.price_source})")
        lines.append(f"{where}: {', '.join([*parts, *each.missing])}")
    first = found[0]
    notes = [
        f"By the paper's own method (arXiv 2408.04693, section V): {first.model} {first.sparsity}, {first.dataset}, "
        f"{first.num_queries:,.0f} queries x {first.epochs:g} epochs, batch by Equation 1 at {first.seq_len_tokens} "
        f"tokens ({first.memory_set} constants), queries/s by Equation 2 ({first.throughput_set} constants).",
        "It has no interval, no length in Equation 2, and its own software of 2024; docs/paper_model.md has how far it "
        "is off.",
    ]
    if first.dataset == "math":
        notes.append(
            "Table IV prints 32.7 (A40), 25.4 (A100 80 GB) and 17.9 USD (H100), from throughput measured at batch 4, "
            "17 and 17, for 10 epochs of 15,000 queries. That is the size of CS; its text says MATH, which has 13,921. "
            "--queries 15000 --epochs 10, and --batch 17 for the two GPUs of 80 GB, go by that."
        )
    return "\n".join(lines) + "\n\n" + "\n".join(notes)
