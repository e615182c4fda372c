"""Measured steps that the model of step times is fitted to: the paper's, this project's own, and the user's.

Own ones are packaged as measured_steps.csv, made from point folders by time_packaged.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tunescope import paper, results
from tunescope.config import LATENCY, THROUGHPUT
from tunescope.cost.lengths import Lengths, paper_lengths
from tunescope.cost.memory import OPTIMIZER, memory_terms
from tunescope.cost.padding import BatchLengths, batch_lengths
from tunescope.cost.time_counts import StepWork
from tunescope.cost.time_work import STOCK, code_of, step_work
from tunescope.errors import UserError
from tunescope.families import find_family
from tunescope.hardware import GIB, Device, UnknownDevice, find_device

CUTOFF_LEN_TOKENS = 1024  # of every recipe of the study
# What decides memory and time in LLaMA-Factory/*.yaml, for machines that have only the package. QLORA is for any model
# without a recipe here.
QLORA: dict[str, Any] = {
    "quantization_bit": 4,
    "quantization_type": "nf4",
    "double_quantization": True,
    "finetuning_type": "lora",
    "lora_rank": 16,
    "lora_target": "all",
    "gradient_accumulation_steps": 1,
    "bf16": True,
    "optim": "adamw_torch",
    "cutoff_len": CUTOFF_LEN_TOKENS,
}
RECIPES: dict[str, dict[str, Any]] = {
    "mixtral": QLORA | {"lora_target": "w1,w2,w3,gate", "template": "mistral"},
    "qwen3_moe": QLORA | {"lora_target": "gate_proj,up_proj,down_proj,gate", "template": "qwen3_nothink"},
    "blackmamba": {
        "finetuning_type": "full",
        "pure_bf16": True,
        "bf16": True,
        "disable_gradient_checkpointing": True,
        "gradient_accumulation_steps": 1,
        "optim": "adamw_torch",
        "cutoff_len": CUTOFF_LEN_TOKENS,
        "template": "llama2",
    },
}
# Tokens of a query over those in the paper's histogram, whose tokenizer is not recorded: so much longer its queries
# must be for batches of four, padded, to have the tokens that Figure 11 counts. That these are such batches the step
# times bear out (docs/time_model.md).
TOKENS_OVER_HISTOGRAM = {
    ("mixtral", "cs"): 1.2155, ("mixtral", "math"): 1.224, ("blackmamba", "cs"): 1.0793, ("blackmamba", "math"): 0.9688,
}  # fmt: skip
_PAPER_DEVICES = {"a40": ("A40", 48), "a100-40gb": ("A100", 40), "a100-80gb": ("A100", 80), "h100-80gb": ("H100", 80)}
PAPER_STACK = "the study's, 2024"
# Their packages decide how many launches a step takes, and how long one.
_STACK_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
_MIN_TIMED_STEPS = 2  # one says nothing of its own error
_NUM_REASONS_SHOWN = 3
_FEW_HIT_FRAC = 0.9  # of the optimizer's memory: more than predictions of it err


@dataclass(frozen=True, kw_only=True)
class TimedPoint:
    """One configuration and the mean duration of its steps.

    config: with the depth and top_k that ran. recipe: LLaMA-Factory's keys, as far as they matter here. model, dataset:
    names for a table. slots: mean token slots of a micro-batch, padding included; key_slots: keys seen, summed over
    them. step_s: mean. error_frac: its standard error over it, 0 where it is not known. host: what launches the
    kernels, one name for all points of one machine and stack. graphs: steps were replayed as CUDA graphs.
    num_recomputed: layers run again in backward, None: as the recipe says. hit_experts: of a layer, that got tokens,
    None: not known, and taken from uniform routing.
    """

    model: str
    dataset: str
    config: Mapping[str, Any]
    recipe: Mapping[str, Any]
    device: Device
    host: str
    stack: str
    batch_size: int
    slots: float
    key_slots: float
    moe_path: str
    step_s: float
    error_frac: float
    num_steps: int | None
    source: str
    graphs: bool = False
    num_recomputed: int | None = None
    hit_experts: float | None = None

    @property
    def top_k(self) -> int:
        """Experts a token goes to; 1 where there are none."""
        return int(self.config.get("num_experts_per_tok", 1))

    @property
    def code(self) -> str:
        return code_of(self.config, self.recipe, self.moe_path, graphs=self.graphs)

    @property
    def measurement(self) -> tuple[Any, ...]:
        """Equal for one measurement read from its folder and from a package, which keeps six digits."""
        numbers = (f"{value:.6g}" for value in (self.step_s, self.slots))
        return (*self.group, self.top_k, self.batch_size, self.num_recomputed, *numbers)

    @property
    def group(self) -> tuple[str, str, str]:
        """Host, device and code: see time_fit."""
        return self.host, self.device.name, self.code

    def work(self) -> StepWork:
        return step_work(
            self.config,
            self.recipe,
            batch_size=self.batch_size,
            slots=self.slots,
            key_slots=self.key_slots,
            moe_path=self.moe_path,
            graphs=self.graphs,
            num_recomputed=self.num_recomputed,
            hit_experts=self.hit_experts,
        )


@cache
def paper_points() -> tuple[TimedPoint, ...]:
    """Figures 8, 14 and 15: 96 distinct measurements, each once, at the batch size of the sweep.

    Eighteen bars of Figure 8 are points of Figure 14's sweeps, four of them under a smaller batch label. step_s is
    batch over throughput; slots are the exact expectation for study_lengths.
    """
    found: dict[tuple[str, str, str, int, int], TimedPoint] = {}
    for row in paper.rows("throughput"):
        batch_size = int(row["sweep_batch_size"] or row["batch_size"])
        key = (row["model"], row["gpu"], row["dataset"], int(row["top_k"]), batch_size)
        step_s = batch_size / float(row["throughput_queries_per_s"])
        if key in found:
            assert found[key].step_s == step_s, f"the paper has two values of {key}"
            continue
        padded = _paper_padding(row["model"], row["dataset"], batch_size)
        found[key] = _paper_point(
            row,
            batch_size,
            slots=batch_size * padded.mean_tokens,
            key_slots=batch_size * padded.mean_of(lambda tokens: tokens**2 / 2),
            step_s=step_s,
        )
    return tuple(found.values())


@cache
def paper_phase_points() -> tuple[TimedPoint, ...]:
    """Figure 4: ten steps of 128 random tokens a query on the A40, phases added up. Printed to 0.01 s each."""
    sums: dict[tuple[str, int, int], float] = {}
    rows: dict[tuple[str, int, int], dict[str, str]] = {}
    for row in paper.rows("phase_latency"):
        key = (row["model"], int(row["top_k"]), int(row["batch_size"]))
        sums[key] = sums.get(key, 0.0) + float(row["latency_s"])
        rows[key] = row
    points = []
    for key, step_s in sums.items():
        batch_size, length = key[2], int(rows[key]["seq_len_tokens"])
        slots = batch_size * length
        points.append(_paper_point(rows[key], batch_size, slots=slots, key_slots=slots * length / 2, step_s=step_s))
    return tuple(points)


def _paper_point(
    row: Mapping[str, str], batch_size: int, *, slots: float, key_slots: float, step_s: float
) -> TimedPoint:
    family = find_family(row["model"])
    device = find_device(*_PAPER_DEVICES[row["gpu"]])
    return TimedPoint(
        model=row["model"],
        dataset=row["dataset"],
        config=family.config_at(family.full, family.full["num_hidden_layers"], int(row["top_k"])),
        recipe=RECIPES[row["model"]],
        device=device,
        host=f"host of the study's {device.name}",
        stack=PAPER_STACK,
        batch_size=batch_size,
        slots=slots,
        key_slots=key_slots,
        moe_path=STOCK,
        step_s=step_s,
        error_frac=0.0,
        num_steps=None,
        source=f"arXiv 2408.04693, {row['figure']}",
    )


@cache
def study_lengths(model: str, dataset: str) -> Lengths:
    """The queries of `cs` or `math` as long as the study's runs of a model saw them, not cut.

    The paper's histogram (Figure 2), its lengths times TOKENS_OVER_HISTOGRAM. Raises UserError for another data set;
    of a model that the study does not have, the histogram as it is.
    """
    histogram = paper_lengths(dataset)
    factor = TOKENS_OVER_HISTOGRAM.get((model, dataset))
    if factor is None:
        return histogram
    tokens = np.rint(histogram.per_query() * factor).astype(np.int64)
    return Lengths.of_queries(tokens, f"{histogram.source}, times {factor:g} for {model}'s tokenizer")


@cache
def _paper_padding(model: str, dataset: str, batch_size: int) -> BatchLengths:
    return batch_lengths(study_lengths(model, dataset).cut(CUTOFF_LEN_TOKENS), batch_size)


def read_points(folder: Path) -> tuple[TimedPoint, ...]:
    """The usable points at or below a folder of results: breakdowns and throughput, on a GPU that hardware.py knows.

    Of a breakdown its unprofiled steps. Raises UserError if there is none, and says why the first ones are not usable.
    """
    return read_points_and_skipped(folder)[0]


def read_points_and_skipped(folder: Path) -> tuple[tuple[TimedPoint, ...], tuple[str, ...]]:
    """The points as read_points() has them, and of each that is not usable its name and why. Errors as there."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}", cure="name a folder of profile_data/ that a launcher filled")
    points, reasons = [], []
    for path in results.find_point_folders(folder):
        try:
            points.append(_read_point(results.read_point(path)))
        except UserError as error:
            reasons.append(f"{path.name}: {error.what}")
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            reasons.append(f"{path.name}: not a point of this program ({type(error).__name__}: {error})")
    if not points:
        shown = "; ".join(reasons[:_NUM_REASONS_SHOWN]) + ("; ..." if len(reasons) > _NUM_REASONS_SHOWN else "")
        raise UserError(
            f"{folder} holds no point that step times can be learned from",
            cause=shown or "it is empty, or not a results folder",
            cure="measure some on the GPU in question: ./mixtral_tp.sh, ./mamba_tp.sh or `tunescope run throughput`",
        )
    return tuple(points), tuple(reasons)


