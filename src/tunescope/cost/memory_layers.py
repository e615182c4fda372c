"""What one layer keeps for backward, tensor by tensor, and what it needs beside while it runs.

`saved` is what autograd holds after the layer's forward: each tensor once, weights left out. Source: the models of
transformers 4.57, PEFT 0.18 and bitsandbytes 0.50, whose saved tensors tests/test_cost_memory_against_torch.py counts.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from tunescope.cost.memory_shapes import BF16, FP32, Batch, Decoder, Linear, Setup
from tunescope.families.family import NF4_BLOCK_WEIGHTS

INT64 = 8


@dataclass(frozen=True, kw_only=True)
class LayerMemory:
    """Bytes of one layer.

    saved: term -> bytes. input: what checkpointing keeps of it, the hidden state that it begins with. saved_input: how
    much of saved is that same tensor. The working sets are what is alive at their worst moment and neither saved nor
    counted elsewhere: of the forward that keeps nothing, of the forward that saves, and of backward.
    """

    saved: dict[str, int]
    input: int
    saved_input: int
    forward_working: int
    recompute_working: int
    backward_working: int

    @property
    def saved_bytes(self) -> int:
        return sum(self.saved.values())


def decoder_layer(shape: Decoder, setup: Setup, batch: Batch, *, holds_nf4_inputs: bool) -> LayerMemory:
    """Attention and an MLP, or a mixture of them through stock transformers: one expert after another.

    holds_nf4_inputs: see tunescope.cost.memory.memory_terms.
    """
    tokens, hidden = batch.tokens, batch.tokens * shape.width * setup.stream
    saved = {
        "norms": 2 * norm_saved(tokens, shape.width, setup),
        "attention": _attention_saved(shape, setup, batch),
    }
    if shape.num_experts:
        saved["router"] = _router_saved(shape, setup, tokens)
        rows = tokens * shape.top_k
        saved["experts"] = _mlp_saved(shape, setup, rows, setup.stream) + rows * (
            shape.width * setup.compute  # an expert's output, for the gradient of its weight
            + setup.stream  # its weight
            + shape.width * setup.stream  # their product: index_add keeps its source
        )
        saved["dispatch indices"] = 2 * rows * INT64
        one_hot = rows * shape.num_experts * INT64
    else:
        rows, one_hot = tokens, 0
        saved["mlp"] = _mlp_saved(shape, setup, rows, setup.stream)
    largest = max(shape.mlp, key=lambda linear: linear.num_weights)
    decoded = _decoded_bytes(largest, setup)
    expert_rows = -(-rows // (shape.num_experts or 1))  # of one expert, where they are loaded evenly
    inner = expert_rows * shape.mlp_width * setup.compute
    outer = expert_rows * shape.width * setup.stream
    attention = 5 * tokens * shape.heads * shape.head_width * setup.compute  # rotary embedding of the queries
    norm = 2 * tokens * shape.width * FP32
    recast = expert_rows * shape.mlp_width * FP32 if setup.recasts_inputs else 0
    cast_gradient = 0 if setup.is_lora or not setup.casts_weights else largest.num_weights * setup.compute
    return LayerMemory(
        saved=saved,
        input=hidden + (_nf4_inputs(shape, setup, tokens, rows) if holds_nf4_inputs else 0),
        saved_input=hidden if setup.stream == FP32 else 0,
        # The residual and the normed input stay in Python's hands, and an MoE's sum of outputs.
        forward_working=2 * hidden + max(attention, norm, one_hot + hidden + outer + 4 * inner + decoded),
        recompute_working=3 * hidden + one_hot + inner + decoded + recast,
        # The gradient of the layer's output, and of the product inside an expert from its adapter and from its weight.
        backward_working=hidden + 2 * inner + decoded + recast + cast_gradient,
    )


def norm_saved(tokens: int, width: int, setup: Setup) -> int:
    """An RMSNorm: its input in fp32, one number a row, and for its own gradient the normalised rows."""
    row = width * FP32 + FP32 + (0 if setup.is_lora else width * setup.stream)
    return tokens * row


def input_saved(linears: Iterable[Linear], rows: int, width: int, setup: Setup, number_bytes: int) -> int:
    """The input that some linears share, as far as their weights' gradients need it.

    number_bytes: of the input. Every linear has its own copy where autocast casts, and where PEFT does.
    """
    keeping = sum(setup.keeps_input(linear) for linear in linears)
    if number_bytes != setup.compute or setup.recasts_inputs:
        return keeping * rows * width * setup.compute
    return min(keeping, 1) * rows * width * setup.compute


def _adapters_saved(linears: Iterable[Linear], rows: int, setup: Setup) -> int:
    """What an adapter's first matrix gives its second."""
    return sum(rows * setup.rank * setup.compute for linear in linears if setup.is_adapted(linear))


