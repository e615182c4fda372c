"""What the page has beneath its summary: for each figure the chart, how to read it, and the commands that make it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from tunescope.cost.prices import Price
from tunescope.families import FAMILIES
from tunescope.report.figures import kernels, latency, model, throughput
from tunescope.report.figures.chart import Chart, entry, frame_of
from tunescope.report.figures.experts import figure11
from tunescope.report.figures.papers import models as papers_models
from tunescope.report.page.collect import Collected
from tunescope.report.page.tables import Table, frame_table

_TP = "./mixtral_tp.sh   # or ./mamba_tp.sh\npython3 throughput.py profile_data/mixtral/throughput"
_LT = "./mixtral_lt.sh   # or ./mamba_lt.sh\npython3 mixtral_latency.py profile_data/mixtral/latency"
_SM = "./mixtral_pf.sh   # or ./mamba_pf.sh\npython3 sm_mixtral.py profile_data/mixtral/ncu"
_MEM = "./mixtral_pf.sh   # or ./mamba_pf.sh\npython3 mem_mixtral.py profile_data/mixtral/ncu"
_ROOF = "./mixtral_pf.sh\npython3 -m tunescope table roofline profile_data/mixtral/ncu"
_PAPER_MODEL = "python3 -m tunescope table paper-model"

_THROUGHPUT_COLUMNS = (
    ("model", "model"), ("device", "device"), ("preset", "preset"), ("dataset", "data"), ("sparsity", "sparsity"),
    ("status", "status"), ("moe", "MoE path"), ("per_device_batch_size", "batch"), ("seq_len_tokens", "length"),
    ("queries_per_s", "queries/s"), ("paper_a40_queries_per_s", "A40 paper"), ("ratio_to_paper", "ratio"),
    ("num_timed_steps", "steps"), ("step_s", "s/step"), ("tokens_per_s", "tokens/s"),
    ("padded_tokens_per_s", "padded tok/s"), ("queries_per_train_runtime_s", "q/train s"), ("mfu_pct", "MFU %"),
    ("hfu_pct", "HFU %"), ("peak_allocated_gib", "peak GiB"), ("gpu_energy_j_per_query", "J/query"),
    ("gpu_power_w", "W"), ("sm_clock_mhz", "SM MHz"), ("interval_width_pct", "interval %"), ("cause", "cause"),
)  # fmt: skip
_QUALITY_COLUMNS = (
    ("model", "model"), ("device", "device"), ("preset", "preset"), ("dataset", "data"), ("sparsity", "sparsity"),
    ("status", "status"), ("per_device_batch_size", "batch"), ("step_s", "step s"),
    ("profiled_step_s", "profiled step s"), ("profiled_over_unprofiled", "ratio"), ("busy_s", "busy s"),
    ("idle_frac", "idle (0 to 1)"), ("num_launches", "launches"), ("step_us_per_launch", "us of step a launch"),
    ("attributed_frac", "attributed (0 to 1)"), ("peak_allocated_gib", "peak GiB"), ("cause", "cause"),
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Section:
    """chart: empty where there is nothing to draw, and then `why_not` says so. reading: two sentences. kinds: of the
    points that it is made from; none for what is the paper's or the project's alone."""

    name: str
    heading: str
    chart: Chart
    reading: str
    command: str
    why_not: str
    kinds: tuple[str, ...] = ()
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def lacks_points(self) -> bool:
        """Whether nothing of the folder is in a figure that is made from points."""
        return bool(self.kinds) and self.chart.own().is_empty


def sections(found: Collected, prices: Sequence[Price] = ()) -> list[Section]:
    """In the paper's order, then what the paper has not."""
    return [*_papers_measured(found, models_of(found)), *_papers_model(found), *_beyond(found, prices)]


def models_of(found: Collected) -> list[str]:
    """Whose bars of the paper are drawn, measured or not: the folder's models; all of the paper's if it has none."""
    names = list(dict.fromkeys(map(str, found.points["model"]))) if "model" in found.points else []
    return papers_models(names) if names else papers_models(FAMILIES)


