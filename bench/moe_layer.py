"""BlackMamba's MoE layer, forward and backward: grouped matmuls against the loop over experts, on one GPU.

    python3 bench/moe_layer.py                 # the 2.8B model's layer in bf16; appends rows to bench/moe_layer.csv
    python3 bench/moe_layer.py --tiny          # preset tiny's on a CPU, to see that it works

Random weights and tokens of length 128 a query, as in the paper's breakdowns. Both ways run on the same weights and
tokens in turn; a time is the median of rounds, each the mean of as many calls as fit into a few tenths of a second.
launches: kernels of one forward and backward. Memory is what PyTorch allocated at the peak beyond weights and input.
"""

import argparse
import datetime
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from csv_rows import append  # noqa: E402

from tunescope.families.blackmamba import BLACKMAMBA_2_8B, BLACKMAMBA_TINY  # noqa: E402
from tunescope.families.family import GROUPED, LOOP  # noqa: E402
from tunescope.measure.environment import cpu_name, git_revision, package_versions  # noqa: E402
from tunescope.models.blackmamba.configuration import BlackMambaConfig  # noqa: E402
from tunescope.models.blackmamba.moe import BlackMambaMoe  # noqa: E402

CSV = Path(__file__).with_name("moe_layer.csv")
LENGTH_TOKENS = 128
BATCHES = {2: (1, 6, 20, 30, 84), 8: (1, 6, 30)}  # top_k -> queries
COLUMNS = (
    "implementation", "batch", "top_k", "length_tokens", "hidden", "expert_width", "experts", "dtype", "median_us",
    "low_us", "high_us", "launches", "peak_bytes", "loop_over_this", "device", "torch", "triton", "commit", "date",
)  # fmt: skip
ROUNDS, ROUND_S = 7, 0.2


def layer_of(config: dict[str, Any], top_k: int, implementation: str, dtype: torch.dtype, device: str) -> BlackMambaMoe:
    torch.manual_seed(0)
    changes = {"num_experts_per_tok": top_k, "moe": implementation}
    layer = BlackMambaMoe(BlackMambaConfig(**config | changes))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return layer.to(device, dtype)


def step_of(layer: BlackMambaMoe, batch: int, width: int, dtype: torch.dtype, device: str) -> Callable[[], None]:
    """One forward and backward; gradients are dropped, as optimizers do before a step."""
    torch.manual_seed(1)
    hidden = torch.randn(batch, LENGTH_TOKENS, width, device=device, dtype=dtype, requires_grad=True)
    upstream = torch.randn_like(hidden)

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        hidden.grad = None
        layer(hidden).backward(upstream)

    return step


def timed_us(step: Callable[[], None], calls: int, synchronize: Callable[[], None]) -> float:
    synchronize()
    start_s = time.perf_counter()
    for _ in range(calls):
        step()
    synchronize()
    return (time.perf_counter() - start_s) / calls * 1e6


def num_launches(step: Callable[[], None]) -> int:
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    return sum(event.count for event in recorded.key_averages() if event.self_device_time_total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=CSV)
    options = parser.parse_args()
    on_gpu = not options.tiny
    if on_gpu and not torch.cuda.is_available():
        parser.error("no GPU was found; --tiny runs without one")
    config = BLACKMAMBA_2_8B if on_gpu else BLACKMAMBA_TINY
    dtype, device = (torch.bfloat16, "cuda") if on_gpu else (torch.float32, "cpu")
    batches = BATCHES if on_gpu else {2: (1,), 8: (1,)}
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    versions = package_versions()
    rows = []
    for top_k, sizes in batches.items():
        for batch in sizes:
            steps = {}
            for implementation in (LOOP, GROUPED):
                layer = layer_of(config, top_k, implementation, dtype, device)
                steps[implementation] = step_of(layer, batch, config["hidden_size"], dtype, device)
            peaks, launches = {}, {}
            for name, step in steps.items():
                for _ in range(3):
                    step()
                peaks[name] = launches[name] = ""
                if on_gpu:
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                    step()
                    peaks[name] = torch.cuda.max_memory_allocated() - before
                    launches[name] = num_launches(step)
            calls = {
                name: max(1, int(ROUND_S / (timed_us(step, 1, synchronize) / 1e6))) for name, step in steps.items()
            }
            times: dict[str, list[float]] = {name: [] for name in steps}
            for _ in range(ROUNDS):
                for name, step in steps.items():
                    times[name].append(timed_us(step, calls[name], synchronize))
            for name in steps:
                rows.append(
                    {
                        "implementation": name,
                        "batch": batch,
                        "top_k": top_k,
                        "length_tokens": LENGTH_TOKENS,
                        "hidden": config["hidden_size"],
                        "expert_width": config["intermediate_size"],
                        "experts": config["num_local_experts"],
                        "dtype": str(dtype).removeprefix("torch."),
                        "median_us": f"{statistics.median(times[name]):.1f}",
                        "low_us": f"{min(times[name]):.1f}",
                        "high_us": f"{max(times[name]):.1f}",
                        "launches": launches[name],
                        "peak_bytes": peaks[name],
                        "loop_over_this": f"{statistics.median(times[LOOP]) / statistics.median(times[name]):.3f}",
                        "device": torch.cuda.get_device_name() if on_gpu else cpu_name(),
                        **{package: versions[package] for package in ("torch", "triton")},
                        "commit": git_revision(),
                        "date": datetime.date.today().isoformat(),
                    }
                )
                print({key: rows[-1][key] for key in COLUMNS[:4] + COLUMNS[8:14]}, flush=True)
    append(options.out, COLUMNS, *rows)


if __name__ == "__main__":
    main()
