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
from tunescope.cost.estimate_table import METHODS, OURS, Answer, answer, rows
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
_FAR_BEYOND_MEASURED = 3  # in token slots of a micro-batch


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
    ours_only = ("top_k", "recipe", "moe", "graphs", "recompute", "calibrate", "step_times")
    if refused := [name for name in ours_only if asked.pop(name, None) is not None]:
        names = ", ".join("--" + name.replace("_", "-") for name in refused)
        raise UserError(f"the paper's method knows no {names}", cure="drop it, or use --method ours")
    from tunescope.cost.estimate_paper import paper_records, paper_rows
    from tunescope.report.estimate_paper import paper_text

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
        blocks.append("\n".join(_too_small(too_small)))
    if fitting:
        explained = found.cheapest or found.fastest
        assert explained is not None
        blocks += ["\n".join(_why(found, explained, fitting)), _terms(explained)]
    return "\n\n".join(blocks)


def _too_small(estimates: Sequence[Estimate]) -> list[str]:
    """A line for all GPUs that lack the same, each with what it has."""
    groups: dict[str, list[str]] = {}
    for each in estimates:
        needs, _, would_fit = (each.why_not or "").partition("; ")
        of_batch = needs.partition(" and ")[0]
        has = f"{each.device.name} ({gpu_memory_bytes(each.device) / GIB:.1f} GiB)"
        groups.setdefault(f"{of_batch}; {would_fit}", []).append(has)
    return [f"Too small: {', '.join(names)}: {said}." for said, names in groups.items()]


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
        f"{_digits(rate.median)} queries/s {_spread(rate)}",
        f"{_digits(hours.median)} h",
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
    fastest = f"Fastest: {fast.device.name}, {_digits(fast.hours.median)} h."
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
                _digits(rate.median),
                _interval(rate),
                _digits(hours.median),
                _interval(hours),
                "-" if usd is None else _money(usd.median),
                "-" if usd is None else f"{_money(usd.low)} to {_money(usd.high)}",
                "-" if each.price is None else f"{each.price.usd_per_hour:g}",
                number(found.break_even_usd_per_hour(each)),
                "-" if each.energy_kwh is None else f"{energy_mark}{_digits(each.energy_kwh)}",
                number((each.needed_bytes or 0) / GIB),
                number(gpu_memory_bytes(each.device) / GIB),
                _EXTRAPOLATED if each.step is not None and each.step.is_extrapolated else "",
            ]
        )
    kept = [i for i in range(len(_HEADER)) if i in (6, 8) or any(row[i] not in ("-", "") for row in cells)]
    return text_table([_HEADER[i] for i in kept], [[row[i] for i in kept] for row in cells], left_columns=1)


def _interval(value: Hours) -> str:
    return f"{_digits(value.low)} to {_digits(value.high)}"


def _money(usd: float) -> str:
    if 0 < usd < 0.005:
        return "< 0.01"
    return f"{usd:,.2f}" if usd < 100 else f"{usd:,.0f}"


def _digits(value: float) -> str:
    """Three digits, rounded before they are counted (9.999 is 10.0), with separators of thousands."""
    if value < 0.9995:
        return f"{value:.{2 - math.floor(math.log10(value))}f}" if value > 1e-9 else "0"
    rounded = float(f"{value:.3g}") if value < 1000 else value
    return f"{rounded:,.{max(3 - len(str(int(rounded))), 0)}f}"


def _what(run: Run) -> str:
    return f"{run.model.name}, {run.model.sparsity}"


