"""What an estimate is of: a model, a recipe and data, from the names and files that a user gives. No torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tunescope import checkpoints
from tunescope.config import PAPER_DATASETS
from tunescope.cost.lengths import Lengths, read_lengths
from tunescope.cost.memory_shapes import model_type
from tunescope.cost.time_points import study_lengths
from tunescope.errors import UserError
from tunescope.families import FAMILIES, family_of
from tunescope.families.family import Family

SPARSE, DENSE = "sparse", "dense"
CUTOFF_LEN_TOKENS = 2048  # LLaMA-Factory's default
TEMPLATE = "mistral"  # for data files of models whose recipe names none
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
    "cutoff_len": 1024,
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
        "cutoff_len": 1024,
        "template": "llama2",
    },
}


@dataclass(frozen=True, kw_only=True)
class Model:
    """name: for people. config: its config.json, with the top_k that runs. folder: where it lies, None for a family's.

    top_k, num_experts: None without experts. moe_path: how experts run, as time_model knows it.
    """

    name: str
    config: dict[str, Any]
    family: Family | None
    folder: Path | None
    top_k: int | None
    num_experts: int | None
    moe_path: str

    @property
    def sparsity(self) -> str:
        if self.num_experts is None:
            return "no experts"
        return DENSE if self.top_k == self.num_experts else f"top-{self.top_k} of {self.num_experts}"


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that is asked of a GPU.

    lengths: of one epoch's queries, cut. longest_tokens: of the whole data set, which memory must hold even where only
    a part of it is trained. num_cut: queries of the data set that the cutoff shortens. notes: what was assumed.
    """

    model: Model
    recipe: dict[str, Any]
    lengths: Lengths
    longest_tokens: int
    num_cut: int
    num_queries_of_data: int
    cutoff_len_tokens: int
    epochs: float
    notes: tuple[str, ...] = field(default=())


def read_run(
    model: str,
    data: str,
    *,
    epochs: float = 1.0,
    queries: int | None = None,
    sparsity: str | None = None,
    top_k: int | None = None,
    cutoff_len: int | None = None,
    recipe: Mapping[str, Any] | None = None,
    moe_path: str | None = None,
) -> Run:
    """From what `tunescope estimate` is given. Raises UserError for whatever cannot be estimated.

    queries: trained in an epoch; None: all of the data, other numbers have its lengths. cutoff_len: instead of the
    recipe's (tokens). recipe: LLaMA-Factory's keys; None: the family's of RECIPES, else QLORA.
    """
    if not 0 < epochs < math.inf:
        raise UserError(f"--epochs is {epochs:g}; it must be a positive number")
    if queries is not None and queries < 1:
        raise UserError(f"--queries is {queries}; it must be at least 1")
    found = read_model(model, sparsity=sparsity, top_k=top_k, moe_path=moe_path)
    notes = []
    family_name = found.family.name if found.family else ""
    if recipe is None and family_name not in RECIPES:
        notes.append("No recipe was given: NF4 QLoRA of rank 16 on all linears, gradient checkpointing, cut at 1024.")
    settings = dict(RECIPES.get(family_name, QLORA) if recipe is None else recipe)
    if cutoff_len is not None:
        settings["cutoff_len"] = cutoff_len
    cutoff = settings.get("cutoff_len", CUTOFF_LEN_TOKENS)
    if type(cutoff) is not int or cutoff < 1:
        raise UserError(f"cutoff_len is {cutoff!r}; it must be a whole number of tokens from 1")
    if data in PAPER_DATASETS:
        whole = study_lengths(family_name, data)
    else:
        template = str(settings.get("template", TEMPLATE))
        whole = read_lengths(data, template=template, tokenizer_json=_tokenizer(found, data))
    if whole.bounds is not None:
        notes.append(
            f"Tokens of {data} are estimated from its words; the interval covers 0.9 to 1.35 tokens a word. A model "
            "folder with its tokenizer.json counts them."
        )
    if found.family is not None and found.moe_path != found.family.moe_path:
        notes.append(
            f"Memory is that of MoE path {found.family.moe_path}: of {found.moe_path} only the time is modelled, so "
            "the batch that fits may differ."
        )
    cut = whole.cut(cutoff)
    return Run(
        model=found,
        recipe=settings,
        lengths=cut if queries is None else resized(cut, queries),
        longest_tokens=cut.longest_tokens,
        num_cut=whole.num_longer_than(cutoff),
        num_queries_of_data=whole.num_queries,
        cutoff_len_tokens=cutoff,
        epochs=epochs,
        notes=tuple(notes),
    )


