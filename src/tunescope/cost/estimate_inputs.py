"""What an estimate is of: a model, a recipe and data, from the names and files that a user gives. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tunescope import checkpoints
from tunescope.config import PAPER_DATASETS
from tunescope.cost.estimate_recipes import checked_epochs, read_recipe
from tunescope.cost.lengths import Lengths, read_lengths
from tunescope.cost.memory_shapes import BLACKMAMBA, check_blackmamba, model_type, read_decoder, size_of
from tunescope.cost.time_points import study_lengths
from tunescope.errors import UserError
from tunescope.families import FAMILIES, family_of
from tunescope.families.family import GROUPED, Family

SPARSE, DENSE = "sparse", "dense"
# How many decoder layers are recomputed in backward: as the recipe says, as few as memory allows, none.
RECIPES_OWN, AUTO, NONE = RECOMPUTE = ("all", "auto", "none")
TEMPLATE = "mistral"  # for data files of models whose recipe names none
MAX_QUERIES = 10**12  # their tokens still count exactly


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
    def is_switched(self) -> bool:
        """Whether accelerate_moe() groups the experts of the loaded model."""
        return self.moe_path == GROUPED and self.family is not None and not self.family.is_moe_in_config

    @property
    def sparsity(self) -> str:
        if self.num_experts is None:
            return "no experts"
        return DENSE if self.top_k == self.num_experts else f"top-{self.top_k} of {self.num_experts}"


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that is asked of a GPU.

    lengths: of one epoch's queries, cut. longest_tokens: of the whole data set, which memory must hold even where only
    a part of it is trained; where tokens are estimated, at the high end. graphs: whether steps are replayed as CUDA
    graphs. recompute: of RECOMPUTE. num_cut: queries of the data set that the
    cutoff shortens. recipe_batch_size: of the user's recipe, if it names one. notes: what was assumed.
    """

    model: Model
    recipe: dict[str, Any]
    lengths: Lengths
    longest_tokens: int
    num_cut: int
    num_queries_of_data: int
    cutoff_len_tokens: int
    epochs: float
    graphs: bool = False
    recompute: str = RECIPES_OWN
    recipe_batch_size: int | None = None
    notes: tuple[str, ...] = field(default=())


def read_run(
    model: str,
    data: str,
    *,
    epochs: float | None = None,
    queries: int | None = None,
    sparsity: str | None = None,
    top_k: int | None = None,
    cutoff_len: int | None = None,
    recipe: Mapping[str, Any] | None = None,
    moe_path: str | None = None,
    graphs: bool | None = None,
    recompute: str | None = None,
) -> Run:
    """From what `tunescope estimate` is given. Raises UserError for whatever cannot be estimated.

    epochs: None: the recipe's num_train_epochs, else 1. queries: trained in an epoch; None: what the recipe's
    max_samples and val_size leave of the data, else all of them; other numbers have their lengths. cutoff_len: instead
    of the recipe's (tokens). recipe: LLaMA-Factory's keys; None: the family's of RECIPES, else QLORA. graphs: None: so
    with grouped experts that a loaded model is switched to, as the launchers run them. recompute: None: as the recipe
    says.
    """
    if queries is not None and not 1 <= queries <= MAX_QUERIES:
        raise UserError(f"--queries is {queries}; it must be from 1 to {MAX_QUERIES:,}")
    found = read_model(model, sparsity=sparsity, top_k=top_k, moe_path=moe_path)
    family_name = found.family.name if found.family else ""
    of_recipe = read_recipe(recipe, family_name, cutoff_len)
    notes = list(of_recipe.notes)
    settings = _recomputing(of_recipe.settings, found, recompute)
    if found.is_switched and recipe is None:
        settings = settings | {"optim": "adamw_torch_fused"}  # as the launchers run them
    if graphs and not found.is_switched:
        raise UserError(
            "--graphs is for grouped experts of Mixtral and Qwen3-MoE", cure="add --moe grouped, or drop it"
        )
    num_epochs = checked_epochs(of_recipe.epochs or 1.0 if epochs is None else epochs, "--epochs")
    cutoff = of_recipe.cutoff_len_tokens
    if data in PAPER_DATASETS:
        whole = study_lengths(family_name, data)
    else:
        template = str(settings.get("template", TEMPLATE))
        whole = read_lengths(data, template=template, tokenizer_json=_tokenizer(found, data))
    if whole.num_queries > MAX_QUERIES:
        raise UserError(f"{data} has more than {MAX_QUERIES:,} queries", cure="give fewer, and more --epochs")
    cut = whole.cut(cutoff)
    longest = (cut.bounds[1] if cut.bounds else cut).longest_tokens
    if whole.bounds is not None:
        notes.append(
            f"Tokens of {data} are estimated from its words; the interval covers 0.9 to 1.35 tokens a word, and memory "
            f"is sized for the upper end, {longest} tokens in the longest query. A model folder with its "
            "tokenizer.json counts them."
        )
    if found.family is not None and found.moe_path not in (found.family.moe_path, GROUPED):
        notes.append(
            f"Memory is that of MoE path {found.family.moe_path}: of {found.moe_path} only the time is modelled, so "
            "the batch that fits may differ."
        )
    num_queries = of_recipe.num_queries(cut.num_queries) if queries is None else queries
    if recipe is not None:
        notes.append(_what_the_recipe_decided(epochs, queries, of_recipe.epochs, num_queries, cut.num_queries))
    return Run(
        model=found,
        recipe=settings,
        graphs=found.is_switched if graphs is None else graphs,
        recompute=recompute or RECIPES_OWN,
        lengths=cut if num_queries == cut.num_queries else resized(cut, num_queries),
        longest_tokens=longest,
        num_cut=whole.num_longer_than(cutoff),
        num_queries_of_data=whole.num_queries,
        cutoff_len_tokens=cutoff,
        epochs=num_epochs,
        recipe_batch_size=of_recipe.batch_size,
        notes=tuple(note for note in notes if note),
    )


