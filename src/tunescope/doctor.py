"""`tunescope doctor`: what this machine has for the job, what is missing, and the cure beside it. No torch."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tunescope import checkpoints, presets
from tunescope.errors import UserError
from tunescope.families import FAMILIES
from tunescope.families.family import Family
from tunescope.gpus import Gpu, driver_is_too_old, list_gpus
from tunescope.hardware import GIB
from tunescope.measure.environment import STACK, cpu_name, git_revision, package_versions

# Read by the driver at boot; 1 keeps the counters for root.
_NVIDIA_PARAMETERS = Path("/proc/driver/nvidia/params")


def examine() -> Iterator[str]:
    """One finding a line, `  cure:` lines below what needs one."""
    yield f"CPU: {cpu_name()}, {len(os.sched_getaffinity(0))} cores"
    yield f"project: {git_revision() or 'not a git checkout'}"
    found = list_gpus()
    if found.problem:
        yield f"GPU: {found.problem}"
    elif not found.gpus:
        yield "GPU: none (no NVIDIA driver, or CUDA_VISIBLE_DEVICES is empty)"
    for number, gpu in enumerate(found.gpus):
        yield from _gpu(number, gpu)
    yield from _ncu(bool(found.gpus))
    yield from _checkpoints()
    yield from _packages()
    yield _disk("results", Path(__file__).resolve().parents[2] / "profile_data")
    yield _disk("Hub cache", checkpoints.hub_cache())
    for family in FAMILIES.values():
        yield _preset(family, found.gpus[0] if found.gpus else None)


def _gpu(number: int, gpu: Gpu) -> Iterator[str]:
    total_gib, free_gib = gpu.memory_total_bytes / GIB, gpu.memory_free_bytes / GIB
    limit = "unknown" if gpu.power_limit_w is None else f"{gpu.power_limit_w:.0f} W"
    yield (
        f"GPU {number}: {gpu.name}, {total_gib:.1f} GiB ({free_gib:.1f} free), driver {gpu.driver_version}, "
        f"power limit {limit}{', MIG on' if gpu.mig_enabled else ''}"
    )
    if driver_is_too_old(gpu.driver_version):
        yield "  cure: update the driver to 580 or newer; PyTorch's CUDA 13 build sees no GPU on an older one"
    try:
        from tunescope.hardware import find_device

        find_device(gpu.name, total_gib)
    except UserError as error:
        yield f"  not in the table of GPUs, so no MFU: {error.what}"


def _ncu(has_gpu: bool) -> Iterator[str]:
    ncu = shutil.which("ncu")
    if ncu is None:
        yield "Nsight Compute: ncu is not on the PATH"
        return
    try:
        answer = subprocess.run([ncu, "--version"], capture_output=True, text=True, timeout=30, check=False)
        version = answer.stdout.strip().splitlines()[-1:] or ["unknown version"]
    except (OSError, subprocess.SubprocessError) as error:
        version = [f"does not start: {error}"]
    yield f"Nsight Compute: {version[0]}"
    if has_gpu:
        yield f"  counters: {_counter_permission()}"


def _counter_permission() -> str:
    try:
        parameters = _NVIDIA_PARAMETERS.read_text()
    except OSError:
        return "unknown (the driver does not tell; ncu answers ERR_NVGPUCTRPERM where they are forbidden)"
    if "RmProfilingAdminOnly: 0" in parameters or os.geteuid() == 0:
        return "allowed"
    return "forbidden to ordinary users; an administrator can set NVreg_RestrictProfilingToAdminUsers=0"


def _checkpoints() -> Iterator[str]:
    for model in checkpoints.REPOS:
        folder = checkpoints.find_checkpoint(model)
        if folder is not None:
            origin = checkpoints.origin_of(folder)
            where = f"found, commit {origin.revision if origin else 'unknown'}"
        elif checkpoints.find_unconverted(model) is not None:
            where = "downloaded and not converted"
        else:
            where = "not in the Hub cache; random weights are used"
        yield f"checkpoint {model}: {where}"
        if folder is None:
            yield f"  cure: python3 model_download.py --model {model}"


def _packages() -> Iterator[str]:
    versions = package_versions(STACK)
    yield "packages: " + ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        yield "  not installed: " + ", ".join(missing)


def _disk(what: str, folder: Path) -> str:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return f"disk for {what}: {shutil.disk_usage(existing).free / GIB:.0f} GiB free"


def _preset(family: Family, gpu: Gpu | None) -> str:
    try:
        size = presets.choose_size(
            family, family.full, "auto", gpu.memory_total_bytes if gpu else None, gpu_name=gpu.name if gpu else ""
        )
    except UserError as error:
        return f"preset auto of {family.name}: none; {error}"
    return f"preset auto of {family.name}: {size.preset} ({size.reason})"
