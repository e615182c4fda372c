"""Provenance: what a run ran on. Names no host, user or path."""

import importlib.metadata
import os
import platform
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tunescope
from tunescope.gpus import list_gpus

# Those whose versions can change a step's speed or the task; recorded, and part of a point's identity.
STACK = (
    "torch", "triton", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes", "llamafactory",
    "flash-attn", "mamba-ssm", "causal-conv1d",
)  # fmt: skip
_SPEED_VARIABLES = (
    "CUDA_LAUNCH_BLOCKING", "CUDA_MODULE_LOADING", "CUDA_DEVICE_MAX_CONNECTIONS", "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)  # fmt: skip
_ALSO_RECORDED = ("numpy", "pandas", "pyarrow", "tokenizers", "safetensors", "zeus", "nvidia-ml-py")


def speed_settings() -> dict[str, str]:
    """Environment variables that change how fast the same code runs, where they are set."""
    return {name: os.environ[name] for name in _SPEED_VARIABLES if os.environ.get(name)}


def package_versions(names: tuple[str, ...] = STACK) -> dict[str, str | None]:
    """Installed versions without importing anything; None for what is not installed."""
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def git_revision() -> str | None:
    """Commit of the project's checkout, `+changes` where files differ from it.

    Outside a checkout of its own (a copy without .git, also one inside another repository) what TUNESCOPE_REVISION
    says, marked as stated; else None.
    """
    root = Path(__file__).resolve().parents[3]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() == root:
            return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        pass
    stated = os.environ.get("TUNESCOPE_REVISION")
    return f"{stated} (stated)" if stated else None


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment(*, use_gpu: bool, revision: str | None) -> dict[str, Any]:
    """Everything about this machine and process that a row's reader may need. Initialises CUDA if use_gpu.

    revision: of the code that runs. The launcher reads it as it starts: by the time a point does, a sweep of hours may
    have seen a `git pull` that its fork server has not.
    """
    import torch

    content: dict[str, Any] = {
        "tunescope": tunescope.__version__,
        "git_revision": revision,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "torch_num_threads": torch.get_num_threads(),
        "packages": package_versions(STACK + _ALSO_RECORDED),
        "torch_cuda": torch.version.cuda,
        "device": cpu_name(),
        "gpu": None,
    }
    if use_gpu:
        content["gpu"] = _gpu_facts()
        content["device"] = content["gpu"]["name"]
    return content


def _gpu_facts() -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(0)
    facts: dict[str, Any] = {
        "name": properties.name,
        "memory_total_bytes": properties.total_memory,
        "sm_count": properties.multi_processor_count,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "cudnn": torch.backends.cudnn.version(),
        "matmul_allow_tf32": torch.backends.cuda.matmul.allow_tf32,
    }
    gpus = list_gpus().gpus  # CUDA_VISIBLE_DEVICES names one GPU here, so the first is ours
    identity = (
        "uuid",
        "index",
        "pci_bus_id",
    )  # of this very machine: no reader of the numbers needs them
    facts["nvml"] = {k: v for k, v in asdict(gpus[0]).items() if k not in identity} if gpus else None
    return facts
