"""The kernels of the selective scan through Triton's own compiler, for GPUs that this machine need not have.

Interpreted kernels prove the arithmetic, not that the compiler takes them, nor that what belongs to a thread stays in
it. Runs itself in another process: here the interpreter may have replaced the compiler.
"""

import json
import re
from typing import Any

import pytest
from helpers_compile import accesses, compile_kernel, output_of

CAPABILITIES = (80, 86, 90)  # Ampere of data centres and of others, Hopper
MODEL = {"N": 16, "BLOCK_E": 8, "T": 64, "R": 4, "UNIT": 8, "EVEN_E": True, "HAS_Z": True}
FORWARD = MODEL | {"SAVE": 64, "HAS_D": True, "IS_SPLIT": False}
BACKWARD = MODEL | {"BLOCKS": 8, "HAS_D": True, "IS_SPLIT": False}
# In bf16 as in training, with the launches of selective_scan_triton._config; odd: no size a multiple of anything.
ODD = {"UNIT": 1, "EVEN_E": False}
SHORT = {"BLOCK_E": 16, "T": 16, "R": 16}
VARIANTS = {
    "forward": ("forward_kernel", FORWARD),
    "forward, few programs": ("forward_kernel", FORWARD | {"BLOCK_E": 2, "T": 128, "R": 2}),
    "forward, split": ("forward_kernel", FORWARD | {"IS_SPLIT": True}),
    "backward": ("backward_kernel", BACKWARD),
    "backward, few programs": ("backward_kernel", BACKWARD | {"BLOCK_E": 4, "BLOCKS": 1}),
    "backward, split": ("backward_kernel", BACKWARD | {"IS_SPLIT": True}),
    "ends of tiles": ("tile_ends_kernel", MODEL | {"REVERSE": False}),
    "ends of tiles, reverse": ("tile_ends_kernel", MODEL | {"REVERSE": True}),
    "carries": ("carries_kernel", {"N": 16, "BLOCK_E": 32, "REVERSE": False}),
    "sums": ("sums_kernel", {"N": 16, "ROWS": 128, "COLUMNS": 32, "HAS_A": True, "HAS_D": True}),
}
ONLY_ON_HOPPER = {
    "forward, odd": ("forward_kernel", FORWARD | ODD),
    "forward, short, no D and z": ("forward_kernel", FORWARD | SHORT | {"SAVE": 16, "HAS_D": False, "HAS_Z": False}),
    "ends of tiles, odd": ("tile_ends_kernel", MODEL | ODD | {"REVERSE": False}),
    "carries, reverse": ("carries_kernel", {"N": 16, "BLOCK_E": 32, "REVERSE": True}),
    "sums, no A and D": ("sums_kernel", {"N": 16, "ROWS": 64, "COLUMNS": 64, "HAS_A": False, "HAS_D": False}),
    "backward, odd": ("backward_kernel", BACKWARD | ODD),
    "backward, short, no D and z": ("backward_kernel", BACKWARD | SHORT | {"HAS_D": False, "HAS_Z": False}),
}  # fmt: skip
ABSENT = {"HAS_D": {"D_ptr", "dD_ptr"}, "HAS_Z": {"z_ptr", "dz_ptr"}}
FP32_POINTERS = {
    "A_ptr", "dA_ptr", "states_ptr", "carries_ptr", "ends_ptr", "tile_delta_ptr", "dBC_ptr", "per_channel_ptr",
}  # fmt: skip


def compile_all() -> dict[str, dict[str, Any]]:
    """Memory instructions (PTX) and resources (the assembler's count) of each variant on each capability."""
    everywhere = {
        f"{name}, sm_{capability}": compile_one(*variant, capability)
        for name, variant in VARIANTS.items()
        for capability in CAPABILITIES
    }
    return everywhere | {name: compile_one(*variant, 90) for name, variant in ONLY_ON_HOPPER.items()}


def compile_one(name: str, constants: dict[str, Any], capability: int) -> dict[str, Any]:
    from tunescope.kernels import selective_scan_kernels

    kernel = getattr(selective_scan_kernels, name)
    for flag, pointers in ABSENT.items():
        if not constants.get(flag, True):
            constants = constants | {pointer: None for pointer in pointers if pointer in kernel.arg_names}
    signature = {argument: "constexpr" if argument in constants else type_of(argument) for argument in kernel.arg_names}
    num_warps = 4 if name == "sums_kernel" else 1
    ptx, resources = compile_kernel(kernel, signature, constants, capability=capability, num_warps=num_warps)
    return {
        "accesses": accesses(ptx),
        "shuffles": len(re.findall(r"\bshfl\.sync", ptx)),
        "exponentials": set(re.findall(r"\bex2\.approx\S*\.f32", ptx)) == {"ex2.approx.ftz.f32"},
        **resources,
    }


