"""GPU memory of one fine-tuning step, predicted from a config.json and a recipe: the moments of a step, as named terms.

Every moment's terms add up to the bytes that torch's allocator has given out then; the peak is the largest moment.
Nothing is fitted: each term counts tensors. docs/memory_model.md has the terms, the moments, and how well they agree
with counted tensors and with measured runs.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tunescope.cost.memory_blackmamba import blackmamba_block, final_norm_saved, loss_rows
from tunescope.cost.memory_grouped import expert_copies, grouped_layer
from tunescope.cost.memory_layers import INT64, LayerMemory, decoder_layer, input_saved, norm_saved
from tunescope.cost.memory_shapes import (
    BF16,
    BLACKMAMBA,
    FP32,
    Batch,
    Linear,
    Setup,
    check_blackmamba,
    model_type,
    read_batch,
    read_decoder,
    read_setup,
)
from tunescope.cost.memory_weights import Weights, blackmamba_weights, decoder_weights
from tunescope.cost.padding import PAD_MULTIPLE
from tunescope.errors import UserError
from tunescope.families.family import GROUPED, STOCK

MIB = 2**20
# cuBLAS works in 32 MiB on an H100 or newer, taken from the same allocator; older GPUs take 8.1 MiB. Forward and
# backward run in threads of their own, and a thread has its own.
WORKSPACE_BYTES = 2 * 32 * MIB
# What CUDA and its libraries take beside the allocator: their context, and the kernels that are loaded.
CONTEXT_BYTES = 512 * MIB
# Blocks that are reserved and cannot be given out, over those that are, when a GPU is nearly full. Assumed: runs far
# from full reserved 2 to 17 % more than they gave out (docs/memory_model.md), but torch hands back what it can at need.
FRAGMENTATION_FRAC = 0.03
MAX_BATCH_SIZE = 2**20  # beyond it a search is given up: nothing grows with the batch

FORWARD, LOSS, LOGITS_GRADIENT = "forward of a layer", "loss", "gradient of the logits"
RECOMPUTE, BACKWARD, OPTIMIZER = "recompute of a layer", "backward of a layer", "optimizer"
# Terms of all moments, which hold between steps, too.
RESIDENT = (
    "frozen weights", "trained weights", "optimizer state", "batch and tables", "matmul workspace",
    "accumulated gradients",
)  # fmt: skip
KEPT_LAYERS = "layers that are not recomputed"  # a term
MOMENTS = (FORWARD, LOSS, LOGITS_GRADIENT, RECOMPUTE, BACKWARD, OPTIMIZER)
# Moments at which what layers keep that are not recomputed is there; before the first recompute it is gone.
GROWING = frozenset((FORWARD, LOSS, LOGITS_GRADIENT, BACKWARD))


@dataclass(frozen=True)
class Peak:
    """moment: one of MOMENTS. terms: term -> bytes, which add up to num_bytes."""

    moment: str
    num_bytes: int
    terms: dict[str, int]


@dataclass(frozen=True)
class _Model:
    """layers: from the first to the last. head_saved: of the final norm, the head and the loss without its logits.
    logits: numbers that the loss is computed of; all_logits: numbers of the head's output. kept: bytes of the layers
    that are not recomputed where others are, beyond their inputs."""

    setup: Setup
    weights: Weights
    layers: tuple[LayerMemory, ...]
    shared: dict[str, int]
    hidden: int
    head_saved: int
    logits: int
    all_logits: int
    kept: int = 0


def memory_terms(
    config: Mapping[str, Any],
    recipe: Mapping[str, Any],
    batch_size: int,
    seq_len_tokens: int,
    *,
    is_masked: bool = True,
    holds_nf4_inputs: bool = False,
    workspace_bytes: int = WORKSPACE_BYTES,
    moe_path: str = STOCK,
    num_recomputed: int | None = None,
) -> dict[str, dict[str, int]]:
    """Moment -> term -> bytes allocated then, on one GPU, in any step but the first, whose optimizer state is new.

    config: of the model, with the depth and top_k that run. recipe: LLaMA-Factory's keys. seq_len_tokens: of the
    longest query; it is padded to a multiple of 8. is_masked: whether some slots are padding; without, attention needs
    no mask and repeats no keys. holds_nf4_inputs: as bitsandbytes did before 0.43.2, whose matmul held on to its input
    where checkpointing without reentry could not drop it. moe_path: GROUPED of a decoder is accelerate_moe()'s; any
    other is stock transformers', and BlackMamba has its own. num_recomputed: of a decoder's layers, the first ones;
    None: all of them, unless the recipe says none.

    Of RECOMPUTE and BACKWARD the layer that needs most; RECOMPUTE is missing without gradient checkpointing. Raises
    UserError for a model or a recipe that is not modelled.
    """
    batch = read_batch(batch_size, seq_len_tokens, PAD_MULTIPLE, is_masked=is_masked)
    if model_type(config) == BLACKMAMBA:
        model = _blackmamba(config, recipe, batch)
    else:
        model = _decoder(config, recipe, batch, holds_nf4_inputs=holds_nf4_inputs, is_grouped=moe_path == GROUPED)
        if num_recomputed is not None and model.setup.is_checkpointed:
            if not 0 <= num_recomputed <= len(model.layers):
                raise UserError(f"{num_recomputed} of {len(model.layers)} layers cannot be recomputed")
            of_layer = max(0, model.layers[0].saved_bytes - model.layers[0].input)
            model = replace(model, kept=of_layer * (len(model.layers) - num_recomputed))
    setup, weights = model.setup, model.weights
    resident = {
        "frozen weights": weights.frozen,
        "trained weights": weights.trained,
        "optimizer state": weights.optimizer_state(setup),
        "batch and tables": sum(model.shared.values()),
        "matmul workspace": workspace_bytes,
    }
    if setup.accumulates:  # those of the micro-steps before
        resident["accumulated gradients"] = weights.trained
    at_end = _kept(model, len(model.layers))
    logits = model.logits * FP32
    moments = {
        FORWARD: resident
        | at_end
        | {
            "bf16 copies of trained weights": sum(weights.layer_copies),
            "working set": max(
                layer.forward_working if setup.is_checkpointed else layer.recompute_working for layer in model.layers
            ),
        },
        LOSS: resident
        | at_end
        | {
            "bf16 copies of trained weights": sum(weights.layer_copies) + weights.head_copies,
            "head and loss": model.head_saved + model.hidden,
            # In fp32 twice, for the loss and its logarithms, and before them as the head made them.
            "logits": 2 * logits + (model.all_logits * BF16 if setup.compute == BF16 else 0),
        },
        LOGITS_GRADIENT: resident
        | at_end
        | {
            "bf16 copies of trained weights": _copies_in_backward(model, len(model.layers)) + weights.head_copies,
            "head and loss": model.head_saved,
            "logits": 3 * logits,  # their logarithms, the loss's gradient of those, and that of the logits
        },
        OPTIMIZER: resident
        | {"gradients": _gradients(model, 0), "optimizer's working set": weights.optimizer_working(setup)},
    }
    if setup.is_checkpointed:
        moments[RECOMPUTE] = resident | _largest_layer(model, "recompute_working")
    moments[BACKWARD] = resident | _largest_layer(model, "backward_working")
    if model.kept:
        for moment in GROWING:
            moments[moment] = moments[moment] | {KEPT_LAYERS: model.kept}
    return {moment: moments[moment] for moment in MOMENTS if moment in moments}


def peak(
    config: Mapping[str, Any], recipe: Mapping[str, Any], batch_size: int, seq_len_tokens: int, **settings: Any
) -> Peak:
    """The moment that needs most. Arguments and errors as for memory_terms."""
    moments = memory_terms(config, recipe, batch_size, seq_len_tokens, **settings)
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return Peak(moment, sum(moments[moment].values()), moments[moment])


def peak_bytes(
    config: Mapping[str, Any], recipe: Mapping[str, Any], batch_size: int, seq_len_tokens: int, **settings: Any
) -> int:
    """What torch.cuda.max_memory_allocated() would be. Arguments and errors as for memory_terms."""
    return peak(config, recipe, batch_size, seq_len_tokens, **settings).num_bytes


def kept_bytes(
    config: Mapping[str, Any], recipe: Mapping[str, Any], batch_size: int, seq_len_tokens: int, **settings: Any
) -> int:
    """What autograd holds between forward and backward: activations, and copies of weights that autocast made.

    Arguments and errors as for memory_terms.
    """
    moment = memory_terms(config, recipe, batch_size, seq_len_tokens, **settings)[LOGITS_GRADIENT]
    # Of the three that are there in backward one was kept: the logarithms.
    return sum(moment[term] for term in moment if term not in RESIDENT) - moment["logits"] * 2 // 3


def max_batch_size(
    config: Mapping[str, Any],
    recipe: Mapping[str, Any],
    gpu_memory_bytes: int,
    seq_len_tokens: int,
    *,
    context_bytes: int = CONTEXT_BYTES,
    fragmentation_frac: float = FRAGMENTATION_FRAC,
    **settings: Any,
) -> int:
    """The largest batch of queries of one length that fits; 0 if not even one does.

    gpu_memory_bytes: as the driver reports it. context_bytes, fragmentation_frac: what of it the allocator does not
    get, and what of that it cannot use. Further arguments and errors as for memory_terms.
    """
    if gpu_memory_bytes <= 0 or context_bytes < 0 or not 0 <= fragmentation_frac < 1:
        raise UserError(
            f"a GPU of {gpu_memory_bytes} bytes, {context_bytes} of them for CUDA and {fragmentation_frac:g} lost, "
            "cannot be planned with"
        )
    room_bytes = (gpu_memory_bytes - context_bytes) / (1 + fragmentation_frac)

    def fits(batch_size: int) -> bool:
        return peak_bytes(config, recipe, batch_size, seq_len_tokens, **settings) <= room_bytes

    if not fits(1):
        return 0
    fitting, above = 1, 2
    while above <= MAX_BATCH_SIZE and fits(above):
        fitting, above = above, 2 * above
    while above - fitting > 1:
        middle = (fitting + above) // 2
        fitting, above = (middle, above) if fits(middle) else (fitting, middle)
    return fitting


def _decoder(
    config: Mapping[str, Any], recipe: Mapping[str, Any], batch: Batch, *, holds_nf4_inputs: bool, is_grouped: bool
) -> _Model:
    shape = read_decoder(config)
    setup = read_setup(recipe, shape.linears)
    weights = decoder_weights(shape, setup)
    if is_grouped and shape.num_experts:
        layer = grouped_layer(shape, setup, batch)
        fewer = expert_copies(shape, setup)
        weights = replace(weights, layer_copies=tuple(copies - fewer for copies in weights.layer_copies))
    else:
        layer = decoder_layer(shape, setup, batch, holds_nf4_inputs=holds_nf4_inputs)
    tokens = batch.tokens
    head = () if setup.is_lora else (Linear("lm_head", shape.width, shape.vocab_size),)
    shared = _batch_tensors(batch) | {
        "rotary tables": 2 * batch.length_tokens * shape.head_width * setup.stream,
        "mask": tokens * batch.length_tokens if batch.is_masked else 0,
    }
    return _Model(
        setup=setup,
        weights=weights,
        layers=(layer,) * shape.num_layers,
        shared=shared,
        hidden=tokens * shape.width * setup.stream,
        head_saved=norm_saved(tokens, shape.width, setup)
        + input_saved(head, tokens, shape.width, setup, setup.stream)
        + tokens * INT64,  # the shifted labels
        logits=tokens * shape.vocab_size,
        all_logits=tokens * shape.vocab_size,
    )


def _blackmamba(config: Mapping[str, Any], recipe: Mapping[str, Any], batch: Batch) -> _Model:
    check_blackmamba(config)
    setup = read_setup(recipe, ())
    if setup.casts_weights:
        raise UserError(
            "the memory of BlackMamba trained in bf16 with fp32 weights is not modelled",
            cure="known are pure_bf16: true, as LLaMA-Factory/blackmamba_full.yaml says, and bf16: false",
        )
    vocab_size, rows = config["vocab_size"], loss_rows(config, batch)
    return _Model(
        setup=setup,
        weights=blackmamba_weights(config, setup),
        layers=tuple(blackmamba_block(config, kind, setup, batch) for kind in config["layers_block_type"]),
        shared=_batch_tensors(batch),
        hidden=batch.tokens * config["hidden_size"] * FP32,
        head_saved=final_norm_saved(config, batch.tokens, setup),
        logits=rows * vocab_size,
        all_logits=batch.tokens * vocab_size,
    )


def _batch_tensors(batch: Batch) -> dict[str, int]:
    return {"batch": 3 * batch.tokens * INT64}  # tokens, labels, which are padding


def _kept(model: _Model, num_layers: int) -> dict[str, int]:
    """Activations kept by the first layers, as terms."""
    if model.setup.is_checkpointed:
        return {"inputs of layers": sum(layer.input for layer in model.layers[:num_layers])}
    return _added(layer.saved for layer in model.layers[:num_layers])


def _copies_in_backward(model: _Model, num_layers: int) -> int:
    """Without checkpointing autograd keeps autocast's copies; with it a layer makes them anew."""
    return 0 if model.setup.is_checkpointed else sum(model.weights.layer_copies[:num_layers])