def _attention_saved(shape: Decoder, setup: Setup, batch: Batch) -> int:
    tokens, compute = batch.tokens, setup.compute
    queries, out = shape.attention[:3], shape.attention[3:]
    # With a mask, transformers repeats keys and values for all heads; without, the kernel shares them.
    kv_heads = shape.heads if batch.is_masked else shape.kv_heads
    saved = input_saved(queries, tokens, shape.width, setup, setup.stream)
    if shape.has_qk_norm:
        heads = shape.heads + shape.kv_heads
        normed = shape.head_width * (FP32 + (0 if setup.is_lora else compute))
        saved += tokens * heads * (normed + FP32)
    saved += tokens * (2 * shape.heads + 2 * kv_heads) * shape.head_width * compute  # queries, keys, values, output
    saved += tokens * shape.heads * FP32  # one logarithm of a sum a query and head
    if batch.is_masked:
        saved += tokens * batch.length_tokens * compute
    to_out = input_saved(out, tokens, shape.heads * shape.head_width, setup, compute)
    if setup.recasts_inputs:
        saved += to_out  # a copy; else it is the output that attention keeps anyway
    return saved + _adapters_saved(shape.attention, tokens, setup)


def _router_saved(shape: Decoder, setup: Setup, tokens: int) -> int:
    saved = input_saved(shape.router, tokens, shape.width, setup, setup.stream)
    saved += _adapters_saved(shape.router, tokens, setup)
    saved += tokens * (shape.num_experts * FP32 + shape.top_k * INT64)
    if shape.normalises_routing:
        saved += tokens * (1 + shape.top_k) * FP32
    return saved


def _mlp_saved(shape: Decoder, setup: Setup, rows: int, number_bytes: int) -> int:
    """number_bytes: of the input. Kept of the width inside: both projections, the activation, and their product."""
    into, back = shape.mlp[:2], shape.mlp[2:]
    inside = 3 * rows * shape.mlp_width * setup.compute
    inside += input_saved(back, rows, shape.mlp_width, setup, setup.compute)
    return input_saved(into, rows, shape.width, setup, number_bytes) + inside + _adapters_saved(shape.mlp, rows, setup)


def _nf4_inputs(shape: Decoder, setup: Setup, tokens: int, rows: int) -> int:
    """Of all quantised weights of a layer, one that several share counted once."""
    if not setup.is_quantised:
        return 0
    of_attention = shape.width + shape.heads * shape.head_width
    return (tokens * (of_attention + len(shape.router) * shape.width) + rows * (shape.width + shape.mlp_width)) * BF16


def _decoded_bytes(linear: Linear, setup: Setup) -> int:
    """A frozen weight in bf16 for as long as its matmul takes, with the fp32 scales it is decoded by."""
    if not setup.is_quantised:
        return 0
    return linear.num_weights * BF16 + -(-linear.num_weights // NF4_BLOCK_WEIGHTS) * FP32
