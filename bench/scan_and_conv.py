"""Selective scan, causal convolution and residual norm of BlackMamba-2.8B: each implementation on one GPU.

    python3 bench/scan_and_conv.py             # all shapes in bf16; appends rows to bench/scan_and_conv.csv
    python3 bench/scan_and_conv.py --quick     # tiny shapes, also without a GPU (then the reference alone)

median_us, p20_us, p80_us: of the repeats, each a time of the device between CUDA events around one call. Before each
a GiB is zeroed, so that nothing of the call's tensors is left in the L2 cache, and while that runs the call has been
launched.
timed: graph where the events are around a replay of the call, captured once in a CUDA graph: no time of the host is in
it. eager where they are around the call itself, and its time is the host's where that launches slower than the device
works: of the reference's scan, with its thousands of launches, and of what cannot be captured (stderr says why). On a
CPU eager is the time of the call.
host_us: what one eager call takes until it returns, its work launched and not waited for; median of calls that each
find the device idle. backward's has torch.autograd.grad in it, and in both forward's comes on top.
forward keeps what backward needs. backward is of one forward, again and again. both is one after the other.

bytes_moved: inputs read once and outputs written once, however often an implementation reads them. For backward the
inputs are what forward must keep (for the norm residual_out, for the others their own inputs) and the gradients of the
outputs; the outputs are the gradients of the inputs. copy_bytes_per_s: torch's copy of bytes_moved / 2 from one buffer
to another, timed in the same way just before. ratio_to_mamba_ssm: median_us over that of mamba-ssm (for the convolution
causal-conv1d), where it can be imported: below 1 is faster; host_ratio_to_mamba_ssm: host_us over its. The norm's
channels are half as many, the model's width.
"""

import argparse
import datetime
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from csv_rows import append  # noqa: E402

from tunescope.errors import UserError  # noqa: E402
from tunescope.gpus import list_gpus  # noqa: E402
from tunescope.kernels.causal_conv import causal_conv1d_silu  # noqa: E402
from tunescope.kernels.rms_norm import add_rms_norm  # noqa: E402
from tunescope.measure.environment import cpu_name, git_revision, package_versions  # noqa: E402

CSV = Path(__file__).with_name("scan_and_conv.csv")
COLUMNS = (
    "op", "direction", "implementation", "dtype", "batch", "length", "channels", "state", "num_repeats", "median_us",
    "p20_us", "p80_us", "timed", "host_us", "bytes_moved", "bytes_per_s", "copy_bytes_per_s", "fraction_of_copy",
    "ratio_to_mamba_ssm", "host_ratio_to_mamba_ssm",
    "device", "driver", "power_limit_w", "torch", "triton", "mamba_ssm", "causal_conv1d", "commit", "date",
)  # fmt: skip
SHOWN = (
    "op", "direction", "implementation", "dtype", "batch", "length", "timed", "median_us", "host_us",
    "fraction_of_copy", "ratio_to_mamba_ssm", "host_ratio_to_mamba_ssm",
)  # fmt: skip
OPS = ("scan", "conv", "add_rms_norm")
DIRECTIONS = ("forward", "backward", "both")
MAMBA_SSM, COMPILED, REFERENCE = "mamba-ssm", "reference-compiled", "reference"
# mamba-ssm first: the others' rows are to hold their ratio to it.
IMPLEMENTATIONS = (MAMBA_SSM, "triton", REFERENCE)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TAPS = 4
FLUSHED_BYTES = 2**30
MIN_REPEATS, MAX_REPEATS, ENOUGH_S = 10, 200, 0.3
MAX_HOST_REPEATS = 50
PROBE_LENGTH = 16  # the reference runs on so many steps first, to tell what it will take

# E channels, B sequences, L time steps, N states, R rank of the step sizes, W taps


@dataclass(frozen=True)
class Case:
    """One op on one shape. run: (implementation, inputs) -> outputs. kept: what backward must read, but for dy.

    is_stepwise: the reference launches kernels for each step of time.
    """

    inputs: list[Tensor]
    run: Callable[..., list[Tensor]]
    upstream: list[Tensor]
    kept: list[Tensor]
    is_stepwise: bool = False

    def bytes_moved(self, direction: str) -> int:
        forward = num_bytes(self.inputs) + num_bytes(self.upstream)  # the outputs are of their gradients' sizes
        backward = num_bytes(self.kept) + num_bytes(self.upstream) + num_bytes(self.inputs)
        return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