def _gradients(model: _Model, down_to: int) -> int:
    """Of the head and of the layers from the last down to one; with the first come the embedding's. None where they
    are added to what an earlier micro-step left."""
    if model.setup.accumulates:
        return 0
    layers = sum(model.weights.layer[down_to:])
    return model.weights.head + layers + (model.weights.embedding if down_to == 0 else 0)


def _largest_layer(model: _Model, working: str) -> dict[str, int]:
    """The terms of one layer's backward, of the layer whose sum is largest.

    Its own gradients come as what it kept goes, and are left out.
    """
    largest: dict[str, int] = {}
    setup, weights = model.setup, model.weights
    for number, layer in enumerate(model.layers):
        if setup.is_checkpointed:
            kept = {
                "inputs of layers": sum(each.input for each in model.layers[: number + 1]) - layer.saved_input,
                **layer.saved,
            }
            copies = weights.layer_copies[number]
        else:
            kept = _kept(model, number + 1)
            copies = _copies_in_backward(model, number + 1)
        terms = kept | {
            "bf16 copies of trained weights": copies,
            "gradients": _gradients(model, number + 1),
            "working set": getattr(layer, working),
        }
        if not largest or sum(terms.values()) > sum(largest.values()):
            largest = terms
    return largest


def _added(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Sums by term."""
    total: dict[str, int] = {}
    for part in parts:
        for term, num_bytes in part.items():
            total[term] = total.get(term, 0) + num_bytes
    return total
