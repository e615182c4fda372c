"""The GPUs of this machine, read through NVML: no CUDA context, no torch, safe before a fork.

NVML numbers GPUs by PCI bus. CUDA does so only under CUDA_DEVICE_ORDER=PCI_BUS_ID, which this
module assumes (and tunescope's launchers set): under CUDA's own default, fastest first, an index
in CUDA_VISIBLE_DEVICES may mean another GPU on a machine with unlike ones. UUIDs are never
ambiguous.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# CUDA Toolkit 13.0 release notes, "Minimum Required Driver Version for CUDA Minor Version
# Compatibility": CUDA 13.x needs 580 or newer. On an older driver such a torch sees no GPU.
MIN_DRIVER_CUDA13: tuple[int, ...] = (580,)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU as its driver describes it now; None where this GPU or driver does not say.

    index: NVML's, by PCI bus. memory_free_bytes: free at the moment of asking, whoever uses the
    rest. power_limit_w: enforced now; power_limit_default_w: as shipped. clocks: highest allowed.
    """

    index: int
    uuid: str
    name: str
    memory_total_bytes: int
    memory_free_bytes: int
    driver_version: str
    compute_capability: tuple[int, int]
    pci_bus_id: str | None
    power_limit_w: float | None
    power_limit_default_w: float | None
    max_sm_clock_mhz: int | None
    max_memory_clock_mhz: int | None
    ecc_enabled: bool | None
    persistence_enabled: bool | None
    mig_enabled: bool
    is_mig_slice: bool


@dataclass(frozen=True)
class GpuInventory:
    """The GPUs this process may use, in CUDA's order, and what stood in the way of listing them.

    No GPU and no problem: the machine has no NVIDIA driver, or CUDA_VISIBLE_DEVICES is empty.
    problem: one line with its cure, for `tunescope doctor` to print.
    """

    gpus: tuple[Gpu, ...] = ()
    problem: str | None = None


def list_gpus(environ: Mapping[str, str] = os.environ) -> GpuInventory:
    """What CUDA_VISIBLE_DEVICES leaves of this machine's GPUs. Never raises for a broken driver."""
    try:
        import pynvml
    except ImportError:
        return GpuInventory(
            problem="GPUs cannot be listed: the package nvidia-ml-py is missing; "
            "install it with `pip install nvidia-ml-py`."
        )
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound:
        return GpuInventory()  # no NVIDIA driver on this machine: a fact, not a fault
    except pynvml.NVMLError as error:
        return GpuInventory(problem=_init_problem(pynvml, error))
    try:
        return _visible(pynvml, environ.get("CUDA_VISIBLE_DEVICES"))
    except pynvml.NVMLError as error:
        return GpuInventory(problem=f"NVML failed while listing the GPUs: {error}.")
    finally:
        pynvml.nvmlShutdown()


def show_only(gpu: Gpu | None) -> None:
    """Shows one GPU, or none, to CUDA in this process and those started from here on. Call before CUDA starts."""
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # so that the index means NVML's GPU and not the fastest
    # By index, which Zeus needs; a MIG slice has none of its own and goes by its UUID.
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if gpu is None else gpu.uuid if gpu.is_mig_slice else str(gpu.index)


def driver_is_too_old(version: str) -> bool:
    """Whether a driver ("580.65.06", as NVML reports it) cannot run a CUDA 13 build of torch.

    Raises ValueError if the version does not begin with a number.
    """
    match = re.match(r"\d+(\.\d+)*", version)
    if match is None:
        raise ValueError(f"driver version {version!r} does not begin with a number")
    return tuple(int(part) for part in match.group().split(".")) < MIN_DRIVER_CUDA13


def _init_problem(pynvml: Any, error: Exception) -> str:
    if isinstance(error, pynvml.NVMLError_DriverNotLoaded):
        return (
            "The NVIDIA driver is installed but not loaded: load it with `modprobe nvidia`, or "
            "start the container with its GPUs (`docker run --gpus all`)."
        )
    if isinstance(error, pynvml.NVMLError_LibRmVersionMismatch):
        return (
            "The NVIDIA driver's library and kernel module are of different versions, as after "
            "an update: reboot, or reload the module."
        )
    if isinstance(error, pynvml.NVMLError_NoPermission):
        return "The NVIDIA driver refuses this user: ask for access to /dev/nvidia*."
    return f"The NVIDIA driver does not answer ({error}): check that `nvidia-smi` works."