def _papers_measured(found: Collected, models: Sequence[str]) -> list[Section]:
    no_tp = "No throughput point has numbers."
    return [
        Section(
            "figure2", "Figure 2: how long the queries are", model.lengths(),
            "How many queries of each data set have which length, as the paper's histograms have it; synthetic queries "
            "are drawn from them. Long tails make padding, and set the largest batch.",
            "python3 -m tunescope estimate --data cs", "",
        ),
        _of_latency(
            found, "figure4", "Figure 4: phases of a step", latency.figure4(found.latency, models),
            "Segments add up to one unprofiled step; the paper's backward has the recompute in it, ours stands apart. "
            "Compare shares between GPUs, not seconds.",
            [("latency-quality", "How it was measured")],
        ),
        _of_latency(
            found, "figure5", "Figure 5: parts of the decoder layers", latency.figure5(found.latency, models),
            "Busy time of each part over all layers and all passes of one step; without a GPU it is operators' own "
            "time on the CPU. The paper's bars are 10 to 46 % shorter than its own Figure 4.",
        ),
        _of_latency(
            found, "figure6", "Figure 6: operators of the MoE layer", latency.figure6(found.latency, models),
            "The mean duration of one launch of each operator, not its sum: many are launched once an expert. "
            "Operators below 1 % of the layer's time are left out unless the paper has them.",
        ),
        Section(
            "figure8", "Figure 8: throughput", throughput.figure8(found.throughput, models),
            "Queries per second of the timed steps, warm-up left out; whiskers are 95 % intervals over steps. "
            "Hatched boxes are bars that are missing, with the reason.",
            _TP, no_tp, ("throughput",),
            [] if found.throughput is None else [_throughput_table(found.throughput)],
        ),
        _of_kernels(
            "figure9", "Figure 9: SM utilisation", kernels.figure9(found.kernels, models), _SM,
            "Of the busiest unit of the multiprocessors, in % of its peak, weighted by time. A panel's title says "
            "whether Nsight Compute counted it (ncu) or a roofline modelled it.",
        ),
        _of_kernels(
            "figure10", "Figure 10: memory utilisation, and DRAM's own", kernels.figure10(found.kernels, models), _MEM,
            "The paper's quantity is Nsight Compute's Memory [%]: the busiest unit of the memory system, caches "
            "included. DRAM's own utilisation stands beside it.",
        ),
        Section(
            "figure11", "Figure 11: tokens per expert",
            figure11([] if found.latency is None else found.latency.experts, models),
            "Mean over layers of the tokens that a query sends to each expert, before and after training; even bars "
            "mean balanced experts. With random weights nothing follows about routing.",
            _LT, "No breakdown with expert counts was found.", ("latency",),
        ),
    ]  # fmt: skip


def _papers_model(found: Collected) -> list[Section]:
    why = ""
    return [
        Section(
            "figure13", "Figure 13: largest batch by GPU memory", model.figure13(),
            "Lines are Equation 1 without its floor, by the constants that the paper prints and those in its scripts; "
            "marks are the paper's own points. Only the scripts' constants give the projections that it prints.",
            _PAPER_MODEL, why,
        ),
        Section(
            "figure14", "Figure 14: throughput by batch size on the A40", model.figure14(),
            "Marks are what the paper measured, lines its Equation 2 in the form that its figures draw. A line through "
            "the marks is a fit, not a forecast.",
            _PAPER_MODEL, why,
        ),
        Section(
            "figure15", "Figure 15: throughput by batch size on A100 and H100", model.figure15(),
            "As Figure 14, each GPU with constants of its own. The H100's sparse marks jump between batch 9 and 11, "
            "and no curve of this form follows them.",
            _PAPER_MODEL, why,
        ),
        Section(
            "table3", "Table III: largest batches", model.table3(found.throughput),
            "What fitted the A40 by the paper's table and by its own sweep, which differ in three cases, and Equation "
            "1 at the longest query. Panels of your machine are there where a batch was searched for (bs=max).",
            "./mixtral_tp.sh --points cs:sparse:bs=max\n" + _PAPER_MODEL, why,
        ),
        Section(
            "table4", "Table IV: cost of a fine-tuning run", model.table4(),
            "USD of ten epochs over 15,000 queries, which is what the printed numbers need; prices are the paper's, of "
            "2024. Equations 1 and 2 alone are what the paper's model says without a measured throughput.",
            _PAPER_MODEL, why,
        ),
    ]  # fmt: skip


