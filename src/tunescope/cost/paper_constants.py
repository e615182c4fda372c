"""The constants of the paper's model (arXiv 2408.04693, section V), each as printed and as its scripts have it, and the
sweeps, lengths and prices that go with them. Looked up by the paper's names; nothing is borrowed for what it has not.
"""

from collections.abc import Iterable
from functools import cache

import numpy as np

from tunescope import paper
from tunescope.cost.paper_equations import MemoryConstants, Sweep, ThroughputConstants
from tunescope.errors import UserError
from tunescope.hardware import UnknownDevice, find_device

CODED, PRINTED_SET = "coded", "printed"
# The set that fits the paper's own limits. Mixtral's printed one does not (2 of 8 against 8 of 8), and BlackMamba has
# no other.
MEMORY_SETS = {"mixtral": CODED, "blackmamba": PRINTED_SET}

LONGEST, MEDIAN = "longest", "median"
CUTOFF_LEN_TOKENS = 1024  # of every launcher of the paper: longer queries are cut
EPOCHS = 10  # of Table IV

PAPER_DATE = "2024-08"  # of arXiv 2408.04693; the paper does not date its price quotes
PRICE_PROVIDER = "CUDO Compute"

# Memory on the sheet (GB) of the GPUs of Figures 14 and 15.
GPU_MEMORY_GB = {"a40": 48.0, "a100-40gb": 40.0, "a100-80gb": 80.0, "h100-80gb": 80.0}
# Which board of a family the paper had is not said.
_GPU_OF_DEVICE = {
    "NVIDIA A40": "a40",
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-PCIE-40GB": "a100-40gb",
    "NVIDIA A100-SXM4-80GB": "a100-80gb",
    "NVIDIA A100 80GB PCIe": "a100-80gb",
    "NVIDIA H100 PCIe": "h100-80gb",
    "NVIDIA H100 80GB HBM3": "h100-80gb",
}

# Set of constants -> how throughput_model.csv marks it.
THROUGHPUT_STATUS = {CODED: "refit", PRINTED_SET: "printed in artifact image"}


def active_expert_frac(sparsity: str) -> float:
    """1 for dense, 0.25 for sparse. Raises UserError for another word."""
    fractions = {
        row["parameter"].removeprefix("sparsity_"): float(row["value"])
        for row in paper.rows("memory_model")
        if row["parameter_set"] == "definition"
    }
    return fractions[one_of("sparsity", sparsity, fractions)]


@cache
def memory_constants(model: str, parameter_set: str | None = None) -> MemoryConstants:
    """Of Equation 1. parameter_set: coded (Figure 13's script; Mixtral only) or printed (section V-A); None: that of
    MEMORY_SETS. Raises UserError where the paper has none."""
    chosen = parameter_set or MEMORY_SETS[one_of("model", model, MEMORY_SETS)]
    values = {
        row["parameter"]: float(row["value"])
        for row in paper.rows("memory_model")
        if (row["model"], row["parameter_set"]) == (model, chosen)
    }
    if not values:
        has = {row["parameter_set"] for row in paper.rows("memory_model") if row["model"] == model}
        raise UserError(
            f"the paper has no {chosen!r} constants of Equation 1 for {model}",
            cure=f"use {' or '.join(sorted(has))}" if has else f"use a model of {', '.join(MEMORY_SETS)}",
        )
    return MemoryConstants(
        c0_query_tokens_per_gb=values["C0"], c1_frac=values["C1"], model_memory_gb=values["model_mem"]
    )


def datasets() -> dict[str, dict[str, str]]:
    """Table II: cs, math, he, gs -> its row."""
    return {row["dataset"]: row for row in paper.rows("dataset_table")}