def _read_point(found: results.PointFolder) -> TimedPoint:
    """Raises UserError for what cannot be used, and LookupError, TypeError or ValueError for what is missing in it."""
    content, environment = found.point, found.environment
    if found.steps is None:
        raise UserError(f"its status is {found.status}")
    if content.get("kind") not in (THROUGHPUT, LATENCY):
        raise UserError(f"it is of kind {content.get('kind')}")
    if "attached" in content:
        raise UserError("it is of somebody's own Trainer, whose recipe is not recorded")
    device = _device(environment)
    columns = {name: found.steps[name].to_numpy() for name in found.steps.column_names}
    timed = ~columns["is_warmup"].astype(bool)
    if timed.sum() < _MIN_TIMED_STEPS:
        raise UserError(f"it has {timed.sum()} timed steps")
    if (columns["world_size"] != 1).any():
        raise UserError("it ran on several GPUs")
    seconds = columns["duration_ns"][timed] / 1e9
    micro_steps = columns["micro_steps"][timed]
    slots = columns["padded_tokens"][timed] / micro_steps
    lengths = columns["seq_len_tokens"][timed].astype(float)
    if not (seconds > 0).all() or not (slots > 0).all():
        raise UserError("it has steps of no duration or of no tokens")
    point = content["point"]
    config = content["model_config"] | {"num_experts_per_tok": point["top_k"]}
    recomputed = content.get("checkpointed_layers")
    timed_point = TimedPoint(
        model=point["model"],
        dataset=point["dataset"],
        config=config,
        recipe=content["recipe"],
        device=device,
        host=host_name(device, environment),
        stack=_stack(environment),
        batch_size=int(point["per_device_batch_size"]),
        slots=float(slots.mean()),
        key_slots=float((slots * lengths / 2).mean()),
        moe_path=str(content["moe"]),
        step_s=float(seconds.mean()),
        error_frac=float(seconds.std(ddof=1) / np.sqrt(len(seconds)) / seconds.mean()),
        num_steps=len(seconds),
        source=f"{content['kind']} {content['point_id']}",
        graphs=_were_graphs_replayed(found),
        num_recomputed=None if recomputed is None else len(recomputed),
        hit_experts=_hit_experts(found, config, max(columns["seq_len_tokens"].tolist())),
    )
    timed_point.work()  # a model or recipe that is not modelled cannot be used
    return timed_point


