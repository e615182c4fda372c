"""The inventory of GPUs, over a stand-in for NVML: no driver is needed here."""

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tunescope.gpus import GpuInventory, driver_is_too_old, list_gpus

H200_UUID = "GPU-1a2b3c4d-0000-0000-0000-000000000000"
A40_UUID = "GPU-1affffff-0000-0000-0000-000000000001"
MIG_UUID = "MIG-7d0e4c2a-0000-0000-0000-000000000002"


@dataclass
class FakeGpu:
    """What the stand-in answers about one GPU; a slice names its board as parent."""

    uuid: str
    name: str
    memory_gib: int
    mig_mode: int | None = None
    parent: "FakeGpu | None" = None
    is_lost: bool = False


class FakeNvml(ModuleType):
    """The part of pynvml that is used, with its error classes and its units (mW, bytes, MHz)."""

    NVML_CLOCK_SM = 1
    NVML_CLOCK_MEM = 2

    class NVMLError(Exception):
        pass

    def __getattr__(self, name: str) -> type[Exception]:
        """An error class by its name, the same each time: NVMLError_NotSupported and the like."""
        if not name.startswith("NVMLError_"):
            raise AttributeError(name)
        error_class = type(name, (self.NVMLError,), {})
        setattr(self, name, error_class)
        return error_class

    def __init__(self, gpus: list[FakeGpu], slices: list[FakeGpu] | None = None) -> None:
        super().__init__("pynvml")
        self.gpus, self.slices = gpus, slices or []
        self.init_error: Exception | None = None
        self.is_open = False

    def nvmlInit(self) -> None:
        if self.init_error is not None:
            raise self.init_error
        self.is_open = True

    def nvmlShutdown(self) -> None:
        assert self.is_open
        self.is_open = False

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.65.06"

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> FakeGpu:
        for gpu in self.gpus + self.slices:
            if gpu.uuid == uuid:
                return gpu
        raise self.NVMLError_NotFound("Not Found")

    def nvmlDeviceGetIndex(self, gpu: FakeGpu) -> int:
        return self.gpus.index(gpu)

    def nvmlDeviceGetUUID(self, gpu: FakeGpu) -> str:
        return gpu.uuid

    def nvmlDeviceGetName(self, gpu: FakeGpu) -> str:
        return gpu.name

    def nvmlDeviceGetMemoryInfo(self, gpu: FakeGpu) -> Any:
        if gpu.is_lost:
            raise self.NVMLError_GpuIsLost("GPU is lost")
        total_bytes = gpu.memory_gib * 2**30
        return SimpleNamespace(total=total_bytes, free=total_bytes - 2**30, used=2**30)

    def nvmlDeviceGetCudaComputeCapability(self, gpu: FakeGpu) -> tuple[int, int]:
        assert gpu.parent is None  # NVML answers for boards only
        return (9, 0)

    def nvmlDeviceIsMigDeviceHandle(self, gpu: FakeGpu) -> int:
        return int(gpu.parent is not None)

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, gpu: FakeGpu) -> "FakeGpu | None":
        return gpu.parent

    def nvmlDeviceGetEnforcedPowerLimit(self, gpu: FakeGpu) -> int:
        return 650_000

    def nvmlDeviceGetPowerManagementDefaultLimit(self, gpu: FakeGpu) -> int:
        return 700_000

    def nvmlDeviceGetMaxClockInfo(self, gpu: FakeGpu, clock: int) -> int:
        return {self.NVML_CLOCK_SM: 1980, self.NVML_CLOCK_MEM: 3201}[clock]

    def nvmlDeviceGetEccMode(self, gpu: FakeGpu) -> list[int]:
        return [1, 0]

    def nvmlDeviceGetPersistenceMode(self, gpu: FakeGpu) -> int:
        return 1

    def nvmlDeviceGetPciInfo(self, gpu: FakeGpu) -> Any:
        return SimpleNamespace(busId="00000000:0F:00.0")

    def nvmlDeviceGetMigMode(self, gpu: FakeGpu) -> list[int]:
        if gpu.mig_mode is None:
            raise self.NVMLError_NotSupported("Not Supported")
        return [gpu.mig_mode, gpu.mig_mode]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    h200 = FakeGpu(H200_UUID, "NVIDIA H200", 140, mig_mode=0)
    fake = FakeNvml([h200, FakeGpu(A40_UUID, "NVIDIA A40", 45)])
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def visible_names(cuda_visible_devices: str | None) -> list[str]:
    environ = {} if cuda_visible_devices is None else {"CUDA_VISIBLE_DEVICES": cuda_visible_devices}
    return [gpu.name for gpu in list_gpus(environ).gpus]