def num_bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def scan_case(batch: int, length: int, channels: int, state: int, dtype: torch.dtype, device: str) -> Case:
    """Strides as in the model: z is half of one product's output, B and C are rows of another's."""
    from tunescope.kernels.selective_scan import selective_scan

    torch.manual_seed(0)
    like = {"device": device, "dtype": dtype}
    rank = math.ceil(channels / 32)
    c_EBL, delta_EBL = (torch.randn(channels, batch, length, **like) for _ in range(2))
    z_EBL = torch.randn(2 * channels, batch, length, **like)[channels:]
    _, B_NBL, C_NBL = torch.randn(rank + 2 * state, batch, length, **like).split([rank, state, state])
    A_EN = -torch.arange(1.0, state + 1, device=device).expand(channels, -1).contiguous()
    D_E, bias_E = torch.ones(channels, **like), torch.full((channels,), -4.0, **like)  # softplus(-4) = 0.018
    inputs = [tensor.requires_grad_() for tensor in (c_EBL, delta_EBL, A_EN, B_NBL, C_NBL, D_E, z_EBL, bias_E)]

    def run(implementation: str, *inputs: Tensor) -> list[Tensor]:
        return [selective_scan(*inputs, implementation=implementation)]

    return Case(inputs, run, [torch.randn(channels, batch, length, **like)], inputs, is_stepwise=True)


def conv_case(batch: int, length: int, channels: int, state: int, dtype: torch.dtype, device: str) -> Case:
    torch.manual_seed(0)
    like = {"device": device, "dtype": dtype}
    x_EBL = torch.randn(2 * channels, batch, length, **like)[:channels]
    inputs = [x_EBL, torch.randn(channels, TAPS, **like), torch.randn(channels, **like)]

    def run(implementation: str, *inputs: Tensor) -> list[Tensor]:
        return [causal_conv1d_silu(*inputs, implementation=implementation)]

    inputs = [tensor.requires_grad_() for tensor in inputs]
    return Case(inputs, run, [torch.randn(channels, batch, length, **like)], inputs)


def norm_case(batch: int, length: int, channels: int, state: int, dtype: torch.dtype, device: str) -> Case:
    torch.manual_seed(0)
    shape = batch, length, channels
    hidden, weight = (torch.randn(size, device=device, dtype=dtype) for size in (shape, channels))
    residual, dresidual_out = (torch.randn(shape, device=device) for _ in range(2))

    def run(implementation: str, *inputs: Tensor) -> list[Tensor]:
        hidden, residual, weight = inputs
        return list(add_rms_norm(hidden, residual, weight, 1e-5, implementation=implementation))

    inputs = [tensor.requires_grad_() for tensor in (hidden, residual, weight)]
    dnormed = torch.randn_like(hidden).detach()
    return Case(inputs, run, [dnormed, dresidual_out], kept=[dresidual_out, weight])  # residual_out is of that size


CASES = {"scan": scan_case, "conv": conv_case, "add_rms_norm": norm_case}


def call_of(case: Case, direction: str, implementation: str) -> Callable[[], Any]:
    """What to time. That of backward holds one forward's graph."""
    run = case.run
    if implementation == COMPILED:
        implementation, run = REFERENCE, compiled(case.run)

    def forward() -> list[Tensor]:
        return run(implementation, *case.inputs)

    def backward(outputs: list[Tensor], keep: bool) -> None:
        torch.autograd.grad(outputs, case.inputs, case.upstream, retain_graph=keep)

    if direction == "forward":
        return forward
    if direction == "backward":
        return partial(backward, forward(), True)
    return lambda: backward(forward(), False)


