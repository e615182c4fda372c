"""Energy of a run: from the power that measured points drew, else bounded by the board's limit. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunescope.hardware import GIB, Device, UnknownDevice, find_device

MEASURED, BOUND = "measured", "upper bound"
_NEAR_RATIO = 2  # between two batch sizes, for the power at one to stand for that at the other


@dataclass(frozen=True)
class Power:
    """Mean power of the whole GPU while it trains (W). kind: MEASURED or BOUND; source: for the reader.

    why_bound: why no measured point stands for it; empty where one does.
    """

    watts: float
    kind: str
    source: str
    why_bound: str = ""

    def energy_j(self, seconds: float) -> float:
        return self.watts * seconds


@dataclass(frozen=True)
class PowerPoint:
    """device: name in hardware.DEVICES. model_type, top_k: of config.json; None without experts. watts: mean."""

    device: str
    model_type: str
    top_k: int | None
    batch_size: int
    watts: float


def read_power(folder: Path) -> tuple[PowerPoint, ...]:
    """Of every measured point at or below `folder` that has energy and a GPU of the table; none is no fault."""
    from tunescope import results

    found = []
    for path in results.find_point_folders(folder):
        try:
            point = results.read_point(path)
            energy_j, gpu = point.outcome.get("gpu_energy_j"), point.environment.get("gpu")
            if point.steps is None or not energy_j or not gpu:
                continue
            is_timed = ~point.steps["is_warmup"].to_numpy().astype(bool)
            seconds = float(point.steps["duration_ns"].to_numpy()[is_timed].sum()) / 1e9
            config = point.point["model_config"]
            found.append(
                PowerPoint(
                    device=find_device(gpu["name"], gpu["memory_total_bytes"] / GIB).name,
                    model_type=config["model_type"],
                    top_k=config.get("num_experts_per_tok"),
                    batch_size=point.point["point"]["per_device_batch_size"],
                    watts=energy_j / seconds,
                )
            )
        except (results.PointFormatError, UnknownDevice, LookupError, TypeError, ZeroDivisionError):
            continue  # whoever reads it for its times says what is wrong with it
    return tuple(found)


def power_of(device: Device, config: Mapping[str, object], batch_size: int, points: Sequence[PowerPoint]) -> Power:
    """Of the measured points of this GPU, architecture and top_k the one nearest in batch size, if that is near; else
    the board's power, which bounds it: small batches leave a GPU idle and say nothing of large ones."""
    wanted = (device.name, config.get("model_type"), config.get("num_experts_per_tok"))
    alike = [point for point in points if (point.device, point.model_type, point.top_k) == wanted]
    near = [
        point for point in alike if batch_size / _NEAR_RATIO <= point.batch_size <= batch_size * _NEAR_RATIO
    ]  # fmt: skip
    if not near:
        board = f"board power of the {device.name} ({device.source})"
        return Power(device.board_power_w, BOUND, board, _why_bound(batch_size, points, alike))
    nearest = min(near, key=lambda point: abs(point.batch_size - batch_size))
    return Power(nearest.watts, MEASURED, f"measured on this GPU at batch {nearest.batch_size}")


def _why_bound(batch_size: int, points: Sequence[PowerPoint], alike: Sequence[PowerPoint]) -> str:
    if not points:
        return "no point has measured energy"
    if not alike:
        return "the points with measured energy are of another GPU, architecture or top_k"
    sizes = ", ".join(str(size) for size in sorted({point.batch_size for point in alike}))
    return f"energy was measured at batch {sizes}, more than twice as large or small as {batch_size}"