def test_two_gpus_with_units_converted(nvml: FakeNvml) -> None:
    inventory = list_gpus({})
    assert inventory.problem is None
    h200, a40 = inventory.gpus
    assert (h200.index, h200.uuid, h200.name) == (0, H200_UUID, "NVIDIA H200")
    assert h200.memory_total_bytes == 140 * 2**30
    assert h200.memory_free_bytes == 139 * 2**30
    assert (h200.power_limit_w, h200.power_limit_default_w) == (650, 700)
    assert (h200.max_sm_clock_mhz, h200.max_memory_clock_mhz) == (1980, 3201)
    assert h200.ecc_enabled is True
    assert h200.driver_version == "580.65.06"
    assert (a40.index, a40.mig_enabled) == (1, False)  # an A40 cannot say: it has no MIG
    assert not nvml.is_open


def test_no_driver_is_a_fact_and_no_problem(nvml: FakeNvml) -> None:
    nvml.init_error = nvml.NVMLError_LibraryNotFound("NVML Shared Library Not Found")
    assert list_gpus({}) == GpuInventory((), None)


def test_no_gpu(nvml: FakeNvml) -> None:
    nvml.gpus = []
    assert list_gpus({}) == GpuInventory((), None)


@pytest.mark.parametrize(
    ("error", "cure"),
    [
        ("DriverNotLoaded", "modprobe"),
        ("LibRmVersionMismatch", "reboot"),
        ("NoPermission", "/dev/nvidia"),
        ("Unknown", "nvidia-smi"),
    ],
)
def test_a_broken_driver_is_a_problem_with_a_cure(nvml: FakeNvml, error: str, cure: str) -> None:
    nvml.init_error = getattr(nvml, f"NVMLError_{error}")("broken")
    inventory = list_gpus({})
    assert inventory.gpus == ()
    assert inventory.problem is not None
    assert cure in inventory.problem


def test_a_missing_package_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # import then raises ImportError
    problem = list_gpus({}).problem
    assert problem is not None
    assert "pip install nvidia-ml-py" in problem


def test_a_lost_gpu_does_not_hide_the_others(nvml: FakeNvml) -> None:
    nvml.gpus[0].is_lost = True
    inventory = list_gpus({})
    assert [gpu.name for gpu in inventory.gpus] == ["NVIDIA A40"]
    assert inventory.problem is not None
    assert "GPU 0" in inventory.problem
    assert not nvml.is_open


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (None, ["NVIDIA H200", "NVIDIA A40"]),
        ("0,1", ["NVIDIA H200", "NVIDIA A40"]),
        ("1, 0", ["NVIDIA A40", "NVIDIA H200"]),
        ("1", ["NVIDIA A40"]),
        ("", []),
        ("  ", []),
        ("-1", []),
        (A40_UUID, ["NVIDIA A40"]),
        ("GPU-1a2b", ["NVIDIA H200"]),
    ],
)
def test_visible_devices(nvml: FakeNvml, value: str | None, names: list[str]) -> None:
    assert visible_names(value) == names
    assert list_gpus({} if value is None else {"CUDA_VISIBLE_DEVICES": value}).problem is None


@pytest.mark.parametrize(
    ("value", "culprit", "names"),
    [
        ("2", "2", []),
        ("1,7,0", "7", ["NVIDIA A40"]),  # CUDA stops at the entry it does not know
        ("GPU-1a", "GPU-1a", []),  # a prefix of both
        ("GPU-99", "GPU-99", []),
        ("MIG-99", "MIG-99", []),
        ("all", "all", []),
    ],
)
def test_visible_devices_that_name_nothing(nvml: FakeNvml, value: str, culprit: str, names: list[str]) -> None:
    inventory = list_gpus({"CUDA_VISIBLE_DEVICES": value})
    assert [gpu.name for gpu in inventory.gpus] == names
    assert inventory.problem is not None
    assert f"{culprit!r} names none" in inventory.problem


def test_the_environment_is_read_when_asked(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [gpu.name for gpu in list_gpus().gpus] == ["NVIDIA A40"]


def test_mig_mode_and_a_mig_slice(nvml: FakeNvml) -> None:
    board = nvml.gpus[0]
    board.mig_mode = 1
    nvml.slices = [FakeGpu(MIG_UUID, "NVIDIA H200 MIG 1g.18gb", 16, parent=board)]
    assert list_gpus({}).gpus[0].mig_enabled
    (part,) = list_gpus({"CUDA_VISIBLE_DEVICES": MIG_UUID}).gpus
    assert part.mig_enabled
    assert part.name == "NVIDIA H200 MIG 1g.18gb"
    assert part.uuid == MIG_UUID
    assert part.memory_total_bytes == 16 * 2**30
    assert part.index == 0  # the board's


@pytest.mark.parametrize(
    ("version", "is_too_old"),
    [
        ("580.65.06", False),
        ("580", False),
        ("595.12", False),
        ("1000.1", False),
        ("579.99.99", True),
        ("570.124.06", True),
        ("99.1", True),
    ],
)
def test_driver_age(version: str, is_too_old: bool) -> None:
    assert driver_is_too_old(version) is is_too_old


def test_a_driver_version_without_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown"):
        driver_is_too_old("unknown")
