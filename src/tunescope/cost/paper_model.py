"""The paper's own estimate of a fine-tuning run (arXiv 2408.04693, section V): both equations and the price together.

Nothing of it is measured here. It knows two models, two data sets and four GPUs, and where it has no constants it says
so instead of borrowing others'. docs/paper_model.md has how well it does; paper_tables.py sets it beside the paper.
"""

from dataclasses import dataclass

from tunescope import paper
from tunescope.cost import paper_constants as constants
from tunescope.cost import paper_equations as equations
from tunescope.cost.paper_constants import one_of
from tunescope.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PaperEstimate:
    """One run by the paper's model.

    gpu: the paper's name, None if none was named and memory does not settle it. max_batch_size: Equation 1 with its
    floor; paper_max_batch_size: the largest that the paper ran, None where it ran none or another length was given;
    batch_size: the one that throughput is of. queries_per_s, hours, cost_usd: None where the paper has no constants or
    no price, and `missing` says why. memory_set, throughput_set, form: which constants, and which form of Equation 2.
    """

    model: str
    dataset: str
    sparsity: str
    gpu: str | None
    gpu_memory_gb: float
    seq_len_tokens: int
    num_queries: float
    epochs: float
    memory_set: str
    max_batch_unfloored: float
    max_batch_size: int
    paper_max_batch_size: int | None
    batch_size: int
    throughput_set: str
    form: str
    queries_per_s: float | None
    hours: float | None
    price_usd_per_hour: float | None
    price_source: str
    cost_usd: float | None
    missing: tuple[str, ...]


def paper_estimate(
    model: str,
    dataset: str,
    gpu_memory_gb: float,
    sparsity: str,
    *,
    num_queries: float,
    epochs: float = constants.EPOCHS,
    gpu: str | None = None,
    price_usd_per_hour: float | None = None,
    seq_len_tokens: int | None = None,
    batch_size: int | None = None,
    memory_set: str | None = None,
    throughput_set: str = constants.CODED,
    form: str = equations.PLOTTED,
) -> PaperEstimate:
    """Maximum batch by Equation 1, throughput at it by Equation 2, hours and USD.

    dataset: of Table II (cs, math, he, gs). sparsity: dense or sparse. gpu_memory_gb: on the vendor's sheet.
    gpu: as paper_constants.paper_gpu() takes it; None: the paper's GPU of that memory that has a sweep of the model and
    data set, where there is just one. price_usd_per_hour: None: Table IV's.
    seq_len_tokens: None: of the data set's longest query; Equation 2 knows no length, so another one changes throughput
    by the batch size alone. batch_size: None: Equation 1's; Table IV took measured ones.
    memory_set, throughput_set: see paper_constants; form: one of paper_equations.FORMS.
    Raises UserError for a name that the paper has not and a number that cannot be.
    """
    memory_set = memory_set or constants.MEMORY_SETS[one_of("model", model, constants.MEMORY_SETS)]
    memory = constants.memory_constants(model, memory_set)
    fraction = constants.active_expert_frac(sparsity)
    one_of("data set", dataset, constants.datasets())
    one_of("form of Equation 2", form, equations.FORMS)
    one_of("set of constants", throughput_set, constants.THROUGHPUT_STATUS)
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch size {batch_size} cannot be run; it must be 1 or more")
    length_tokens = constants.seq_len_tokens(dataset) if seq_len_tokens is None else seq_len_tokens
    unfloored = equations.max_batch_unfloored(memory, gpu_memory_gb, length_tokens, fraction)
    max_batch_size = equations.max_batch_size(memory, gpu_memory_gb, length_tokens, fraction)
    equations.positive("number of queries", num_queries)
    equations.positive("epochs", epochs)

    missing: list[str] = []
    chosen_batch_size = max_batch_size if batch_size is None else batch_size
    known_gpu = (
        _gpu_of(model, dataset, gpu_memory_gb, missing) if gpu is None else constants.paper_gpu(gpu, gpu_memory_gb)
    )
    throughput = None
    if known_gpu is not None:
        throughput = constants.throughput_constants(model, known_gpu, dataset, throughput_set)
        if throughput is None:
            missing.append(
                f"no throughput: the paper has no {throughput_set} constants of {model} on {known_gpu} with {dataset}"
            )
    queries_per_s = None
    if chosen_batch_size == 0:
        missing.append(f"no throughput: by Equation 1 not one query of {length_tokens} tokens fits")
    elif throughput is not None:
        queries_per_s = equations.throughput_queries_per_s(throughput, chosen_batch_size, fraction, form)
    price, price_source = _price(known_gpu, price_usd_per_hour)
    if price is None:
        missing.append(f"no price: {price_source}")
    return PaperEstimate(
        model=model,
        dataset=dataset,
        sparsity=sparsity,
        gpu=known_gpu,
        gpu_memory_gb=gpu_memory_gb,
        seq_len_tokens=length_tokens,
        num_queries=num_queries,
        epochs=epochs,
        memory_set=memory_set,
        max_batch_unfloored=unfloored,
        max_batch_size=max_batch_size,
        paper_max_batch_size=None
        if seq_len_tokens is not None
        else _largest_run(model, dataset, sparsity, gpu_memory_gb),
        batch_size=chosen_batch_size,
        throughput_set=throughput_set,
        form=form,
        queries_per_s=queries_per_s,
        hours=None if queries_per_s is None else equations.run_hours(num_queries, epochs, queries_per_s),
        price_usd_per_hour=price,
        price_source=price_source,
        cost_usd=None
        if queries_per_s is None or price is None
        else equations.run_cost_usd(num_queries, epochs, queries_per_s, price),
        missing=tuple(missing),
    )


def _gpu_of(model: str, dataset: str, gpu_memory_gb: float, missing: list[str]) -> str | None:
    """The one GPU of that memory with a sweep; None, and the reason added to `missing`, if there is none or more."""
    found = [
        gpu
        for gpu, memory_gb in constants.GPU_MEMORY_GB.items()
        if memory_gb == gpu_memory_gb and constants.throughput_constants(model, gpu, dataset) is not None
    ]
    if len(found) == 1:
        return found[0]
    missing.append(
        f"no throughput: with {gpu_memory_gb:g} GB the paper has {' and '.join(found)}; name one"
        if found
        else f"no throughput: the paper has no GPU of {gpu_memory_gb:g} GB with a sweep of {model} and {dataset}"
    )
    return None


def _largest_run(model: str, dataset: str, sparsity: str, gpu_memory_gb: float) -> int | None:
    """The largest batch of the paper's sweeps and of Figure 13's measured points."""
    batch_sizes = [
        int(row["max_batch_size"])
        for row in paper.rows("max_batch")
        if row["kind"] in ("largest_in_sweep", "ground_truth_point")
        and (row["model"], row["dataset"], row["sparsity"]) == (model, dataset, sparsity)
        and float(row["gpu_memory_gb"]) == gpu_memory_gb
    ]
    return max(batch_sizes, default=None)


def _price(gpu: str | None, given_usd_per_hour: float | None) -> tuple[float | None, str]:
    """(price, where it stands, or why there is none)."""
    if given_usd_per_hour is not None:
        return equations.checked_price(given_usd_per_hour), "given"
    if gpu is None:
        return None, "it needs a GPU"
    price = constants.price_usd_per_hour(gpu)
    if price is None:
        return None, f"Table IV has none of {gpu}; give one"
    return price, f"Table IV, {constants.PRICE_PROVIDER}; quote not dated, paper of {constants.PAPER_DATE}"
