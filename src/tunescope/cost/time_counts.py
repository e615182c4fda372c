"""The forms that counts of a step's work have: a whole step's, and a call's launches."""

from dataclasses import dataclass

from tunescope.cost.memory_shapes import Setup
from tunescope.hardware import Device

# Nibble out of a byte, code looked up, scale, rounded and laid out: six instructions, each in the place of an FMA.
_FLOP_A_DECODED_WEIGHT = 12


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """Of one optimizer step on one GPU, all its micro-batches together.

    launches: kernels that the host launches. weight_bytes: DRAM traffic of weights, which does not depend on the batch:
    packed, decoded, read again, in every pass. matmul_flop: of matrix products and attention. activation_bytes,
    scan_bytes: DRAM traffic that goes with the token slots, outside of Mamba mixers and in them. optimizer_bytes: of
    clipping and the update. is_bf16: whether the products run in bf16, not in fp32. graph_kernels: kernels that CUDA
    graphs replay, which cost the host nothing. decoded_weights: 4-bit weights that products decode as they go, each as
    often as they do.
    """

    launches: float
    weight_bytes: float
    matmul_flop: float
    activation_bytes: float
    scan_bytes: float
    optimizer_bytes: float
    is_bf16: bool
    graph_kernels: float = 0.0
    decoded_weights: float = 0.0

    def seconds_at_peak(self, device: Device) -> tuple[float, ...]:
        """In the order of time_fit.TERMS, if a launch, and a kernel of a graph, took 1 us and the GPU reached the peaks
        of its data sheet."""
        bytes_per_s = device.dram_bytes_per_s
        flop_per_s = device.peak_bf16_flop_per_s if self.is_bf16 else device.peak_fp32_flop_per_s
        return (
            self.launches * 1e-6,
            self.weight_bytes / bytes_per_s,
            self.matmul_flop / flop_per_s,
            self.activation_bytes / bytes_per_s,
            self.scan_bytes / bytes_per_s,
            self.optimizer_bytes / bytes_per_s,
            self.graph_kernels * 1e-6,
            self.decoded_weights * _FLOP_A_DECODED_WEIGHT / device.peak_fp32_flop_per_s,
        )


@dataclass(frozen=True)
class Launches:
    """Kernels of one call: forward, and backward without its recompute."""

    forward: float
    backward: float

    def in_step(self, setup: Setup) -> float:
        return self.forward * (2 if setup.is_checkpointed else 1) + self.backward
