"""Grouped linears over 4-bit weights: each implementation on one GPU, for few and for many rows per expert.

    python3 bench/nf4_grouped.py               # Mixtral's and Qwen3's experts, bf16; rows to bench/nf4_grouped.csv
    python3 bench/nf4_grouped.py --tune        # instead: every configuration of nf4_triton's kernels; prints the best
    python3 bench/nf4_grouped.py --quick       # tiny shapes, also without a GPU (then without the kernels)

Weights are random bytes with nested scales, as bitsandbytes keeps them, and every expert has as many rows. Times are of
the device, by CUDA graphs where a call can be captured, as bench/scan_and_conv.py says; host_us too.

direction: forward is x W^T, dx is dy W, dequantize is the weights alone. implementation: `triton` and `dequantize` are
tunescope's (dequantize: one launch, then torch's grouped matmul); `bitsandbytes-dequantize` is dequantize_4bit and a
matmul expert by expert, `bitsandbytes-gemm` its own product expert by expert; `bf16` is torch's grouped matmul of
weights that were never 4-bit; `grouped-nf4-gemm` is the package of that name, if it can be imported, given scales that
are not nested. None has adapters.
bytes_moved: packed weights, scales, rows and results, each once (dequantize: the results are the weights); of bf16 its
own weights. copy_bytes_per_s: torch's copy of as many. relative_error: to the product in fp32 by plain torch; empty
where rows are more than 512 per expert.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "bench")]

from csv_rows import append  # noqa: E402
from scan_and_conv import MAX_HOST_REPEATS, Timer, captured, conditions, copy_bytes_per_s  # noqa: E402

from tunescope.kernels import nf4_triton  # noqa: E402
from tunescope.kernels.moe import grouped_linear  # noqa: E402
from tunescope.kernels.nf4 import Nf4Stack, dequantize, grouped_linear_nf4, grouped_linear_nf4_dx  # noqa: E402
from tunescope.kernels.nf4_triton import DxConfig, ForwardConfig  # noqa: E402

CSV = Path(__file__).with_name("nf4_grouped.csv")
COLUMNS = (
    "shape", "experts", "out", "in", "direction", "implementation", "rows_per_expert", "num_repeats", "median_us",
    "p20_us", "p80_us", "timed", "host_us", "bytes_moved", "bytes_per_s", "copy_bytes_per_s", "fraction_of_copy",
    "flop_per_s", "relative_error",
    "device", "driver", "power_limit_w", "torch", "triton", "bitsandbytes", "grouped_nf4_gemm", "commit", "date",
)  # fmt: skip
SHOWN = (
    "shape", "direction", "implementation", "rows_per_expert", "median_us", "host_us", "fraction_of_copy", "flop_per_s",
    "relative_error",
)  # fmt: skip
SHAPES = {  # experts, out, in
    "mixtral-w1": (8, 14336, 4096),
    "mixtral-w2": (8, 4096, 14336),
    "qwen3-30b-gate": (128, 768, 2048),
    "qwen3-30b-down": (128, 2048, 768),
    "tiny": (4, 128, 192),
}
ROWS_PER_EXPERT = (8, 16, 32, 64, 128, 256, 512, 1024, 4096)
MAX_ROWS_CHECKED = 512
MAX_ROWS = 2**18
TUNED_ROWS_PER_EXPERT = (4, 8, 16, 32, 64, 128, 256, 512)
TUNE_REPEATS = 12
TUNE_SPREAD_FRAC = 0.5  # as a router spreads rows: a tile just large enough for the mean is too small for some
IMPLEMENTATIONS = (
    "triton", "dequantize", "bitsandbytes-dequantize", "bitsandbytes-gemm", "bf16", "grouped-nf4-gemm",
)  # fmt: skip

FORWARD_CANDIDATES = [
    ForwardConfig(block_r, block_n, unroll, scale_sums, weights_first, num_warps, num_stages, max_split)
    for block_r, block_n, unroll, scale_sums, weights_first, num_warps, num_stages in (
        (16, 64, 1, True, True, 4, 4), (16, 128, 1, True, True, 4, 3), (16, 128, 1, True, True, 4, 5),
        (16, 128, 2, True, True, 4, 3), (16, 128, 2, False, True, 4, 3), (16, 256, 1, True, True, 8, 4),
        (32, 64, 1, True, True, 4, 4), (32, 128, 1, True, True, 4, 3), (32, 128, 1, True, True, 4, 5),
        (32, 128, 1, False, True, 4, 4), (32, 128, 2, False, True, 4, 3), (32, 256, 1, True, True, 8, 4),
        (64, 128, 1, True, True, 4, 3), (64, 128, 1, True, False, 4, 3),
        (64, 128, 1, False, True, 4, 3), (64, 128, 1, False, False, 4, 4), (64, 128, 2, False, False, 4, 3),
        (64, 256, 1, False, True, 8, 3), (128, 64, 1, False, False, 4, 3), (128, 128, 1, False, True, 4, 3),
        (128, 128, 1, False, False, 4, 3), (128, 128, 1, False, True, 8, 3), (128, 128, 1, False, False, 8, 3),
        (128, 128, 2, False, False, 8, 3), (128, 256, 1, False, False, 8, 3), (128, 256, 1, False, True, 8, 3),
    )
    for max_split in (1, 4)
]  # fmt: skip
DX_CANDIDATES = [
    DxConfig(block_r, block_n, block_c, weights_first, num_warps, num_stages, max_split)
    for block_r, block_n, block_c, weights_first, num_warps, num_stages in (
        (16, 32, 2, True, 4, 4), (16, 64, 2, True, 4, 3), (16, 64, 2, True, 4, 5), (16, 64, 4, True, 8, 3),
        (32, 32, 2, True, 4, 4), (32, 64, 2, True, 4, 3), (32, 64, 2, True, 4, 5), (32, 64, 4, True, 8, 3),
        (64, 32, 2, False, 4, 4), (64, 64, 2, True, 4, 3), (64, 64, 2, False, 4, 3), (64, 64, 2, False, 4, 5),
        (64, 64, 1, False, 4, 4), (64, 32, 4, False, 4, 3), (64, 64, 4, False, 4, 3), (64, 64, 4, False, 8, 3),
        (128, 64, 2, False, 4, 3), (128, 64, 2, False, 8, 3), (128, 64, 4, False, 8, 3), (128, 32, 4, False, 8, 4),
    )
    for max_split in (1, 4)
]  # fmt: skip

# E experts, N out, K in, R rows, S scales of an expert


def random_stack(num_experts: int, num_out: int, num_in: int, device: str) -> Nf4Stack:
    """Any bytes are weights. The scales of scales are as of weights around 0.02."""
    from bitsandbytes.functional import create_dynamic_map, get_4bit_type

    blocks = num_out * num_in // 64

    def any_byte(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)

    return Nf4Stack(
        any_byte(num_experts, num_out, num_in // 2),
        any_byte(num_experts, blocks),
        0.01 + 0.01 * torch.rand(num_experts, -(-blocks // 256), device=device),
        0.05 + 0.01 * torch.rand(num_experts, device=device),
        create_dynamic_map().to(device),
        get_4bit_type("nf4", device=device),
    )


@dataclass(frozen=True)
class Case:
    """One projection and its rows: x (R, K) of forward, dy (R, N) of dx."""

    stack: Nf4Stack
    direction: str
    rows_per_expert: int
    rows: Tensor
    ends_E: Tensor

    @property
    def bytes_moved(self) -> int:
        num_experts, num_out, num_in = self.stack.shape_ENK
        stack = self.stack
        weights = [stack.packed_ENP, stack.absmax_ES, stack.absmax2_EB]
        read = sum(tensor.numel() * tensor.itemsize for tensor in weights if tensor is not None)
        if self.direction == "dequantize":
            return read + 2 * num_experts * num_out * num_in
        return read + 2 * len(self.rows) * (num_out + num_in)

    @property
    def flop(self) -> int:
        _, num_out, num_in = self.stack.shape_ENK
        return 2 * len(self.rows) * num_out * num_in


def case_of(stack: Nf4Stack, direction: str, rows_per_expert: int, spread_frac: float = 0.0) -> Case:
    """spread_frac: how far below and above rows_per_expert experts have rows, evenly; the sum stays."""
    num_experts, num_out, num_in = stack.shape_ENK
    device = stack.packed_ENP.device
    width = num_out if direction == "dx" else num_in
    rows = torch.randn(num_experts * rows_per_expert, width, device=device, dtype=torch.bfloat16)
    number = torch.arange(1, num_experts + 1, device=device, dtype=torch.float64)
    mean = 1 - spread_frac + spread_frac * number / num_experts  # of the experts so far, over that of all
    ends = (number * rows_per_expert * mean).round().to(torch.int32)
    return Case(stack, direction, rows_per_expert, rows, ends)


def bitsandbytes_experts(stack: Nf4Stack, dtype: torch.dtype) -> list[tuple[Tensor, Any]]:
    from bitsandbytes.functional import QuantState

    _, num_out, num_in = stack.shape_ENK
    experts = []
    assert stack.absmax2_EB is not None
    assert stack.offset_E is not None
    for packed, absmax, absmax2, offset in zip(
        stack.packed_ENP, stack.absmax_ES, stack.absmax2_EB, stack.offset_E, strict=True
    ):
        nested = QuantState(absmax2, code=stack.code2, blocksize=256, dtype=torch.float32)
        state = QuantState(
            absmax, torch.Size([num_out, num_in]), stack.code_16, 64, "nf4", dtype, offset=offset, state2=nested
        )
        experts.append((packed.view(-1, 1), state))
    return experts


def call_of(case: Case, implementation: str) -> Callable[[], Any] | str:
    """What to time, or why it cannot be."""
    stack, rows, ends_E = case.stack, case.rows, case.ends_E
    is_dx = case.direction == "dx"
    parts = rows.split(case.rows_per_expert) if case.rows_per_expert else ()
    if implementation in ("triton", "dequantize"):
        if case.direction == "dequantize":
            if implementation == "triton":
                return lambda: dequantize(stack, torch.bfloat16)
            return "it is what triton is"
        function = grouped_linear_nf4_dx if is_dx else grouped_linear_nf4
        return lambda: function(rows, stack, ends_E, implementation=implementation)
    if implementation == "bf16":
        if case.direction == "dequantize":
            return "nothing to dequantise"
        weight_ENK = dequantize(stack, torch.bfloat16)
        weight = weight_ENK.transpose(1, 2) if is_dx else weight_ENK
        return lambda: grouped_linear(rows, weight, ends_E)
    if implementation.startswith("bitsandbytes"):
        from bitsandbytes.functional import dequantize_4bit

        experts = bitsandbytes_experts(stack, torch.bfloat16)
        if implementation == "bitsandbytes-gemm":
            if case.direction != "forward":
                return "it has the forward product only"
            gemm = torch.ops.bitsandbytes.gemm_4bit.default
            shape = list(stack.shape_ENK[1:])
            return lambda: [
                gemm(
                    x,
                    packed,
                    shape,
                    state.state2.absmax,
                    64,
                    "nf4",
                    None,
                    state.absmax,
                    state.state2.code,
                    state.offset,
                )
                for x, (packed, state) in zip(parts, experts, strict=True)
            ]
        if case.direction == "dequantize":
            return lambda: [dequantize_4bit(*expert) for expert in experts]
        return lambda: [
            functional.linear(x, dequantize_4bit(*expert).T if is_dx else dequantize_4bit(*expert))
            for x, expert in zip(parts, experts, strict=True)
        ]
    return peer_call(case)


def peer_call(case: Case) -> Callable[[], Any] | str:
    """grouped-nf4-gemm, of MIT licence: its scales are fp32, (E, N, K / 64), and it is told the rows on the host."""
    if case.direction == "dequantize":
        return "it does not dequantise"
    try:
        from nf4_grouped import dgrad_4bit_grouped, gemm_4bit_grouped
    except ImportError as error:
        return str(error)
    from tunescope.kernels.nf4 import scales

    num_experts, num_out, num_in = case.stack.shape_ENK
    absmax_ENS = scales(case.stack).view(num_experts, num_out, num_in // 64)
    experts = torch.arange(num_experts, device=case.rows.device, dtype=torch.int32)
    sizes = [case.rows_per_expert] * num_experts
    function = dgrad_4bit_grouped if case.direction == "dx" else gemm_4bit_grouped
    return lambda: function(case.rows, case.stack.packed_ENP, absmax_ENS, sizes, experts)


def relative_error(case: Case, call: Callable[[], Any]) -> str:
    """Against the first expert's product in fp32, of weights that are not rounded to bf16."""
    if case.direction == "dequantize" or case.rows_per_expert > MAX_ROWS_CHECKED:
        return ""
    found = call()
    found = (found[0] if isinstance(found, list) else found[: case.rows_per_expert]).float()
    stack = case.stack
    assert stack.absmax2_EB is not None
    assert stack.offset_E is not None
    first = replace(
        stack, packed_ENP=stack.packed_ENP[:1], absmax_ES=stack.absmax_ES[:1], absmax2_EB=stack.absmax2_EB[:1],
        offset_E=stack.offset_E[:1],
    )  # fmt: skip
    weight_NK = dequantize(first, torch.float32, implementation="reference")[0]
    rows = case.rows[: case.rows_per_expert].float()
    expected = rows @ (weight_NK if case.direction == "dx" else weight_NK.T)
    return f"{((found - expected).norm() / expected.norm()).item():.2g}"


