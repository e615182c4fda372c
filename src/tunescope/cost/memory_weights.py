"""GPU bytes of weights, adapters, gradients and AdamW's moments, each tensor rounded up as torch's allocator does."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tunescope.cost.memory_shapes import FP32, Decoder, Linear, Setup
from tunescope.families.blackmamba_shapes import EMBEDDINGS, parameter_shapes
from tunescope.families.family import NF4_BLOCK_WEIGHTS, NF4_NESTED_BLOCK

ALLOCATION_BYTES = 512  # torch's caching allocator gives memory in blocks of whole multiples
_NF4_CODE = 16  # fp32 values of the code that a weight's 4 bits stand for, kept with every weight
_NESTED_CODE = 256  # the same of the 8 bits of an absmax


@dataclass(frozen=True)
class Weights:
    """frozen: bytes of what is not trained. head, layer, embedding: bytes of trained tensors, of layer one a layer; the
    head's has the final norm's. copies: of them in the dtype of the matmuls, where autocast makes some. num_trained:
    tensors. A tied embedding is the head's."""

    frozen: int
    head: int
    layer: tuple[int, ...]
    embedding: int
    head_copies: int
    layer_copies: tuple[int, ...]
    num_trained: int

    @property
    def trained(self) -> int:
        return self.head + sum(self.layer) + self.embedding

    def optimizer_state(self, setup: Setup) -> int:
        """Two moments of each trained number. Their step counts are on the CPU unless the optimizer is fused."""
        return 2 * self.trained + (self.num_trained * ALLOCATION_BYTES if setup.is_fused_optimizer else 0)

    def optimizer_working(self, setup: Setup) -> int:
        """torch's AdamW over all tensors at once holds the root of the second moments; clipping works in place."""
        return 0 if setup.is_fused_optimizer else self.trained


def allocated(num_bytes: int) -> int:
    """Bytes of the block that the allocator gives for a tensor."""
    return -(-num_bytes // ALLOCATION_BYTES) * ALLOCATION_BYTES


def nf4_bytes(num_weights: int) -> int:
    """A weight in NF4 under double quantisation: its halves of bytes, one absmax byte a block, their fp32 scales and
    offset, and both codes."""
    blocks = -(-num_weights // NF4_BLOCK_WEIGHTS)
    scales = -(-blocks // NF4_NESTED_BLOCK)
    tensors = (-(-num_weights // 2), blocks, scales * FP32, FP32, _NF4_CODE * FP32, _NESTED_CODE * FP32)
    return sum(map(allocated, tensors))


def decoder_weights(shape: Decoder, setup: Setup) -> Weights:
    embedding = shape.vocab_size * shape.width
    norms = shape.norm_widths
    if not setup.is_lora:
        layer = _sum((_numbers(shape.linears), norms), setup.trained)
        matrices = sum(linear.copies * linear.num_weights for linear in shape.linears)
        copies = matrices * setup.compute if setup.casts_weights else 0
        outside = allocated(embedding * setup.trained)
        return Weights(
            frozen=0,
            head=outside + allocated(shape.width * setup.trained),
            layer=(layer,) * shape.num_layers,
            embedding=0 if shape.is_tied else outside,
            head_copies=embedding * setup.compute if setup.casts_weights else 0,
            layer_copies=(copies,) * shape.num_layers,
            num_trained=shape.num_layers * (len(_numbers(shape.linears)) + len(norms)) + (2 if shape.is_tied else 3),
        )
    if setup.is_quantised:
        layer_frozen = sum(linear.copies * nf4_bytes(linear.num_weights) for linear in shape.linears)
        biases = [linear.out_width for linear in shape.linears if linear.has_bias for _ in range(linear.copies)]
        layer_frozen += _sum((biases, norms), setup.frozen)
    else:
        layer_frozen = _sum((_numbers(shape.linears), norms), setup.frozen)
    outside = _sum(((shape.width,), (embedding,) * (1 if shape.is_tied else 2)), setup.frozen)
    adapters = [
        setup.rank * side
        for linear in shape.linears
        if setup.is_adapted(linear)
        for side in (linear.in_width, linear.out_width)
        for _ in range(linear.copies)
    ]
    copies = sum(adapters) * setup.compute if setup.casts_weights else 0
    return Weights(
        frozen=outside + shape.num_layers * layer_frozen,
        head=0,
        layer=(_sum((adapters,), setup.trained),) * shape.num_layers,
        embedding=0,
        head_copies=0,
        layer_copies=(copies,) * shape.num_layers,
        num_trained=shape.num_layers * len(adapters),
    )


def blackmamba_weights(config: Mapping[str, Any], setup: Setup) -> Weights:
    """All trained, in the dtype they are computed in."""
    shapes = parameter_shapes(config)
    layers = [0] * config["num_hidden_layers"]
    head = 0
    for name, shape in shapes.items():
        num_bytes = allocated(math.prod(shape) * setup.trained)
        if name == EMBEDDINGS or name.startswith("model.final_norm"):
            head += num_bytes
        else:
            layers[int(name.split(".")[2])] += num_bytes
    return Weights(
        frozen=0,
        head=head,
        layer=tuple(layers),
        embedding=0,
        head_copies=0,
        layer_copies=(0,) * len(layers),
        num_trained=len(shapes),
    )


def _numbers(linears: Iterable[Linear]) -> list[int]:
    """Sizes of all weights and biases."""
    found = []
    for linear in linears:
        found += [linear.num_weights] * linear.copies
        found += [linear.out_width] * linear.copies * linear.has_bias
    return found


def _sum(groups: Iterable[Iterable[int]], number_bytes: int) -> int:
    return sum(allocated(size * number_bytes) for group in groups for size in group)