def _were_graphs_replayed(found: results.PointFolder) -> bool:
    """Raises UserError for a point that was to replay its steps and could not: it is neither the one nor the other."""
    if not found.point.get("graphs"):
        return False
    replayed = found.outcome.get("cuda_graphs") or {}
    if replayed.get("why_not"):
        raise UserError(f"its steps were not replayed as CUDA graphs: {replayed['why_not']}")
    return True


def _hit_experts(found: results.PointFolder, config: Mapping[str, Any], longest_tokens: int) -> float | None:
    """Experts of a layer that got tokens, where the peak of memory tells that many did not.

    On the stock path an adapter that no token reaches has no gradient and no optimizer state, and at the optimizer's
    moment nothing else depends on the batch. So what the peak lacks of the predicted one is theirs; see
    docs/time_model.md.
    """
    peak_bytes, content = found.outcome.get("peak_allocated_bytes"), found.point
    num_experts = config.get("num_local_experts") or config.get("num_experts")
    if content["moe"] != STOCK or not num_experts or peak_bytes is None:
        return None
    point = content["point"]
    moments = memory_terms(
        config,
        content["recipe"],
        int(point["per_device_batch_size"]),
        int(longest_tokens),
        is_masked=point["seq_len_tokens"] is None,
    )
    terms = moments[OPTIMIZER]
    of_hit = sum(terms[name] for name in ("optimizer state", "gradients", "optimizer's working set"))
    reached = 1 - (sum(terms.values()) - peak_bytes) / of_hit
    is_of_the_optimizer = sum(terms.values()) == max(sum(each.values()) for each in moments.values())
    return round(reached * num_experts, 1) if is_of_the_optimizer and 0 < reached < _FEW_HIT_FRAC else None


def _device(environment: Mapping[str, Any]) -> Device:
    gpu = environment.get("gpu")
    if gpu is None:
        raise UserError("it ran without a GPU")
    try:
        return find_device(gpu["name"], gpu["memory_total_bytes"] / GIB)
    except UnknownDevice as error:
        raise UserError(error.what) from None


def host_name(device: Device, environment: Mapping[str, Any]) -> str:
    """Two machines with the same names of all these are taken for one."""
    cores = environment.get("cpu_cores")
    return f"{device.name} with {environment['cpu']}" + (f", {cores} cores" if cores else "")


def _stack(environment: Mapping[str, Any]) -> str:
    packages = environment.get("packages") or {}
    return ", ".join(f"{name} {packages[name]}" for name in _STACK_PACKAGES if packages.get(name))
