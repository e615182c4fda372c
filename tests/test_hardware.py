"""The table of GPUs: what must hold for every entry, and how names resolve."""

import itertools

import pytest

from tunescope.hardware import DEVICES, Device, UnknownDevice, find_device

# (name and total memory as torch or nvidia-smi report them on real machines, entry)
REPORTED = [
    ("NVIDIA A10G", 22.06, "NVIDIA A10G"),
    ("NVIDIA A40", 44.4, "NVIDIA A40"),
    ("NVIDIA L4", 22.0, "NVIDIA L4"),
    ("NVIDIA L40S", 44.5, "NVIDIA L40S"),
    ("NVIDIA A100-SXM4-40GB", 39.5, "NVIDIA A100-SXM4-40GB"),
    ("A100-SXM4-40GB", 39.6, "NVIDIA A100-SXM4-40GB"),
    ("NVIDIA A100-PCIE-40GB", 39.4, "NVIDIA A100-PCIE-40GB"),
    ("NVIDIA A100-SXM4-80GB", 79.1, "NVIDIA A100-SXM4-80GB"),
    ("NVIDIA A100 80GB PCIe", 79.1, "NVIDIA A100 80GB PCIe"),
    ("NVIDIA H100 PCIe", 79.1, "NVIDIA H100 PCIe"),
    ("NVIDIA H100 80GB HBM3", 79.6, "NVIDIA H100 80GB HBM3"),
    ("NVIDIA H200", 139.8, "NVIDIA H200"),
    ("NVIDIA B200", 178.4, "NVIDIA B200"),
    ("NVIDIA GeForce RTX 3090", 23.7, "NVIDIA GeForce RTX 3090"),
    ("NVIDIA GeForce RTX 4090", 23.5, "NVIDIA GeForce RTX 4090"),
    ("NVIDIA GeForce RTX 5090", 31.4, "NVIDIA GeForce RTX 5090"),
]

every_device = pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)


@every_device
def test_every_value_is_there_and_has_a_vendor_source(device: Device) -> None:
    assert "NVIDIA" in device.source
    assert "sheet" in device.source or "whitepaper" in device.source
    numbers = (
        device.memory_gb,
        device.dram_bytes_per_s,
        device.peak_bf16_flop_per_s,
        device.peak_fp32_flop_per_s,
        device.sm_count,
        device.l2_bytes,
        device.board_power_w,
    )
    assert all(number > 0 for number in numbers)
    assert 2020 <= device.released_year <= 2030


# Dense bf16 FLOP per SM and cycle with fp32 accumulation, by compute capability: from the SM
# diagrams of the architecture whitepapers. GA10x and AD10x boards sold as GeForce, and the A10G,
# run at half of it.
TENSOR_FLOP_PER_SM_CYCLE = {
    (8, 0): (2048,),
    (8, 6): (1024, 512),
    (8, 9): (1024, 512),
    (9, 0): (4096,),
    (10, 0): (8192,),
    (12, 0): (512,),
}


@every_device
def test_bf16_peak_implies_a_clock_that_a_gpu_can_run_at(device: Device) -> None:
    """A sparse figure entered as dense would double the clock; it must be off the scale."""
    clocks_hz = [
        device.peak_bf16_flop_per_s / device.sm_count / flop_per_cycle
        for flop_per_cycle in TENSOR_FLOP_PER_SM_CYCLE[device.compute_capability]
    ]
    assert any(1.35e9 <= clock_hz <= 2.55e9 for clock_hz in clocks_hz)


@every_device
def test_fp32_peak_implies_a_clock_that_a_gpu_can_run_at(device: Device) -> None:
    cores_per_sm = 64 if device.compute_capability == (8, 0) else 128
    clock_hz = device.peak_fp32_flop_per_s / (2 * cores_per_sm * device.sm_count)
    assert 1.35e9 <= clock_hz <= 2.55e9


@every_device
def test_peaks_and_bandwidth_are_within_the_range_of_the_generation(device: Device) -> None:
    intensity_flop_per_byte = device.peak_bf16_flop_per_s / device.dram_bytes_per_s
    assert 75 <= intensity_flop_per_byte <= 450


@every_device
def test_a_device_is_found_by_its_own_name_with_and_without_its_memory(device: Device) -> None:
    assert find_device(device.name) is device
    assert find_device(device.name, device.memory_gb) is device
    assert find_device(device.name.removeprefix("NVIDIA ").lower()) is device


@every_device
def test_an_alias_and_the_memory_name_exactly_one_device(device: Device) -> None:
    for alias in device.aliases:
        assert find_device(alias, device.memory_gb) is device


def test_an_alias_is_shared_only_between_boards_of_unlike_memory() -> None:
    for one, other in itertools.combinations(DEVICES, 2):
        assert one.name != other.name
        if set(one.aliases) & set(other.aliases):
            assert one.memory_gb != other.memory_gb


@pytest.mark.parametrize(("name", "memory_gib", "entry"), REPORTED)
def test_names_that_drivers_report(name: str, memory_gib: float, entry: str) -> None:
    assert find_device(name, memory_gib).name == entry
    assert find_device(name).name == entry


def test_the_values_the_study_rests_on() -> None:
    a40 = find_device("NVIDIA A40")
    assert (a40.peak_bf16_flop_per_s, a40.dram_bytes_per_s) == (149.7e12, 696e9)
    h200 = find_device("NVIDIA H200")
    assert (h200.memory_gb, h200.dram_bytes_per_s) == (141, 4.8e12)


def test_memory_settles_a_family_name() -> None:
    assert find_device("A100", 40).name == "NVIDIA A100-SXM4-40GB"
    assert find_device("a100", 79.2).name == "NVIDIA A100-SXM4-80GB"
    assert find_device("A100 PCIe", 80).name == "NVIDIA A100 80GB PCIe"


def test_a_family_name_without_memory_is_refused_with_the_choices() -> None:
    with pytest.raises(UnknownDevice, match="several boards") as caught:
        find_device("A100")
    assert "40GB" in str(caught.value)
    assert "80GB" in str(caught.value)


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 4090 Laptop GPU", "H100 NVL", "A4", ""])
def test_a_near_miss_is_not_taken_for_its_neighbour(name: str) -> None:
    with pytest.raises(UnknownDevice, match="DEVICES"):
        find_device(name)


def test_a_slice_of_a_gpu_is_refused() -> None:
    with pytest.raises(UnknownDevice, match="MIG slice"):
        find_device("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 9.5)
    with pytest.raises(UnknownDevice, match="another size"):
        find_device("NVIDIA A40", 22.2)