def _visible(pynvml: Any, wanted: str | None) -> GpuInventory:
    """The GPUs that CUDA would show. Like CUDA, stop at the first entry that names none."""
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    problem = None
    if wanted is not None:
        entries = [entry.strip() for entry in wanted.split(",")] if wanted.strip() else []
        chosen = []
        for entry in entries:
            handle = _handle_of(pynvml, entry, handles)
            if handle is None:
                if entry != "-1":  # the usual way to ask for no GPU at all
                    problem = (
                        f"CUDA_VISIBLE_DEVICES={wanted!r}: {entry!r} names none of the "
                        f"{len(handles)} GPUs here; CUDA ignores it and everything after it."
                    )
                break
            chosen.append(handle)
        handles = chosen
    gpus = []
    for position, handle in enumerate(handles):
        try:
            gpus.append(_describe(pynvml, handle))
        except pynvml.NVMLError as error:  # one lost GPU must not hide the others
            problem = f"GPU {position} does not answer ({error}): see `nvidia-smi` and `dmesg`."
    return GpuInventory(gpus=tuple(gpus), problem=problem)


def _handle_of(pynvml: Any, entry: str, handles: list[Any]) -> Any | None:
    """The handle that one entry means: an index, a GPU UUID or its prefix, or a MIG UUID."""
    if re.fullmatch(r"\d+", entry):
        return handles[int(entry)] if int(entry) < len(handles) else None
    if entry.startswith("GPU-"):
        matches = [h for h in handles if pynvml.nvmlDeviceGetUUID(h).startswith(entry)]
        return matches[0] if len(matches) == 1 else None  # CUDA rejects an ambiguous prefix too
    if entry.startswith("MIG-"):
        try:
            return pynvml.nvmlDeviceGetHandleByUUID(entry)
        except pynvml.NVMLError:
            return None
    return None


def _describe(pynvml: Any, handle: Any) -> Gpu:
    """One GPU or MIG slice. A slice answers for its own name and memory, its board for the rest."""
    board, is_slice = handle, False
    if _ask(pynvml, pynvml.nvmlDeviceIsMigDeviceHandle, handle):
        board, is_slice = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle), True
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    limit_mw = _ask(pynvml, pynvml.nvmlDeviceGetEnforcedPowerLimit, board)
    default_limit_mw = _ask(pynvml, pynvml.nvmlDeviceGetPowerManagementDefaultLimit, board)
    ecc = _ask(pynvml, pynvml.nvmlDeviceGetEccMode, board)
    persistence = _ask(pynvml, pynvml.nvmlDeviceGetPersistenceMode, board)
    mig = _ask(pynvml, pynvml.nvmlDeviceGetMigMode, board)
    pci = _ask(pynvml, pynvml.nvmlDeviceGetPciInfo, board)
    return Gpu(
        index=pynvml.nvmlDeviceGetIndex(board),
        uuid=pynvml.nvmlDeviceGetUUID(handle),
        name=pynvml.nvmlDeviceGetName(handle),
        memory_total_bytes=int(memory.total),
        memory_free_bytes=int(memory.free),
        driver_version=pynvml.nvmlSystemGetDriverVersion(),
        compute_capability=tuple(pynvml.nvmlDeviceGetCudaComputeCapability(board)),
        pci_bus_id=None if pci is None else pci.busId,
        power_limit_w=None if limit_mw is None else limit_mw / 1000,
        power_limit_default_w=None if default_limit_mw is None else default_limit_mw / 1000,
        max_sm_clock_mhz=_ask(pynvml, pynvml.nvmlDeviceGetMaxClockInfo, board, pynvml.NVML_CLOCK_SM),
        max_memory_clock_mhz=_ask(pynvml, pynvml.nvmlDeviceGetMaxClockInfo, board, pynvml.NVML_CLOCK_MEM),
        ecc_enabled=None if ecc is None else bool(ecc[0]),  # [current, after the next reboot]
        persistence_enabled=None if persistence is None else bool(persistence),
        mig_enabled=is_slice or bool(mig and mig[0]),
        is_mig_slice=is_slice,
    )


def _ask(pynvml: Any, question: Callable[..., Any], *args: Any) -> Any | None:
    """The answer, or None where the GPU or the driver does not support the question."""
    try:
        return question(*args)
    except (
        pynvml.NVMLError_NotSupported,
        pynvml.NVMLError_FunctionNotFound,
        pynvml.NVMLError_NoPermission,
        pynvml.NVMLError_InvalidArgument,
    ):
        return None
