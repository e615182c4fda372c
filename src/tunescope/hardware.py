"""One table of GPUs: what the vendor says each can do at most, and the document that says so.

Every rate is a DENSE peak: NVIDIA's sheets often print the figure with 2:4 structured sparsity,
twice the dense one, and training runs dense. A peak is the vendor's number at boost clock, not
what a kernel reaches (an H200 runs large bf16 matrix products at about 790 of its 989 TFLOP/s).

Counts that no vendor sheet states (the SMs and L2 of boards sold without a whitepaper) are what
the CUDA driver reports, and the source says so, as it does where a count rests on published lists
alone. No rate is estimated: a GPU without an entry stops the run, because a guessed peak makes a
believable wrong percentage.
"""

import re
from dataclasses import dataclass

from tunescope.errors import UserError

MIB = 2**20
GIB = 2**30

# What the driver reports over what the sheet prints. The driver keeps some memory for ECC and
# itself (A40: 44.4 GiB of "48 GB"), and the sheets' GB are mostly GiB (A100 80GB: 80.0 GiB).
MEMORY_GIB_OVER_GB = (0.88, 1.03)


class UnknownDevice(UserError):
    """No single entry of :data:`DEVICES` matches the name and the memory asked for."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """One GPU board at its vendor's default power limit.

    name: as nvidia-smi and torch report it. aliases: other names people type; several devices may
        share one when their memory tells them apart ("A100" is 40 or 80 GB).
    memory_gb: as printed on the sheet; dram_bytes_per_s: peak of the memory, read plus write.
    peak_bf16_flop_per_s: dense tensor-core peak with fp32 accumulation, what training runs.
    peak_fp32_flop_per_s: outside the tensor cores, a multiply-add counting as two.
    released_year: of the vendor's announcement.
    """

    name: str
    aliases: tuple[str, ...]
    memory_gb: float
    dram_bytes_per_s: float
    peak_bf16_flop_per_s: float
    peak_fp32_flop_per_s: float
    sm_count: int
    l2_bytes: int
    board_power_w: float
    compute_capability: tuple[int, int]
    released_year: int
    source: str


_A100_PAPER = "NVIDIA A100 GPU Architecture whitepaper, table 4 (bf16 312 dense, 624 sparse)"
_L2_FROM_LISTS = "L2 from published lists, not confirmed by a vendor document"
_A100_SHEET = "NVIDIA A100 datasheet (bandwidth, power)"
_H100_PAPER = "NVIDIA H100 GPU Architecture whitepaper, table 3 (dense, fp32 accumulate)"

DEVICES: tuple[Device, ...] = (
    Device(
        name="NVIDIA A10G",
        aliases=("A10G",),
        memory_gb=24,
        dram_bytes_per_s=600e9,
        peak_bf16_flop_per_s=70e12,  # not the A10's 125: the A10G has its tensor rate halved
        peak_fp32_flop_per_s=35e12,
        sm_count=80,
        l2_bytes=6 * MIB,
        board_power_w=300,
        compute_capability=(8, 6),
        released_year=2021,
        source="NVIDIA A10G datasheet for AWS, 2022-02-17 (bf16 70 dense, 140 sparse); "
        "SMs and L2 as the CUDA driver reports them",
    ),
    Device(
        name="NVIDIA A40",
        aliases=("A40",),
        memory_gb=48,
        dram_bytes_per_s=696e9,
        peak_bf16_flop_per_s=149.7e12,
        peak_fp32_flop_per_s=37.4e12,
        sm_count=84,
        l2_bytes=6 * MIB,
        board_power_w=300,
        compute_capability=(8, 6),
        released_year=2020,
        source="NVIDIA A40 datasheet (bf16 149.7 dense, 299.4 sparse; 10,752 CUDA cores at 128 an "
        f"SM); {_L2_FROM_LISTS}",
    ),
    Device(
        name="NVIDIA L4",
        aliases=("L4",),
        memory_gb=24,
        dram_bytes_per_s=300e9,
        peak_bf16_flop_per_s=121e12,
        peak_fp32_flop_per_s=30.3e12,
        sm_count=58,
        l2_bytes=48 * MIB,
        board_power_w=72,
        compute_capability=(8, 9),
        released_year=2023,
        source="NVIDIA L4 datasheet (prints bf16 242 sparse: half of it); SMs from published lists "
        f"(7,424 CUDA cores at 128 an SM, which the peaks bear out); {_L2_FROM_LISTS}",
    ),
    Device(
        name="NVIDIA L40S",
        aliases=("L40S",),
        memory_gb=48,
        dram_bytes_per_s=864e9,
        peak_bf16_flop_per_s=362.05e12,
        peak_fp32_flop_per_s=91.6e12,
        sm_count=142,
        l2_bytes=96 * MIB,
        board_power_w=350,
        compute_capability=(8, 9),
        released_year=2023,
        source="NVIDIA L40S datasheet (bf16 362.05 dense, 733 sparse; 18,176 CUDA cores at 128 an "
        "SM); L2 of the full AD102, NVIDIA Ada GPU Architecture whitepaper",
    ),
    Device(
        name="NVIDIA A100-SXM4-40GB",
        aliases=("A100", "A100-40GB", "A100-SXM-40GB"),
        memory_gb=40,
        dram_bytes_per_s=1555e9,
        peak_bf16_flop_per_s=312e12,
        peak_fp32_flop_per_s=19.5e12,
        sm_count=108,
        l2_bytes=40 * MIB,
        board_power_w=400,
        compute_capability=(8, 0),
        released_year=2020,
        source=_A100_PAPER,
    ),
    Device(
        name="NVIDIA A100-PCIE-40GB",
        aliases=("A100-PCIe", "A100-40GB-PCIe"),
        memory_gb=40,
        dram_bytes_per_s=1555e9,
        peak_bf16_flop_per_s=312e12,
        peak_fp32_flop_per_s=19.5e12,
        sm_count=108,
        l2_bytes=40 * MIB,
        board_power_w=250,
        compute_capability=(8, 0),
        released_year=2020,
        source=f"{_A100_PAPER}; NVIDIA A100 40GB PCIe product brief PB-10137-001 (power)",
    ),
    Device(
        name="NVIDIA A100-SXM4-80GB",
        aliases=("A100", "A100-80GB", "A100-SXM-80GB"),
        memory_gb=80,
        dram_bytes_per_s=2039e9,
        peak_bf16_flop_per_s=312e12,
        peak_fp32_flop_per_s=19.5e12,
        sm_count=108,
        l2_bytes=40 * MIB,
        board_power_w=400,
        compute_capability=(8, 0),
        released_year=2020,
        source=f"{_A100_PAPER}; {_A100_SHEET}",
    ),
    Device(
        name="NVIDIA A100 80GB PCIe",
        aliases=("A100-PCIe", "A100-PCIE-80GB"),
        memory_gb=80,
        dram_bytes_per_s=1935e9,
        peak_bf16_flop_per_s=312e12,
        peak_fp32_flop_per_s=19.5e12,
        sm_count=108,
        l2_bytes=40 * MIB,
        board_power_w=300,
        compute_capability=(8, 0),
        released_year=2021,
        source=f"{_A100_PAPER}; {_A100_SHEET}",
    ),
    Device(
        name="NVIDIA H100 PCIe",
        aliases=("H100-PCIe", "H100-80GB-PCIe"),
        memory_gb=80,
        dram_bytes_per_s=2000e9,  # datasheet and product brief; the whitepaper's table says 2,039
        peak_bf16_flop_per_s=756e12,
        peak_fp32_flop_per_s=51.2e12,
        sm_count=114,
        l2_bytes=50 * MIB,
        board_power_w=350,
        compute_capability=(9, 0),
        released_year=2022,
        source=f"{_H100_PAPER}; NVIDIA H100 datasheet (prints bf16 1,513 sparse; bandwidth) and "
        "H100 PCIe product brief PB-11133-001 (power)",
    ),
    Device(
        name="NVIDIA H100 80GB HBM3",
        aliases=("H100", "H100-SXM", "H100-SXM5", "H100-80GB", "H100-SXM5-80GB"),
        memory_gb=80,
        dram_bytes_per_s=3350e9,
        peak_bf16_flop_per_s=989.4e12,
        peak_fp32_flop_per_s=66.9e12,
        sm_count=132,
        l2_bytes=50 * MIB,
        board_power_w=700,
        compute_capability=(9, 0),
        released_year=2022,
        source=f"{_H100_PAPER}; NVIDIA H100 datasheet (prints bf16 1,979 sparse; bandwidth)",
    ),
    Device(
        name="NVIDIA H200",
        aliases=("H200", "H200-SXM", "H200-141GB"),
        memory_gb=141,
        dram_bytes_per_s=4800e9,
        peak_bf16_flop_per_s=989.4e12,  # the sheet's 1,979 is sparse; same GPU as the H100 SXM
        peak_fp32_flop_per_s=66.9e12,
        sm_count=132,
        l2_bytes=60 * MIB,  # not the H100's 50: it has a sixth memory stack, and L2 goes with it
        board_power_w=700,
        compute_capability=(9, 0),
        released_year=2023,
        source=f"NVIDIA H200 datasheet (memory, bandwidth, power); {_H100_PAPER}; "
        "SMs and L2 as the CUDA driver reports them",
    ),
    Device(
        name="NVIDIA B200",
        aliases=("B200", "B200-180GB"),
        memory_gb=180,
        # Some drivers report a 7,680-bit bus at 3,996 MHz, which makes 7.67e12.
        dram_bytes_per_s=8000e9,
        peak_bf16_flop_per_s=2250e12,
        peak_fp32_flop_per_s=80e12,
        sm_count=148,
        l2_bytes=126 * MIB,
        board_power_w=1000,
        compute_capability=(10, 0),
        released_year=2024,
        source="NVIDIA Blackwell Architecture technical brief, HGX B200 at 1,000 W (bf16 2,250 "
        "dense, 4,500 sparse); NVIDIA DGX B200 datasheet (1,440 GB in eight); "
        "SMs and L2 as the CUDA driver reports them",
    ),
    Device(
        name="NVIDIA GeForce RTX 3090",
        aliases=("RTX-3090", "3090"),
        memory_gb=24,
        dram_bytes_per_s=936e9,
        peak_bf16_flop_per_s=71e12,  # GeForce halves the tensor rate when fp32 accumulates
        peak_fp32_flop_per_s=35.6e12,
        sm_count=82,
        l2_bytes=6 * MIB,
        board_power_w=350,
        compute_capability=(8, 6),
        released_year=2020,
        source=f"NVIDIA Ampere GA102 GPU Architecture whitepaper (bf16 71 dense, 142 sparse); {_L2_FROM_LISTS}",
    ),
    Device(
        name="NVIDIA GeForce RTX 4090",
        aliases=("RTX-4090", "4090"),
        memory_gb=24,
        dram_bytes_per_s=1008e9,
        peak_bf16_flop_per_s=165.2e12,
        peak_fp32_flop_per_s=82.6e12,
        sm_count=128,
        l2_bytes=72 * MIB,
        board_power_w=450,
        compute_capability=(8, 9),
        released_year=2022,
        source="NVIDIA Ada GPU Architecture whitepaper, appendix A (bf16 165.2 dense)",
    ),
    Device(
        name="NVIDIA GeForce RTX 5090",
        aliases=("RTX-5090", "5090"),
        memory_gb=32,
        dram_bytes_per_s=1792e9,
        peak_bf16_flop_per_s=209.5e12,
        peak_fp32_flop_per_s=104.8e12,
        sm_count=170,
        l2_bytes=96 * MIB,
        board_power_w=575,
        compute_capability=(12, 0),
        released_year=2025,
        source=f"NVIDIA RTX Blackwell GPU Architecture whitepaper (bf16 209.5 dense, 419 sparse); {_L2_FROM_LISTS}",
    ),
)


def find_device(name: str, memory_gib: float | None = None) -> Device:
    """The entry for a GPU named as nvidia-smi or torch names it, or by an alias.

    Case, "NVIDIA", "GeForce" and the kind of separator do not matter. A bare family name ("A100",
    "H100") means the SXM board; write "A100 PCIe" for the other. memory_gib: total memory as the
    driver reports it, or the sheet's figure; it settles names that several boards share and must
    agree with the entry in any case, because a slice of a GPU (MIG, vGPU) has less of everything.
    Raises UnknownDevice unless exactly one entry matches.
    """
    named = [device for device in DEVICES if _key(name) in _keys(device)]
    if not named:
        raise _no_entry(name)
    fitting = [d for d in named if memory_gib is None or _memory_agrees(d, memory_gib)]
    if len(fitting) == 1:
        return fitting[0]
    choices = ", ".join(f"{device.name} ({device.memory_gb:g} GB)" for device in named)
    if not fitting:
        raise UnknownDevice(
            f"GPU {name!r} with {memory_gib:.1f} GiB is not in the table of GPUs.",
            cause=f"the table knows that name as {choices}; another size means a slice of the GPU "
            "(MIG, vGPU) or a variant, whose peaks are not this board's.",
            cure="use the whole GPU, or add the variant to DEVICES in src/tunescope/hardware.py "
            "with its datasheet as source.",
        )
    raise UnknownDevice(
        f"GPU name {name!r} fits several boards: {choices}.",
        cause="their memory, and so their bandwidth, differ.",
        cure="give the full name, or the memory size beside the name.",
    )


def _no_entry(name: str) -> UnknownDevice:
    cure = (
        "add a Device to DEVICES in src/tunescope/hardware.py, every value from the vendor's sheet "
        "and dense, or name one of: " + ", ".join(device.name for device in DEVICES) + "."
    )
    if re.search(r"\bMIG\b", name):
        cause = "it is a MIG slice, which has a share of the board's SMs and bandwidth."
        cure = "use the whole GPU: switch MIG off (`nvidia-smi -mig 0`)."
    else:
        cause = "its peaks are unknown here, and a guess would make wrong percentages look right."
    return UnknownDevice(f"GPU {name!r} is not in the table of GPUs.", cause=cause, cure=cure)


def _memory_agrees(device: Device, memory_gib: float) -> bool:
    low, high = MEMORY_GIB_OVER_GB
    return low <= memory_gib / device.memory_gb <= high


def _keys(device: Device) -> set[str]:
    return {_key(name) for name in (device.name, *device.aliases)}


def _key(name: str) -> str:
    """One spelling of a GPU name: drivers before 2021 leave out "NVIDIA"."""
    words = [word for word in re.split(r"[\s_-]+", name.lower()) if word]
    return "-".join(word for word in words if word not in ("nvidia", "geforce"))
