"""A point on a real GPU: its clock, memory, energy, precision, and how it ends without memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tunescope import results
from tunescope.families.mixtral import MIXTRAL, nf4_weight_bytes
from tunescope.gpus import list_gpus

pytestmark = pytest.mark.gpu
REPO = Path(__file__).parents[2]
GIB = 2**30


def launch(out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tunescope", "run", "throughput", "--out", str(out), *flags]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(REPO / "src"), os.environ.get("PYTHONPATH", "")]),
        "TUNESCOPE_PYTHON": sys.executable,  # as it is, also where the machine's own torch stands in for the pins
    }
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)


def only_point(out: Path) -> results.PointFolder:
    (folder,) = results.find_point_folders(out)
    return results.read_point(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> results.PointFolder:
    out = tmp_path_factory.mktemp("tiny")
    done = launch(out, "--preset", "tiny", "--points", "cs:sparse:bs=4")
    assert done.returncode == 0, done.stderr
    return only_point(out)


def test_the_gpus_clock_agrees_with_the_hosts(tiny: results.PointFolder) -> None:
    assert tiny.outcome["clock"] == "cuda_event"
    assert tiny.steps is not None
    timed = tiny.steps.to_pandas().query("not is_warmup")
    assert timed["duration_ns"].sum() == pytest.approx(timed["host_duration_ns"].sum(), rel=0.05)


def test_a_gpu_point_trains_in_bf16_and_says_what_it_ran_on(tiny: results.PointFolder) -> None:
    assert tiny.outcome["compute_dtype"] == "bfloat16"
    gpu = list_gpus().gpus[0]
    assert tiny.environment["gpu"]["name"] == gpu.name
    assert tiny.environment["gpu"]["nvml"]["driver_version"] == gpu.driver_version
    assert tiny.outcome["peak_reserved_bytes"] >= tiny.outcome["peak_allocated_bytes"] > 0


def test_energy_is_a_number_or_a_reason(tiny: results.PointFolder) -> None:
    energy_j = tiny.outcome["gpu_energy_j"]
    if energy_j is None:
        assert tiny.outcome["gpu_energy_why_not"]
    else:
        assert tiny.steps is not None
        seconds = tiny.steps.to_pandas().query("not is_warmup")["duration_ns"].sum() / 1e9
        limit_w = tiny.environment["gpu"]["nvml"]["power_limit_w"]
        assert 0 < energy_j / seconds < 1.1 * limit_w


def test_out_of_memory_is_a_row_with_the_peak_it_reached(tmp_path: Path) -> None:
    """Full-size Mixtral in 20 GiB: really out of memory, after 19 GiB of weights."""
    if list_gpus().gpus[0].memory_total_bytes < 21 * GIB:
        pytest.skip("needs a GPU with more than 20 GiB")
    done = launch(tmp_path, "--preset", "full", "--memory-budget-gib", "20", "--points", "cs:sparse:bs=1")
    assert done.returncode == 0, done.stderr
    point = only_point(tmp_path)
    assert point.status == "oom"
    assert 17 * GIB < point.outcome["peak_allocated_bytes"] <= 20 * GIB


def test_random_full_width_weights_take_the_bytes_that_arithmetic_says() -> None:
    import torch
    from transformers import BitsAndBytesConfig, MixtralConfig

    from tunescope.models.mixtral import MixtralForCausalLM, random_model

    config = MIXTRAL.config_at(MIXTRAL.full, 2, 2)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16,
    )
    before_bytes = torch.cuda.memory_allocated()
    model = random_model(MixtralForCausalLM, MixtralConfig(**config), quantization, {"": torch.device("cuda", 0)})
    used_bytes = torch.cuda.memory_allocated() - before_bytes
    assert used_bytes == pytest.approx(nf4_weight_bytes(config, 2), rel=0.01)
    del model