def type_of(argument: str) -> str:
    if not argument.endswith("_ptr"):
        return "i32"
    return "*fp32" if argument in FP32_POINTERS else "*bf16"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return output_of(__file__, tmp_path_factory)


def test_every_kernel_compiles_and_keeps_its_values_in_registers(compiled: dict[str, dict[str, Any]]) -> None:
    assert len(compiled) == len(VARIANTS) * len(CAPABILITIES) + len(ONLY_ON_HOPPER)
    for name, found in compiled.items():
        assert found["LOCAL"] == 0, name
        if "odd" not in name:
            assert found["STACK"] <= 96, name  # a few of 255, which the loop over states leaves where they are


def test_rows_are_read_and_written_16_bytes_at_a_time(compiled: dict[str, dict[str, Any]]) -> None:
    """Of two channels a thread each tensor over time is one vector each; what they share is one vector for both."""
    for capability in CAPABILITIES:
        forward = compiled[f"forward, sm_{capability}"]["accesses"]
        assert forward.count("ld.global.v4.b32") == 2 * 3 + 2 * 2  # c, delta and z; B and C, of the first state apart
        assert forward.count("st.global.v4.b32") == 2  # y
        assert forward.count("ld.global.b16") == 2 * 2  # bias and D
        backward = compiled[f"backward, sm_{capability}"]["accesses"]
        assert backward.count("ld.global.v4.b32") == 2 * 2 * 4 + 2 + 1  # all twice, dy too; B and C; their gradients
        assert backward.count("st.global.v4.b32") == 2 * 3 + 1  # gradients of c, delta and z; of B and C
        assert backward.count("ld.global.b16") == 2 * 2
        ends = compiled[f"ends of tiles, sm_{capability}"]["accesses"]
        assert ends.count("ld.global.v4.b32") == 2 * 2 + 1  # delta and c; B
        # One program reads 32 of 128 rows' columns of dBC in vectors of four, and 36 numbers a channel in twos.
        sums = compiled[f"sums, sm_{capability}"]["accesses"]
        assert sums.count("ld.global.v4.b32") == 128 * 32 // (4 * 32 * 4)
        assert sums.count("ld.global.v2.b32") == 128 * 32 // (4 * 32 * 2)


def test_threads_exchange_no_more_than_scans_and_sums_need(compiled: dict[str, dict[str, Any]]) -> None:
    """A tile in another layout than its steps' would show as shuffles by the dozen, or as shared memory."""
    for name, found in compiled.items():
        if "odd" not in name and "sums" not in name:  # those add up over four warps
            assert found["SHARED"] == 0, name
    for capability in CAPABILITIES:
        over_tile = 2 * 3  # of two channels, over 8 blocks
        for name in ("ends of tiles", "ends of tiles, reverse"):
            # In the loop a sum for each channel; before it another, and a scan: three levels and the step.
            assert compiled[f"{name}, sm_{capability}"]["shuffles"] <= 2 * over_tile + 2 * (2 * 3 + 1) + 4
        # Two channels' scans over 8 blocks: three levels, the last without a decay, and the step to what enters.
        chain = 2 * (2 * 3 - 1 + 1)
        to_where_they_are_stored = 2
        assert compiled[f"forward, sm_{capability}"]["shuffles"] == chain + to_where_they_are_stored
        over_channels = 8 + 4
        over_blocks = 2 * 3 * 3  # the gradients of A, of the bias and of D
        backward = compiled[f"backward, sm_{capability}"]["shuffles"]
        assert backward <= 2 * chain + over_channels + over_blocks + 4 * to_where_they_are_stored


def test_exponentials_are_single_instructions(compiled: dict[str, dict[str, Any]]) -> None:
    """Those that heed denormal numbers take three more each."""
    assert all(found["exponentials"] for name, found in compiled.items() if "sums" not in name)


if __name__ == "__main__":
    print(json.dumps(compile_all(), indent=1))