def _why(found: Answer, explained: Estimate, fitting: Sequence[Estimate]) -> list[str]:
    run, padding = found.run, explained.padding
    assert padding is not None
    lengths = run.lengths
    accumulates = int(run.recipe.get("gradient_accumulation_steps", 1)) > 1
    cut = f"{run.num_cut:,} of {run.num_queries_of_data:,} queries are longer and cut" if run.num_cut else "none is cut"
    lines = [
        f"Model: {_what(run)}, MoE path {run.model.moe_path}{', replayed as CUDA graphs' if explained.graphs else ''}; "
        f"{_recipe_text(run.recipe)}."
        if run.model.num_experts
        else f"Model: {_what(run)}; {_recipe_text(run.recipe)}.",
        f"Data: {lengths.source}; {lengths.num_queries:,} queries and {lengths.total_tokens:,} tokens an epoch, times "
        f"{run.epochs:g}; longest {run.longest_tokens} tokens at a cutoff of {run.cutoff_len_tokens}: {cut}.",
        f"Padding: at batch {explained.batch_size} it takes {100 * padding.padding_frac:.0f} % of all slots; "
        f"{padding.expected_slots_per_step:,.0f} slots a {'micro-batch' if accumulates else 'step'}, and "
        f"{explained.num_steps:,.0f} {'optimizer ' if accumulates else ''}steps in all.",
    ]
    lines += [line for each in fitting if (line := _papers_batch(run, each))]
    lines += [line for each in fitting if (line := _other_batch(each))]
    lines += [line for each in fitting if (line := _recomputed(each))]
    if eager := [each.device.name for each in fitting if run.graphs and not each.graphs]:
        lines.append(
            f"{', '.join(eager)}: steps cannot be replayed as CUDA graphs there, for torch's grouped matmul goes "
            "expert by expert and waits for the host. That waiting is not counted."
        )
    lines += _calibration(found, fitting)
    bases = dict.fromkeys(each.step.basis for each in fitting if each.step is not None)
    shown = [basis for basis in bases if basis == (explained.step.basis if explained.step else "")]
    lines.append(f"Time on {explained.device.name} rests on {shown[0]}. An interval is of 90 %, and of the whole run.")
    if any(each.step is not None and each.step.is_extrapolated for each in fitting):
        lines.append(
            f"{_EXTRAPOLATED}: nothing was ever measured on that GPU, or too little of this way of training it."
        )
    for each in fitting:
        beyond = each.step.slots_over_measured if each.step else None
        if beyond is not None and beyond > _FAR_BEYOND_MEASURED:
            lines.append(
                f"{each.device.name}: its batches have {number(beyond, 2)} times the slots of the largest measured "
                "there; beyond that time goes by counts of work alone."
            )
    lines += _money_and_energy(found, fitting)
    return [*lines, *run.notes]


def _other_batch(each: Estimate) -> str | None:
    """How the batch stands to the largest that fits."""
    name = each.device.name
    if each.max_batch_hours is not None:
        return (
            f"{name}: batch {each.batch_size} takes least time; {each.max_batch_size} fit, which would take "
            f"{_digits(each.max_batch_hours)} h, for they pad more (--batch max). It also makes more optimizer steps "
            "of an epoch."
        )
    if each.faster_batch_size is not None and each.faster_hours is not None:
        return (
            f"{name}: batch {each.faster_batch_size} would take less time, {_digits(each.faster_hours)} h, for it pads "
            "less. It also makes more optimizer steps of an epoch."
        )
    return None


def _recomputed(each: Estimate) -> str | None:
    if each.num_recomputed is None:
        return None
    num_layers = each.run.model.config["num_hidden_layers"]
    return (
        f"{each.device.name}: {each.num_recomputed} of {num_layers} layers must be recomputed in backward so that "
        f"batch {each.batch_size} of the longest queries fits; the others keep their activations."
    )


def _calibration(found: Answer, fitting: Sequence[Estimate]) -> list[str]:
    """What the user's points are, and what they changed about the step that each answer is of."""
    made = found.calibration
    if made is None:
        return []
    lines = [f"Time: {made}."]
    for each in fitting:
        name, before, after = each.device.name, each.step_before, each.step
        if before is None or after is None:
            continue
        hosts = made.hosts(name)
        whose = "" if hosts else f" (no point is of it: the points are of {', '.join(made.devices)})"
        widths = [100 * (math.sqrt(step.high_s / step.low_s) - 1) for step in (before, after)]
        lines.append(
            f"Calibration changed the step on {name}{whose}: its 90 % interval from +-{widths[0]:.0f} % to "
            f"+-{widths[1]:.0f} %, its median by {100 * (after.median_s / before.median_s - 1):+.0f} %."
        )
        if len(hosts) > 1:
            lines.append(f"The points of {name} are of {len(hosts)} hosts; the answer is for {hosts[0]}.")
    return lines


def _papers_batch(run: Run, each: Estimate) -> str | None:
    """What the paper's A40 held, where it is the same model and data: far less, which would surprise its readers."""
    family, dataset = run.model.family, run.lengths.source.partition(":")[0]
    if family is None or each.device.name != paper.GPU or each.batch_size is None:
        return None
    if each.batch_size != each.max_batch_size and each.max_batch_hours is None:  # a batch of the user's own
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
        lines.append(
            "break-even: USD an hour at which a GPU is as dear for this run as the cheapest; above it, "
            "the cheapest stays cheaper."
        )
    if any(each.power is not None and each.power.kind == BOUND for each in fitting):
        lines.append(
            "kWh: < is an upper bound, the board's power for the upper end of the hours. Points with measured energy "
            "replace it."
        )
    if found.calibration is not None:
        lines += [
            f"kWh of {each.device.name} stays a bound: {each.power.why_bound}."
            for each in fitting
            if each.power is not None and each.power.kind == BOUND
        ]
    for each in fitting:
        if each.power is not None and each.power.kind != BOUND and each.energy_kwh_interval is not None:
            lines.append(
                f"kWh of {each.device.name}: {number(each.power.watts)} W, {each.power.source}; "
                f"{number(each.energy_j_per_query)} J a query, {_digits(each.energy_kwh_interval.low or 0)} to "
                f"{_digits(each.energy_kwh_interval.high)} kWh."
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
