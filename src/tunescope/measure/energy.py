"""GPU energy of a stretch of training, by the Zeus package where the GPU reports it."""

from typing import Any


class EnergyMeter:
    """One window over many steps. `why_not` says why there is no figure, where there is none."""

    _WINDOW = "timed steps"

    def __init__(self, *, use_gpu: bool) -> None:
        self.why_not: str | None = None
        self._monitor: Any = None
        self._is_open = False
        if not use_gpu:
            self.why_not = "no GPU"
            return
        try:
            from zeus.monitor import ZeusMonitor

            # No CPUs: Zeus would start a process to watch their counters, which a point's process may not do.
            self._monitor = ZeusMonitor(gpu_indices=[0], cpu_indices=[], approx_instant_energy=False)
        except Exception as error:  # Zeus raises a type of its own for each way a GPU may refuse
            self.why_not = f"Zeus: {type(error).__name__}: {' '.join(str(error).split())}"[:200]

    def start(self) -> None:
        """Opens the window. The caller has made the GPU idle: Zeus's own synchronise is off."""
        if self._monitor is None:
            return
        try:
            self._monitor.begin_window(self._WINDOW, sync_execution=False)
            self._is_open = True
        except Exception as error:
            self._give_up(error)

    def stop_j(self) -> float | None:
        """Closes the window. Joules of this GPU since start(), None where it was never opened or reads 0."""
        if not self._is_open:
            return None
        self._is_open = False
        try:
            energy_j = self._monitor.end_window(self._WINDOW, sync_execution=False).total_energy
        except Exception as error:
            self._give_up(error)
            return None
        if energy_j <= 0:  # shorter than the counter's update: no reading, not zero joules
            self.why_not = "the energy counter did not advance in the window"
            return None
        return float(energy_j)

    def _give_up(self, error: Exception) -> None:
        self._monitor = None
        self.why_not = f"Zeus: {type(error).__name__}: {' '.join(str(error).split())}"[:200]