def measure(timer: Timer, case: Case, implementations: list[str], device: str) -> Iterator[dict[str, Any]]:
    copy = copy_bytes_per_s(timer, case.bytes_moved, device)
    for implementation in implementations:
        try:
            call = call_of(case, implementation)
            if isinstance(call, str):
                print(f"{implementation} left out of {case.direction}: {call}", file=sys.stderr)
                continue
            error = relative_error(case, call)
            times_us, timed = timer.graph_times_us(call)
            host_us = timer.host_us(call, min(len(times_us), MAX_HOST_REPEATS))
        except torch.OutOfMemoryError:
            print(f"{implementation} left out of {case.direction}: out of GPU memory", file=sys.stderr)
            continue
        median_us = statistics.median(times_us)
        p20_us, p80_us = (statistics.quantiles(times_us, n=5)[at] for at in (0, 3))
        moved = case.bytes_moved
        if implementation == "bf16":
            num_experts, num_out, num_in = case.stack.shape_ENK
            moved = 2 * (num_experts * num_out * num_in + len(case.rows) * (num_out + num_in))
        bytes_per_s = moved / (median_us / 1e6)
        yield {
            "direction": case.direction,
            "implementation": implementation,
            "rows_per_expert": case.rows_per_expert or "",
            "num_repeats": len(times_us),
            "median_us": f"{median_us:.2f}",
            "p20_us": f"{p20_us:.2f}",
            "p80_us": f"{p80_us:.2f}",
            "timed": timed,
            "host_us": f"{host_us:.2f}",
            "bytes_moved": moved,
            "bytes_per_s": f"{bytes_per_s:.4g}",
            "copy_bytes_per_s": f"{copy:.4g}",
            "fraction_of_copy": f"{bytes_per_s / copy:.3f}",
            "flop_per_s": f"{case.flop / (median_us / 1e6):.4g}" if case.rows_per_expert else "",
            "relative_error": error,
        }