@cache
def compiled(run: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    torch.compiler.reset()  # else it gives up after eight shapes, and runs the rest as they are
    functorch_config.donated_buffer = False  # else no compiled graph can go backward twice
    return torch.compile(run, dynamic=False)


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """A replay of what the call launches, in the memory it had. The call has run before, on the current stream.

    Capturing needs a stream that is not the default one, and for backward the one that forward ran on.
    Raises what the call or CUDA raises where it cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        call()
    return graph.replay


class Timer:
    """Durations (us) of calls on the device, or on a CPU of the host."""

    def __init__(self, device: str) -> None:
        self._flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device) if device == "cuda" else None

    def times_us(self, call: Callable[[], Any]) -> list[float]:
        """One call to warm up, one to see how many repeats are enough."""
        call()
        first_us = self._repeat(call, 1)[0]
        num_repeats = min(max(int(ENOUGH_S * 1e6 / max(first_us, 1)), MIN_REPEATS), MAX_REPEATS)
        return self._repeat(call, num_repeats)

    def graph_times_us(self, call: Callable[[], Any]) -> tuple[list[float], str]:
        """The same of the call's graph, and how it was timed: graph, or eager where there cannot be one."""
        if self._flushed is None:
            return self.times_us(call), "eager"
        call()
        torch.cuda.synchronize()
        try:
            replay = captured(call)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            print(f"timed without a graph: {str(error).splitlines()[0]}", file=sys.stderr)
            return self.times_us(call), "eager"
        return self.times_us(replay), "graph"

    def host_us(self, call: Callable[[], Any], num_repeats: int) -> float:
        times_us = []
        for _ in range(num_repeats):
            if self._flushed is not None:
                torch.cuda.synchronize()
            start_s = time.perf_counter()
            call()
            times_us.append((time.perf_counter() - start_s) * 1e6)
        return statistics.median(times_us)

    def once_s(self, call: Callable[[], Any]) -> float:
        return self._repeat(call, 1)[0] / 1e6

    def _repeat(self, call: Callable[[], Any], num_repeats: int) -> list[float]:
        if self._flushed is None:
            marks_s = [time.perf_counter()]
            for _ in range(num_repeats):
                call()
                marks_s.append(time.perf_counter())
            return [(end - start) * 1e6 for start, end in itertools.pairwise(marks_s)]
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(num_repeats)]
        for start, end in events:
            self._flushed.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e3 for start, end in events]