def _recomputing(settings: dict[str, Any], model: Model, recompute: str | None) -> dict[str, Any]:
    """The recipe, with checkpointing as asked for. Raises UserError for what cannot be done."""
    if recompute is None:
        return settings
    if recompute not in RECOMPUTE:
        raise UserError(f"--recompute {recompute!r} is unknown", cure=f"use one of {', '.join(RECOMPUTE)}")
    if recompute == NONE:
        return settings | {"disable_gradient_checkpointing": True}
    if recompute == AUTO and not model.is_switched:
        raise UserError(
            "--recompute auto is for grouped experts of Mixtral and Qwen3-MoE",
            cause="only accelerate_moe() leaves layer by layer out of gradient checkpointing",
            cure="add --moe grouped, or use --recompute none",
        )
    return settings


def _what_the_recipe_decided(
    epochs: float | None, queries: int | None, recipe_epochs: float | None, num_queries: int, num_of_data: int
) -> str:
    """A note; empty where the flags, or defaults, decided everything."""
    decided = []
    if queries is None and num_queries != num_of_data:
        decided.append(f"{num_queries:,} of {num_of_data:,} queries (max_samples, val_size)")
    if epochs is None and recipe_epochs is not None:
        decided.append(f"{recipe_epochs:g} epochs (num_train_epochs)")
    return f"From the recipe: {' and '.join(decided)}; --queries and --epochs go before it." if decided else ""


def read_model(
    model: str, *, sparsity: str | None = None, top_k: int | None = None, moe_path: str | None = None
) -> Model:
    """A family's name, in any case, a folder with a config.json, or a config.json. Raises UserError."""
    if model.lower() in FAMILIES:
        family: Family | None = FAMILIES[model.lower()]
        config, folder = dict(FAMILIES[model.lower()].full), None
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
        _refuse_quantised(config)
        family, folder = family_of(config), file.parent
    num_experts = size_of(config, family.experts_key) if family else None
    chosen = _top_k(config, family, num_experts, sparsity, top_k, is_own=folder is not None)
    if family is not None and chosen is not None:
        config |= {"num_experts_per_tok": chosen}
        _check_sizes(config)
        config = family.config_at(config, size_of(config, "num_hidden_layers"), chosen)
    _check_sizes(config)
    return Model(
        name=model.lower() if folder is None else (folder.resolve().name or str(folder)),
        config=config,
        family=family,
        folder=folder,
        top_k=chosen,
        num_experts=num_experts,
        moe_path=moe_path or (family.moe_path if family else "stock"),
    )


def _check_sizes(config: Mapping[str, Any]) -> None:
    """Raises UserError for what no model can be built of."""
    if model_type(config) == BLACKMAMBA:
        check_blackmamba(config)
    else:
        read_decoder(config)


def _refuse_quantised(config: Mapping[str, Any]) -> None:
    """Raises UserError for a checkpoint that is quantised already, unless as NF4 by bitsandbytes, as a recipe would."""
    described = config.get("quantization_config")
    if not described:
        return
    method = described.get("quant_method") if isinstance(described, dict) else None
    if method not in ("bitsandbytes", "bnb") or not described.get("load_in_4bit"):
        raise UserError(
            f"the checkpoint is quantised already ({method or 'in a way that its config.json does not name'})",
            cause="memory and time are modelled for weights that the recipe itself quantises, to NF4 by bitsandbytes",
            cure="name the config.json of the model that it was made from",
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
    if model.folder is None or Path(data).suffix.lower() not in (".json", ".jsonl"):
        return None
    file = model.folder / "tokenizer.json"
    return file if file.is_file() else None


def resized(lengths: Lengths, num_queries: int) -> Lengths:
    """So many queries of the same lengths: quantiles (i + 1/2) / num_queries of the histogram, counted bin by bin."""
    ends, num_of_data, end = [0], lengths.num_queries, 0
    for count in lengths.counts.tolist():
        end += count
        # Quantiles up to this end: (2 i + 1) num_of_data <= 2 num_queries end, in whole numbers.
        ends.append((2 * num_queries * end + num_of_data) // (2 * num_of_data))
    counts = np.diff(np.array(ends, dtype=np.int64))
    chosen = counts > 0
    bounds = lengths.bounds and (resized(lengths.bounds[0], num_queries), resized(lengths.bounds[1], num_queries))
    return Lengths(lengths.lengths_tokens[chosen], counts[chosen], lengths.source, bounds)