def tune(timer: Timer, shapes: list[str], rows: list[int]) -> None:
    """Prints the three fastest configurations of each shape, direction and number of rows; appends nothing."""
    for shape in shapes:
        stack = random_stack(*SHAPES[shape], "cuda")
        for direction, rows_per_expert in itertools.product(("forward", "dx"), rows):
            case = case_of(stack, direction, rows_per_expert, TUNE_SPREAD_FRAC)
            name = "forward_config" if direction == "forward" else "dx_config"
            candidates: list[Any] = FORWARD_CANDIDATES if direction == "forward" else DX_CANDIDATES
            found = []
            for config in candidates:
                if not max(16, rows_per_expert // 2) <= config.block_r <= max(32, 4 * rows_per_expert) and (
                    config.block_r != 128 or rows_per_expert < 128
                ):
                    continue
                with mock.patch.object(nf4_triton, name, lambda rows, config=config: config):
                    call = call_of(case, "triton")
                    assert not isinstance(call, str)
                    try:
                        call()
                        torch.cuda.synchronize()
                        replay = captured(call)
                    except Exception as error:  # a tile too large for this GPU is a result too
                        print(f"{config}: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
                        continue
                    found.append((statistics.median(timer._repeat(replay, TUNE_REPEATS)), config))
            least_us = case.bytes_moved / 4.3e6
            for median_us, config in sorted(found, key=lambda pair: pair[0])[:3]:
                print(
                    f"{shape} {direction} {rows_per_expert:4} rows/expert {median_us:8.1f} us "
                    f"({least_us / median_us:.2f} of 4.3 TB/s) {config}",
                    flush=True,
                )
        del stack


def versions(on_gpu: bool) -> dict[str, Any]:
    from importlib import metadata

    found = {name: value for name, value in conditions(on_gpu).items() if name in COLUMNS}
    for package in ("bitsandbytes", "grouped-nf4-gemm"):
        try:
            found[package.replace("-", "_")] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package.replace("-", "_")] = ""
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", choices=list(SHAPES), default=[name for name in SHAPES if name != "tiny"]
    )
    parser.add_argument("--rows-per-expert", nargs="+", type=int)
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS)
    parser.add_argument("--tune", action="store_true", help="time configurations of the kernels; no rows are written")
    parser.add_argument("--quick", action="store_true", help="a tiny shape; without the kernels where there is no GPU")
    parser.add_argument("--out", type=Path, default=CSV)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.quick:
        options.shapes, options.rows_per_expert = ["tiny"], options.rows_per_expert or [8, 20]
    if device == "cpu":
        if options.tune or not options.quick:
            parser.error("no GPU was found; --quick runs without one, and tunes nothing")
        taken = ("dequantize", "bitsandbytes-dequantize", "bf16")
        options.implementations = [name for name in options.implementations if name in taken]
    else:  # everything on one stream that can be captured
        torch.cuda.set_stream(torch.cuda.Stream())
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    timer = Timer(device)
    if options.tune:
        tune(timer, options.shapes, options.rows_per_expert or list(TUNED_ROWS_PER_EXPERT))
        return
    same = versions(device == "cuda")
    for shape in options.shapes:
        num_experts, num_out, num_in = SHAPES[shape]
        stack = random_stack(num_experts, num_out, num_in, device)
        rows = [count for count in options.rows_per_expert or ROWS_PER_EXPERT if count * num_experts <= MAX_ROWS]
        work = [("dequantize", 0), *itertools.product(("forward", "dx"), rows)]
        for direction, rows_per_expert in work:
            case = case_of(stack, direction, rows_per_expert)
            of_shape = {"shape": shape, "experts": num_experts, "out": num_out, "in": num_in}
            for row in measure(timer, case, list(options.implementations), device):
                append(options.out, COLUMNS, of_shape | row | same)
                print({key: (of_shape | row)[key] for key in SHOWN}, flush=True)


if __name__ == "__main__":
    main()