def copy_bytes_per_s(timer: Timer, moved: int, device: str) -> float:
    source = torch.ones(max(moved // 2, 1), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times_us, _ = timer.graph_times_us(lambda: target.copy_(source))
    return 2 * source.numel() / (statistics.median(times_us) / 1e6)


def why_skipped(timer: Timer, make: Callable[[int], Case], implementation: str, length: int, limit_s: float) -> str:
    """Empty where an implementation can be timed: it is there, and the reference does not take too long."""
    probe_length = min(PROBE_LENGTH, length)
    try:
        step = call_of(make(probe_length), "both", implementation)
        step()
    except UserError as error:
        return f"{error.what}: {error.cause}"
    if implementation == REFERENCE:
        expected_s = timer.once_s(step) * length / probe_length
        if expected_s > limit_s:
            return f"one forward and backward would take {expected_s:.1f} s (--reference-seconds {limit_s:g})"
    return ""


def measure(
    timer: Timer, make: Callable[[int], Case], length: int, implementations: list[str], limit_s: float, device: str
) -> Iterator[dict[str, Any]]:
    """Rows of one op on one shape, without what is the same for all shapes."""
    mamba_ssm_us: dict[str, tuple[float, float]] = {}
    case = make(length)
    copies = {direction: copy_bytes_per_s(timer, case.bytes_moved(direction), device) for direction in DIRECTIONS}
    for implementation in implementations:
        reason = why_skipped(timer, make, implementation, length, limit_s)
        if reason:
            print(f"{implementation} left out: {reason}", file=sys.stderr)
            continue
        try:
            for direction in DIRECTIONS:
                call = call_of(case, direction, implementation)
                if case.is_stepwise and implementation == REFERENCE:
                    times_us, timed = timer.times_us(call), "eager"
                else:
                    times_us, timed = timer.graph_times_us(call)
                median_us = statistics.median(times_us)
                host_us = timer.host_us(call, min(len(times_us), MAX_HOST_REPEATS))
                p20_us, p80_us = (statistics.quantiles(times_us, n=5)[at] for at in (0, 3))
                if implementation == MAMBA_SSM:
                    mamba_ssm_us[direction] = median_us, host_us
                moved = case.bytes_moved(direction)
                bytes_per_s = moved / (median_us / 1e6)
                theirs_us = mamba_ssm_us.get(direction)
                ratio, host_ratio = (
                    ("", "")
                    if theirs_us is None
                    else (f"{median_us / theirs_us[0]:.3f}", f"{host_us / theirs_us[1]:.3f}")
                )
                yield {
                    "direction": direction,
                    "implementation": implementation,
                    "num_repeats": len(times_us),
                    "median_us": f"{median_us:.2f}",
                    "p20_us": f"{p20_us:.2f}",
                    "p80_us": f"{p80_us:.2f}",
                    "timed": timed,
                    "host_us": f"{host_us:.2f}",
                    "bytes_moved": moved,
                    "bytes_per_s": f"{bytes_per_s:.4g}",
                    "copy_bytes_per_s": f"{copies[direction]:.4g}",
                    "fraction_of_copy": f"{bytes_per_s / copies[direction]:.3f}",
                    "ratio_to_mamba_ssm": ratio,
                    "host_ratio_to_mamba_ssm": host_ratio,
                }
        except torch.OutOfMemoryError:
            print(f"{implementation} left out: out of GPU memory", file=sys.stderr)


def conditions(on_gpu: bool) -> dict[str, Any]:
    versions = package_versions()
    gpu = list_gpus().gpus[0] if on_gpu else None
    return {
        "device": cpu_name() if gpu is None else gpu.name,
        "driver": "" if gpu is None else gpu.driver_version,
        "power_limit_w": "" if gpu is None else gpu.power_limit_w,
        **{name.replace("-", "_"): versions[name] or "" for name in ("torch", "triton", "mamba-ssm", "causal-conv1d")},
        "commit": git_revision(),
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 30, 84])
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 512, 2048])
    parser.add_argument("--channels", type=int, default=2944)
    parser.add_argument("--state", type=int, default=16)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["bf16"])
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS)
    parser.add_argument("--compile", action="store_true", help="also torch.compile of the references but the scan's")
    parser.add_argument("--reference-seconds", type=float, default=2.0, help="longest call of a reference to time")
    parser.add_argument("--quick", action="store_true", help="tiny shapes; the reference alone where there is no GPU")
    parser.add_argument("--out", type=Path, default=CSV)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.quick:
        options.batches, options.lengths, options.channels, options.state = [1, 2], [8], 32, 4
    elif device == "cpu":
        parser.error("no GPU was found; --quick runs without one")
    if device == "cpu":
        options.implementations = [REFERENCE]

    timer = Timer(device)
    same = conditions(device == "cuda")
    if device == "cuda":  # everything on one stream that can be captured
        torch.cuda.set_stream(torch.cuda.Stream())
    for op, dtype, batch, length in itertools.product(options.ops, options.dtypes, options.batches, options.lengths):
        channels = options.channels // 2 if op == "add_rms_norm" else options.channels

        def make(
            num_steps: int, op: str = op, dtype: str = dtype, batch: int = batch, channels: int = channels
        ) -> Case:
            return CASES[op](batch, num_steps, channels, options.state, DTYPES[dtype], device)

        implementations = [
            name
            for name in IMPLEMENTATIONS
            if name in options.implementations and (op, name) != ("add_rms_norm", MAMBA_SSM)
        ]
        if options.compile and op != "scan":  # its thousands of steps would be compiled one by one
            implementations.append(COMPILED)
        shape = {"op": op, "dtype": dtype, "batch": batch, "length": length, "channels": channels}
        shape["state"] = options.state if op == "scan" else ""
        for row in measure(timer, make, length, implementations, options.reference_seconds, device):
            append(options.out, COLUMNS, shape | row | same)
            print({key: (shape | row)[key] for key in SHOWN}, flush=True)


if __name__ == "__main__":
    main()
