"""Experiments as data: a Point is one measured run, a grid is a figure's list of them. No torch here."""

import math
import re
from dataclasses import asdict, dataclass, replace
from typing import Any

from tunescope import paper
from tunescope.errors import UserError
from tunescope.families import find_family
from tunescope.paper import latency

PRESETS = ("full", "slice", "tiny")
# What a launcher measures: queries/s of Figure 8; where a step's time goes, Figures 4, 5 and 11; or what the kernels of
# the MoE layer make of the GPU, Figures 6, 9 and 10.
THROUGHPUT, LATENCY, NCU = "throughput", "latency", "ncu"
MAX = "max"  # as a batch size: the largest that trains
MAX_BATCH = 65_536
MAX_SEQ_LEN_TOKENS = 32_768
PAPER_DATASETS = ("cs", "math")
# The name of queries of random tokens and one fixed length, as the paper's breakdowns ran them.
RANDOM_TOKENS = "random"

POINTS_HELP = (
    "DATASET:SPARSITY:bs=N[,N...][:seq=N], with SPARSITY sparse, dense or k=N; several separated by spaces "
    "or ';'; bs=max finds the largest batch that trains; 'paper' stands for the figure's own points. "
    "Example: 'cs:sparse:bs=1,2,4,8,16 math:dense:bs=1'"
)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One bar of one figure, at one size of the model.

    per_device_batch_size: queries per micro-step on one GPU.
    seq_len_tokens: every query padded or cut to exactly this length; None: each its own length.
    num_layers: decoder layers actually run; fewer than `total_layers` only in preset slice.
    find_max: the batch size is the largest that trains, to be found; until it is, per_device_batch_size is 1.
    """

    model: str
    dataset: str
    top_k: int
    per_device_batch_size: int
    seq_len_tokens: int | None = None
    preset: str = "full"
    num_layers: int = 32
    total_layers: int = 32
    find_max: bool = False

    def __post_init__(self) -> None:
        check_point(self)

    @property
    def sparsity(self) -> str:
        """The paper's label: `sparse` (top-2; for a model of our own its top_k), `dense` (all experts), or `top-k`."""
        family = find_family(self.model)
        if self.top_k == family.num_experts:
            return "dense"
        return "sparse" if self.top_k == family.sparse_top_k else f"top-{self.top_k}"

    @property
    def label(self) -> str:
        """Short name for people: `cs sparse batch 8`, with the length where it is fixed."""
        length = f" length {self.seq_len_tokens}" if self.seq_len_tokens else ""
        depth = f" {self.num_layers}/{self.total_layers} layers" if self.preset == "slice" else ""
        batch = "max" if self.find_max else self.per_device_batch_size
        return f"{self.dataset} {self.sparsity} batch {batch}{length}{depth}"

    def point_id(self, device_slug: str) -> str:
        """Folder name. Holds the preset and the device, so that no machine overwrites another's result."""
        parts = [self.dataset, f"k{self.top_k}", "bmax" if self.find_max else f"b{self.per_device_batch_size}"]
        if self.seq_len_tokens:
            parts.append(f"s{self.seq_len_tokens}")
        parts.append(self.preset + (str(self.num_layers) if self.preset == "slice" else ""))
        return "-".join([*parts, device_slug])

    def to_json(self) -> dict[str, Any]:
        """Without what means nothing for a given batch size, so that points measured before it existed keep their
        identity."""
        content = asdict(self)
        if not self.find_max:
            del content["find_max"]
        return content


def check_point(point: Point) -> None:
    """Raises UserError naming the field, its value and the range allowed."""
    family = find_family(point.model)
    if not re.fullmatch(r"[a-z0-9][a-z0-9_.]*", point.dataset):
        raise UserError(
            f"data set name {point.dataset!r} cannot be a folder name",
            cure="use small letters, digits, '_' and '.', starting with a letter or digit",
        )
    limits = {
        "top_k": family.num_experts,
        "per_device_batch_size": MAX_BATCH,
        "seq_len_tokens": MAX_SEQ_LEN_TOKENS,
        "num_layers": point.total_layers,
    }
    for field, largest in limits.items():
        value = getattr(point, field)
        if value is None and field == "seq_len_tokens":
            continue
        if type(value) is not int or not 1 <= value <= largest:
            raise UserError(f"{field} is {value}; it must be from 1 to {largest}")
    if point.preset not in PRESETS:
        raise unknown_preset(point.preset)
    if point.find_max and point.preset == "slice":
        raise UserError(
            "bs=max finds nothing of the whole model in preset slice",
            cause="slice runs only as many layers as fit the GPU, and more queries fit beside fewer layers",
            cure="name batch sizes, as bs=1,2,4; or use a GPU that holds all layers",
        )


def unknown_preset(preset: str) -> UserError:
    return UserError(f"preset {preset!r} is unknown", cure=f"use one of auto, {', '.join(PRESETS)}")


