"""Watches the GPU once a second from the launcher's process, so that the training process never waits for it."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tunescope.gpus import Gpu

SAMPLE_INTERVAL_S = 1.0


class GpuSampler:
    """Collects rows of results.GPU_SAMPLES_SCHEMA while a point runs; empty without a GPU."""

    def __init__(self, gpu: Gpu | None) -> None:
        self._gpu = gpu
        self.rows: list[dict[str, Any]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Samples for the length of the block, in which one process of ours is on the GPU."""
        if self._gpu is None:
            yield
            return
        stop = threading.Event()
        thread = threading.Thread(target=self._watch, args=(self._gpu.uuid, stop), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(SAMPLE_INTERVAL_S * 5)

    def _watch(self, uuid: str, stop: threading.Event) -> None:
        import pynvml

        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError:
            return
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            while not stop.wait(SAMPLE_INTERVAL_S):
                self.rows.append(_sample(pynvml, handle))
        except pynvml.NVMLError:
            return  # the GPU went away: the point itself will say so
        finally:
            pynvml.nvmlShutdown()


def _sample(pynvml: Any, handle: Any) -> dict[str, Any]:
    def ask(question: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return question(handle, *arguments)
        except pynvml.NVMLError:
            return None  # not every board answers every question

    power_mw = ask(pynvml.nvmlDeviceGetPowerUsage)
    memory = ask(pynvml.nvmlDeviceGetMemoryInfo)
    processes = ask(pynvml.nvmlDeviceGetComputeRunningProcesses)
    return {
        "time_unix_ns": time.time_ns(),
        "sm_clock_mhz": ask(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_SM),
        "memory_clock_mhz": ask(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_MEM),
        "power_w": None if power_mw is None else power_mw / 1000,
        "temperature_c": ask(pynvml.nvmlDeviceGetTemperature, pynvml.NVML_TEMPERATURE_GPU),
        "throttle_reasons_bitmask": ask(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons),
        "memory_used_bytes": None if memory is None else int(memory.used),
        # All but one, not told apart by number: in a container the driver shows the host's, and none would be ours.
        "num_other_processes": None if processes is None else max(len(processes) - 1, 0),
    }
