"""Predicted against measured peak memory of one training step, on one GPU.

    python3 bench/peak_memory.py            # appends rows to bench/peak_memory.csv

Each case trains a few steps of the real recipe, all layers, random weights and random tokens of one length, in a
process of its own; predicted is cost/memory.py from config.json and recipe alone. The peak is torch's
`max_memory_allocated` from the second step on: the optimizer's state is new in the first. checkpointing is what
the recipe says, or its opposite.
"""

import argparse
import datetime
import sys
import tempfile
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from csv_rows import append  # noqa: E402

from tunescope.cost.memory import peak  # noqa: E402
from tunescope.gpus import list_gpus, show_only  # noqa: E402
from tunescope.measure import worker  # noqa: E402
from tunescope.measure.environment import git_revision, package_versions  # noqa: E402
from tunescope.measure.plan import Options, PointSpec, make_plan  # noqa: E402
from tunescope.measure.sweep import PRELOAD  # noqa: E402
from tunescope.train.forkserver import ForkServer  # noqa: E402
from tunescope.train.workload import Workload  # noqa: E402

CSV = Path(__file__).with_name("peak_memory.csv")
COLUMNS = (
    "model", "preset", "sparsity", "batch", "length_tokens", "checkpointing", "moment", "predicted_bytes",
    "measured_bytes", "ratio", "reserved_bytes", "device", "torch", "transformers", "bitsandbytes", "commit", "date",
)  # fmt: skip
NUM_STEPS = 3


@dataclass(frozen=True)
class Case:
    model: str
    sparsity: str
    batch: int
    length_tokens: int
    is_checkpointed: bool


CASES = (
    Case("mixtral", "sparse", 1, 2048, True),
    Case("mixtral", "sparse", 8, 1024, True),
    Case("mixtral", "dense", 4, 512, True),
    Case("mixtral", "sparse", 1, 128, False),
    Case("mixtral", "sparse", 8, 256, False),
    Case("mixtral", "dense", 2, 256, False),
    Case("blackmamba", "sparse", 1, 2048, False),
    Case("blackmamba", "sparse", 32, 512, False),
    Case("blackmamba", "dense", 8, 256, False),
    Case("blackmamba", "sparse", 8, 1024, True),
    Case("blackmamba", "dense", 32, 128, True),
)


def spec_of(case: Case, preset: str) -> tuple[PointSpec, Any]:
    points = f"random:{case.sparsity}:bs={case.batch}:seq={case.length_tokens}"
    plan = make_plan(Options(model=case.model, preset=preset, points=points))
    spec = plan.specs[0]
    recipe = spec.workload.recipe | {"disable_gradient_checkpointing": not case.is_checkpointed}
    workload = replace(spec.workload, recipe=recipe, max_steps=NUM_STEPS, num_samples=NUM_STEPS * case.batch)
    return replace(spec, workload=workload), plan.gpu


def train(connection: Connection, workload: Workload, scratch: Path) -> None:
    """Sends (allocated, reserved) bytes at the peak, or the error's first line."""
    import torch
    from transformers import TrainerCallback

    from tunescope.measure.steps import peak_memory
    from tunescope.train.engine import run_workload

    class AfterFirstStep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1 and args.device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()

    try:
        run_workload(workload, scratch, [AfterFirstStep()])
    except torch.OutOfMemoryError as error:
        connection.send(("error", str(error).splitlines()[0]))
        return
    found = peak_memory(not workload.use_cpu)
    connection.send(("peak", found["peak_allocated_bytes"], found["peak_reserved_bytes"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mixtral", "blackmamba"])
    parser.add_argument("--tiny", action="store_true", help="preset tiny; without a GPU the measured columns are empty")
    parser.add_argument("--out", type=Path, default=CSV)
    options = parser.parse_args()
    gpus = list_gpus().gpus
    if not gpus and not options.tiny:
        parser.error("no GPU was found; --tiny runs without one")
    versions = package_versions()
    server = ForkServer(PRELOAD)
    for case in CASES:
        if case.model not in options.models:
            continue
        spec, gpu = spec_of(case, "tiny" if options.tiny else "full")
        show_only(gpu)
        workload = spec.workload
        # Without a GPU a point runs the reference scan, whose memory is not predicted.
        config = workload.model_config if gpu else workload.model_config | {"scan": "auto"}
        predicted = peak(config, workload.recipe, case.batch, case.length_tokens, is_masked=False)
        messages: list[Any] = []
        with tempfile.TemporaryDirectory() as folder:
            log_file = Path(folder) / "log.txt"
            end = server.run(
                train, (workload, Path(folder) / worker.SCRATCH), log_file=log_file, on_message=messages.append
            )
            if end.exit_code or not messages or messages[0][0] == "error":
                why = messages[0][1] if messages else log_file.read_text(errors="replace")[-1500:]
                print(f"{case}: {why or end.cause}", file=sys.stderr)
                continue
        _, allocated, reserved = messages[0]
        row = {
            "model": case.model,
            "preset": workload.point.preset,
            "sparsity": case.sparsity,
            "batch": case.batch,
            "length_tokens": case.length_tokens,
            "checkpointing": "on" if case.is_checkpointed else "off",
            "moment": predicted.moment,
            "predicted_bytes": predicted.num_bytes,
            "measured_bytes": allocated or "",
            "ratio": f"{predicted.num_bytes / allocated:.4f}" if allocated else "",
            "reserved_bytes": reserved or "",
            "device": gpu.name if gpu else "cpu",
            **{name: versions[name] for name in ("torch", "transformers", "bitsandbytes")},
            "commit": git_revision(),
            "date": datetime.date.today().isoformat(),
        }
        append(options.out, COLUMNS, row)
        print({key: row[key] for key in COLUMNS[:10]}, flush=True)


if __name__ == "__main__":
    main()