def paper_points(model: str, kind: str = THROUGHPUT) -> list[Point]:
    """The points of Figure 8, or of Figures 4 and 5, in the figure's order, batch sizes as its launchers ran them; of
    a model that the paper does not have its family's."""
    if own := find_family(model).points:
        return parse_points(own[kind], model, kind)
    if kind in (LATENCY, NCU):
        return [
            Point(
                model=model,
                dataset=RANDOM_TOKENS,
                top_k=top_k,
                per_device_batch_size=batch,
                seq_len_tokens=latency.SEQ_LEN_TOKENS,
            )
            for top_k, batch in latency.points(model)
        ]
    return [
        Point(model=model, dataset=dataset, top_k=top_k, per_device_batch_size=batch)
        for dataset, top_k, batch in paper.figure8_order(model)
    ]


def parse_points(text: str, model: str, kind: str = THROUGHPUT) -> list[Point]:
    """`--points`: see POINTS_HELP. Order is kept, repeats are dropped. Raises UserError."""
    points: list[Point] = []
    for item in re.split(r"[\s;]+", text.strip()):
        if item:
            points += paper_points(model, kind) if item == "paper" else _parse_item(item, model, kind)
    if not points:
        raise UserError("--points names no point", cure=POINTS_HELP)
    return list(dict.fromkeys(points))


def _parse_item(item: str, model: str, kind: str) -> list[Point]:
    number = r"\d{1,18}"  # int() refuses thousands of digits
    size = rf"(?:{number}|{MAX})"
    match = re.fullmatch(
        rf"(?P<dataset>[^:]+):(?P<sparsity>sparse|dense|k={number})"
        rf":bs=(?P<batches>{size}(?:,{size})*)(?::seq=(?P<seq>{number}))?",
        item,
    )
    if match is None:
        raise UserError(f"point {item!r} is not understood", cure=POINTS_HELP)
    batches = match["batches"].split(",")
    if MAX in batches and kind != THROUGHPUT:
        raise UserError(
            f"point {item!r}: only a throughput launcher finds the largest batch",
            cure=f"run that first, and name the batch size that it finds instead of {MAX}",
        )
    sparsity, family = match["sparsity"], find_family(model)
    top_k = {"sparse": family.sparse_top_k, "dense": family.num_experts}.get(sparsity)
    return [
        Point(
            model=model,
            dataset=match["dataset"],
            top_k=int(sparsity.removeprefix("k=")) if top_k is None else top_k,
            per_device_batch_size=1 if batch == MAX else int(batch),
            seq_len_tokens=int(match["seq"]) if match["seq"] else None,
            find_max=batch == MAX,
        )
        for batch in batches
    ]


def points_at_depths(points: list[Point], preset: str, depths: list[int], total_layers: int) -> list[Point]:
    """The same bars in a preset, once per depth (preset slice measures two, to extrapolate between)."""
    return [
        replace(point, preset=preset, num_layers=depth, total_layers=total_layers)
        for point in points
        for depth in depths
    ]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How long one point is measured.

    Without `num_queries`: after `num_warmup_steps`, at least `min_timed_steps`, then until the 95 % interval
    of queries/s is narrower than `interval_frac` of the mean, or `max_timed_steps` or `max_timed_s` is reached.
    With `num_queries`: one epoch over exactly that many queries (1000: the paper's protocol).
    `longest_batch_first`: before the first step, once forward and backward of the longest batch, so that no timed step
    is the first to meet it. Not with `num_queries`: the paper's protocol knows nothing of it.
    `num_profiled_steps`: recorded by the profiler after the timed ones; 0 for throughput.
    """

    num_queries: int | None = None
    num_warmup_steps: int = 3
    min_timed_steps: int = 20
    max_timed_steps: int = 1000
    max_timed_s: float = 600.0
    interval_frac: float = 0.02
    longest_batch_first: bool = True
    num_profiled_steps: int = 0

    def __post_init__(self) -> None:
        if self.num_queries is not None and self.num_queries < 1:
            raise UserError(f"--queries is {self.num_queries}; it must be at least 1")
        if not 0 < self.max_timed_s < math.inf:
            raise UserError(f"--max-seconds is {self.max_timed_s:g}; it must be a positive number")

    @property
    def num_steps_after(self) -> int:
        """Steps needed after the timed ones: the profiler is started, records, and is started again for memory."""
        return self.num_profiled_steps + 3 if self.num_profiled_steps else 0

    def to_json(self) -> dict[str, Any]:
        """Without what means nothing for throughput, so that points measured before it existed keep their identity."""
        content = asdict(self)
        if not self.num_profiled_steps:
            del content["num_profiled_steps"]
        return content


# On two shared CPU cores the interval is noise of the machine: the tiny preset shows that all works, briefly.
TINY_PROTOCOL = Protocol(max_timed_steps=20)
# A breakdown needs no interval as narrow as a rate's: its phases differ by tens of percent.
LATENCY_PROTOCOL = Protocol(max_timed_steps=200, max_timed_s=60.0, num_profiled_steps=2)
TINY_LATENCY_PROTOCOL = replace(LATENCY_PROTOCOL, max_timed_steps=20)
# Unprofiled steps only show here what profiling costs.
NCU_PROTOCOL = replace(LATENCY_PROTOCOL, min_timed_steps=3, max_timed_steps=3, num_profiled_steps=1)
