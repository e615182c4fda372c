"""Faults on purpose, for the tests: TUNESCOPE_FAULT=STAGE:ACTION[:POINT_ID_PREFIX[:BATCH_SIZES]][;...].

Stages: start, step (the fourth), writing (a point's process); publish, table (the launcher). Actions: oom, disk-full,
error, kill, hang. Batch sizes: 6+ or 5,7. Without the variable nothing here does anything.
"""

import errno
import os
import signal
import sys
import time
from typing import Any

VARIABLE = "TUNESCOPE_FAULT"
FAULT_STEP = 4


def fault(stage: str, point_id: str = "", batch_size: int = 0) -> None:
    """Raises, kills this process or hangs if the variable asks for it at this stage of this point."""
    for wanted in os.environ.get(VARIABLE, "").split(";"):
        wanted_stage, action, prefix, sizes = [*wanted.split(":"), "", "", ""][:4]
        if wanted_stage == stage and point_id.startswith(prefix) and _is_among(batch_size, sizes):
            _act(action, stage)


def _is_among(batch_size: int, sizes: str) -> bool:
    if sizes.endswith("+"):
        return batch_size >= int(sizes[:-1])
    return not sizes or str(batch_size) in sizes.split(",")


def _act(action: str, stage: str) -> None:
    if action == "oom":
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory (injected)")
    if action == "disk-full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if action == "error":
        raise RuntimeError("injected error")
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "hang":
        print(f"fault: hanging at {stage}", file=sys.stderr, flush=True)  # a test waits for this line
        time.sleep(3600)


def fault_callback(point_id: str, batch_size: int = 0) -> Any:
    """A Trainer callback for the stage `step`."""
    from transformers import TrainerCallback

    class FaultCallback(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == FAULT_STEP:
                fault("step", point_id, batch_size)

    return FaultCallback()