def read_model(
    model: str, *, sparsity: str | None = None, top_k: int | None = None, moe_path: str | None = None
) -> Model:
    """A family's name, a folder with a config.json, or a config.json. Raises UserError."""
    if model in FAMILIES:
        family: Family | None = FAMILIES[model]
        config, folder = dict(FAMILIES[model].full), None
    else:
        path = Path(model).expanduser()
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise UserError(
                f"there is no model {model!r}",
                cause=f"it is neither one of {', '.join(FAMILIES)}, nor a folder with a config.json, nor such a file",
                cure="check the name or the path",
            )
        config = checkpoints.read_json(file)
        model_type(config)  # refuses what is not modelled
        family, folder = family_of(config), file.parent
    num_experts = config.get(family.experts_key) if family else None
    chosen = _top_k(config, family, num_experts, sparsity, top_k, is_own=folder is not None)
    if family is not None and chosen is not None:
        config = family.config_at(config, config["num_hidden_layers"], chosen)
    return Model(
        name=model if folder is None else (folder.name or str(folder)),
        config=config,
        family=family,
        folder=folder,
        top_k=chosen,
        num_experts=num_experts,
        moe_path=moe_path or (family.moe_path if family else "stock"),
    )


def _top_k(
    config: Mapping[str, Any],
    family: Family | None,
    num_experts: int | None,
    sparsity: str | None,
    top_k: int | None,
    *,
    is_own: bool,
) -> int | None:
    if sparsity is not None and top_k is not None:
        raise UserError("--sparsity and --top-k exclude each other", cure="give one of them")
    if sparsity not in (None, SPARSE, DENSE):
        raise UserError(f"--sparsity {sparsity!r} is unknown", cure=f"use {SPARSE} or {DENSE}, or --top-k N")
    if family is None or num_experts is None:
        if sparsity is not None or top_k is not None:
            raise UserError("the model has no experts to choose from", cure="drop --sparsity and --top-k")
        return None
    if sparsity == DENSE:
        return num_experts
    usual = config.get("num_experts_per_tok") if is_own else family.sparse_top_k
    chosen = top_k if top_k is not None else usual
    if type(chosen) is not int or not 1 <= chosen <= num_experts:
        raise UserError(f"top_k is {chosen!r}; it must be from 1 to {num_experts}", cure="give another --top-k")
    return chosen


def _tokenizer(model: Model, data: str) -> Path | None:
    """The model's own, where it lies beside the config and there are texts to count."""
    if model.folder is None or Path(data).suffix not in (".json", ".jsonl"):
        return None
    file = model.folder / "tokenizer.json"
    return file if file.is_file() else None


def resized(lengths: Lengths, num_queries: int) -> Lengths:
    """So many queries of the same lengths: quantiles (i + 1/2) / num_queries of the histogram."""
    ends = np.cumsum(lengths.counts)
    places = (np.arange(num_queries) + 0.5) / num_queries * ends[-1]
    chosen, counts = np.unique(np.searchsorted(ends, places), return_counts=True)
    bounds = lengths.bounds and (resized(lengths.bounds[0], num_queries), resized(lengths.bounds[1], num_queries))
    return Lengths(lengths.lengths_tokens[chosen], counts, lengths.source, bounds)