def seq_len_tokens(dataset: str, choice: str = LONGEST) -> int:
    """The length for Equation 1: of the longest query as padded and cut (cs 512, math 1024), or Table II's median.

    The paper does not say which goes in; the longest does for the limits it measured. Raises UserError for a data set
    that Table II has not, and for the longest query of one whose lengths the paper does not give (he, gs).
    """
    table = datasets()
    row = table[one_of("data set", dataset, table)]
    if one_of("choice of length", choice, (LONGEST, MEDIAN)) == MEDIAN:
        return int(row["median_length_tokens_printed"])
    if not row["max_length_tokens_histogram"]:
        raise UserError(
            f"the paper does not give the longest query of {dataset!r}",
            cause="it plots the lengths of cs and math only (Figure 2).",
            cure="give the length (tokens)",
        )
    return min(int(row["max_length_tokens_histogram"]), CUTOFF_LEN_TOKENS)


@cache
def throughput_constants(model: str, gpu: str, dataset: str, parameter_set: str = CODED) -> ThroughputConstants | None:
    """Of Equation 2, by the paper's names of GPUs; None where the paper has no sweep, or does not print them.

    coded: what the scripts' fit gives, C3 as they hold it. printed: as the images of the artifact show C2 and C4, three
    digits, Figure 15 only; the paper prints none.
    """
    status = THROUGHPUT_STATUS[one_of("set of constants", parameter_set, THROUGHPUT_STATUS)]
    values = {
        row["parameter"]: float(row["value"])
        for row in paper.rows("throughput_model")
        if (row["model"], row["gpu"], row["dataset"]) == (model, gpu, dataset)
        and (row["status"] == status or row["parameter"] == "C3")
    }
    if not {"C2", "C3", "C4"} <= set(values):
        return None
    return ThroughputConstants(c2_queries_per_s=values["C2"], c3=values["C3"], c4_queries_per_s=values["C4"])


def sweep(model: str, gpu: str, dataset: str) -> Sweep:
    """The measured points of Figures 14 and 15, as Equation 2 is fitted to them; empty where there are none."""
    points = [
        (float(row["batch_size"]), int(row["top_k"]) / int(row["num_experts"]), float(row["throughput_queries_per_s"]))
        for row in paper.rows("throughput")
        if row["figure"] in ("Fig. 14", "Fig. 15")
        and (row["model"], row["gpu"], row["dataset"]) == (model, gpu, dataset)
    ]
    batch_size, fraction, queries_per_s = np.array(points, dtype=float).reshape(-1, 3).T
    return Sweep(batch_size, fraction, queries_per_s)


def price_usd_per_hour(gpu: str) -> float | None:
    """Table IV's (CUDO Compute, PAPER_DATE at the latest); None for a GPU that it has not, such as the 40 GB A100."""
    for row in paper.rows("gpu_prices"):
        if row["gpu"] == gpu and row["used_in"] == "Table IV":
            return float(row["price_usd_per_hour"])
    return None


def paper_gpu(name: str, memory_gb: float | None = None) -> str:
    """The paper's name (a40, a100-40gb, a100-80gb, h100-80gb) of a GPU named so or as hardware.py knows it.

    memory_gb: on the sheet; it settles "A100", and must agree in any case. Raises UserError for a GPU that the paper
    has no throughput of.
    """
    gpu = name.lower()
    if gpu not in GPU_MEMORY_GB:
        try:
            gpu = _GPU_OF_DEVICE.get(find_device(name, memory_gb).name, "")
        except UnknownDevice:
            raise _no_such_gpu(name, memory_gb) from None
    if not gpu or memory_gb not in (None, GPU_MEMORY_GB[gpu]):
        raise _no_such_gpu(name, memory_gb)
    return gpu


def _no_such_gpu(name: str, memory_gb: float | None) -> UserError:
    size = "" if memory_gb is None else f" with {memory_gb:g} GB"
    known = ", ".join(f"{gpu} ({memory:g} GB)" for gpu, memory in GPU_MEMORY_GB.items())
    return UserError(
        f"the paper's model knows no GPU {name!r}{size}",
        cause="Equation 2 must be fitted to a sweep on the GPU, and the paper has four.",
        cure=f"use one of {known}, or leave the GPU out: memory alone gives the maximum batch size",
    )


def one_of(what: str, name: str, known: Iterable[str]) -> str:
    """The name. Raises UserError unless it is a known one."""
    choices = list(known)
    if name not in choices:
        raise UserError(f"{what} {name!r} is unknown to the paper's model", cure=f"use one of {', '.join(choices)}")
    return name
