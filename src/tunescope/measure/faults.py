"""Faults on purpose, for the tests: TUNESCOPE_FAULT=STAGE:ACTION[:POINT_ID_PREFIX].

Stages: start, step (the fourth), writing (a point's process); publish, table (the launcher). Actions: oom, disk-full,
error, kill, hang. Without the variable nothing here does anything.
"""

import errno
import os
import signal
import sys
import time
from typing import Any

VARIABLE = "TUNESCOPE_FAULT"
FAULT_STEP = 4


def fault(stage: str, point_id: str = "") -> None:
    """Raises, kills this process or hangs if the variable asks for it at this stage of this point."""
    wanted_stage, _, rest = os.environ.get(VARIABLE, "").partition(":")
    action, _, prefix = rest.partition(":")
    if wanted_stage != stage or not point_id.startswith(prefix):
        return
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


def fault_callback(point_id: str) -> Any:
    """A Trainer callback for the stage `step`."""
    from transformers import TrainerCallback

    class FaultCallback(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == FAULT_STEP:
                fault("step", point_id)

    return FaultCallback()