def _beyond(found: Collected, prices: Sequence[Price]) -> list[Section]:
    table = found.throughput
    cost, words = throughput.money(table, prices) if table is not None else (_empty("money"), [])
    path_chart = _or_empty(table, throughput.paths, "paths")
    return [
        _of_latency(
            found, "recompute", "Beyond the paper: recompute's share",
            _or_empty(found.latency, latency.recompute, "recompute"),
            "How the busy time of a step divides into passes; recompute is the forward that gradient checkpointing "
            "repeats. It is what training without checkpointing would save, if memory allowed.",
        ),
        _of_latency(
            found, "busy", "Beyond the paper: busy and idle",
            _or_empty(found.latency, latency.busy, "busy"),
            "The part of a step in which at least one kernel runs, and the part in which the GPU waits for the host. "
            "A step that is mostly idle gains nothing from a faster GPU.",
        ),
        _of_latency(
            found, "memory", "Beyond the paper: memory by phase",
            _or_empty(found.latency, latency.memory, "memory"),
            "The highest allocated memory in each phase; on a GPU absolute. Without a GPU it is the growth since the "
            "step began.",
        ),
        Section(
            "roofline", "Beyond the paper: roofline",
            _or_empty(found.rooflines, kernels.roofline, "roofline"),
            "Each mark is an operator of the MoE layer; the lines are what the GPU's memory and arithmetic allow. Far "
            "below both lines neither limits it: launches do.",
            _ROOF, "No point of the kernel launchers was found.", ("ncu",),
        ),
        Section(
            "energy", "Beyond the paper: energy", _or_empty(table, throughput.energy, "energy"),
            "Energy of the whole GPU for 1,000 queries, by the board's own meter over the timed steps. The host's "
            "energy is not in it.",
            _TP, "No point has energy: it needs a GPU whose driver counts it.", ("throughput",),
        ),
        Section(
            "money", "Beyond the paper: money", cost,
            "An hour's price times the hours that 1,000 queries take at the measured rate, idle time and loading left "
            "out. Prices change: each stands below with its date and source.",
            "python3 -m tunescope estimate --gpu a40 --price a40=0.79",
            "No point ran on a GPU with a price.", ("throughput",), [], words,
        ),
        Section(
            "validation", "Beyond the paper: predicted against measured", _validation(found),
            "Each mark is a point held out of the fit that forecasts it, with its 90 % interval; on the line a "
            "forecast is exact. Marks of Equation 2 are the paper's model refitted on the same points.",
            "python3 -m tunescope table validation", "", (), [],
            [f"None of this folder's own points: {found.why_no_forecasts}"] if found.why_no_forecasts else [],
        ),
        Section(
            "paths", "Beyond the paper: code paths of the experts", path_chart,
            "The same bars on one machine with different code for the experts (stock: one linear an expert; grouped: "
            "one product for all). What differs is speed alone.",
            "./mixtral_tp.sh --moe stock\n./mixtral_tp.sh --moe grouped\n" + _TP.splitlines()[1],
            "No bar was measured with more than one path on one machine.", ("throughput",),
        ),
    ]  # fmt: skip


def _of_latency(
    found: Collected,
    name: str,
    heading: str,
    chart: Chart,
    reading: str,
    extra: Sequence[tuple[str, str]] = (),
) -> Section:
    if found.latency is None:
        return Section(name, heading, chart, reading, _LT, "No breakdown was found.", ("latency",))
    points = found.latency.points
    tables = [frame_table(table, caption, points, _QUALITY_COLUMNS, 6) for table, caption in extra]
    return Section(name, heading, chart, reading, _LT, "No breakdown is whole.", ("latency",), tables)


def _of_kernels(name: str, heading: str, chart: Chart, command: str, reading: str) -> Section:
    return Section(name, heading, chart, reading, command, "No point of the kernel launchers is whole.", ("ncu",))


def _or_empty(tables: Any, make: Callable[[Any], Chart], name: str) -> Chart:
    return _empty(name) if tables is None else make(tables)


def _empty(name: str) -> Chart:
    return Chart(name, name, frame_of([]), "")


def _validation(found: Collected) -> Chart:
    from tunescope.cost.time_packaged import own_points
    from tunescope.cost.validation import LEAVE_GPU, OWN_UNSEEN, held_out

    chart = model.validation(held_out(own_points(), (LEAVE_GPU, OWN_UNSEEN)))
    if not found.forecasts:
        return chart
    entries = [
        entry("this folder's points, from the paper alone", f"{row.point.dataset} batch {row.point.batch_size}, "
              f"{row.point.device.name}", "forecast", row.forecast.median_s, x=row.point.step_s,
              interval=(row.forecast.low_s, row.forecast.high_s), place=number)
        for number, row in enumerate(found.forecasts)
    ]  # fmt: skip
    own = frame_of(entries)
    return Chart(**{**vars(chart), "frame": pd.concat([own, chart.frame], ignore_index=True)})


def _throughput_table(table: pd.DataFrame) -> Table:
    shown = table[~table["is_shallow_end"].eq(True)]
    return frame_table("throughput-table", "Every throughput point", shown, _THROUGHPUT_COLUMNS, 7)
