"""The kernels over 4-bit weights through Triton's own compiler, for GPUs that this machine need not have.

In the launches of nf4_triton, on Mixtral's shapes. Runs itself in another process, as test_kernels_compile.
"""

import json
import os
import re
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from helpers_compile import output_of

CAPABILITIES = (80, 86, 90)  # Ampere of data centres and of others, Hopper
SHARED_LIMIT_BYTES = {80: 166_912, 86: 101_376, 90: 232_448}  # CUDA C++ Programming Guide, compute capabilities
E, N, K = 8, 14336, 4096
SIZES = {"E": E, "N": N, "K": K, "Q": 16, "BLOCK": 64, "BLOCK_E": 8, "BLOCK_Q": 16, "SPLIT": 1, "USE_ASM": True}
TYPES = {"packed_ptr": "*u8", "absmax_ptr": "*u8", "ends_ptr": "*i32", "num_rows": "i32", "w_ptr": "*i32"}
FP32 = ("absmax2_ptr", "offset_ptr", "code2_ptr", "code_ptr", "scale_ptr")
FLAT = {"absmax_ptr": "*fp32", "absmax2_ptr": None, "offset_ptr": None, "code2_ptr": None}  # absmax not quantised


def compile_all() -> dict[str, dict[str, Any]]:
    from tunescope.kernels.nf4_triton import DX_CONFIGS, FORWARD_CONFIGS

    found = {}
    for capability in CAPABILITIES:
        for name, configs in (("forward_kernel", FORWARD_CONFIGS), ("dx_kernel", DX_CONFIGS)):
            for most, config in configs:
                launch = asdict(config)
                options = {key: launch.pop(key) for key in ("num_warps", "num_stages")}
                del launch["max_split"]
                constants = SIZES | {key.upper(): value for key, value in launch.items()}
                key = f"{name}, {most}, sm_{capability}"
                found[key] = compile_one(name, constants, options, capability) | {"capability": capability}
                assert constants["USE_ASM"]
        numbers = {
            "NUMBERS": N * K,
            "K": K,
            "EXPERT": N * (K + 16),
            "ROW": K + 16,
            "BLOCK": 64,
            "BLOCK_B": 128,
            "USE_ASM": True,
        }
        exact = {"num_warps": 4, "enable_fp_fusion": False}
        found[f"dequantize, sm_{capability}"] = compile_one("dequantize_kernel", numbers, exact, capability)
        found[f"scales, sm_{capability}"] = compile_one(
            "scales_kernel", {"S": N * K // 64, "BLOCK_S": 1024}, exact, capability
        )
    portable = {"NUMBERS": N * K, "K": K, "EXPERT": N * K, "ROW": K, "BLOCK": 64, "BLOCK_B": 128, "USE_ASM": False}
    found["dequantize, fp16"] = compile_one("dequantize_kernel", portable, exact, 90, {"w_ptr": "*fp16"})
    return found | odd_variants()


def odd_variants() -> dict[str, dict[str, Any]]:
    """What is not Mixtral's: absmax that are not quantised, no adapters, fp16 rows, sums split, odd N and rank."""
    options = {"num_warps": 4, "num_stages": 3}
    forward = SIZES | {"BLOCK_R": 32, "BLOCK_N": 128, "UNROLL": 1, "SCALE_SUMS": True, "WEIGHTS_FIRST": True}
    dx = SIZES | {"BLOCK_R": 32, "BLOCK_N": 64, "BLOCK_C": 2, "WEIGHTS_FIRST": True}
    no_lora = {"u_ptr": None, "b_ptr": None}
    no_dlora = {"du_ptr": None, "a_ptr": None}
    small = {"BLOCK_R": 16, "USE_ASM": False}
    split = {"SPLIT": 4, "N": 1000, "Q": 5}
    return {
        "forward, flat": compile_one("forward_kernel", forward | no_lora, options, 90, FLAT),
        "dx, flat": compile_one("dx_kernel", dx | no_dlora, options, 90, FLAT),
        "forward, split": compile_one("forward_kernel", forward | split, options, 90, {"y_ptr": "*fp32"}),
        "dx, split": compile_one("dx_kernel", dx | split, options, 90, {"dx_ptr": "*fp32"}),
        "forward, fp16": compile_one("forward_kernel", forward | {"USE_ASM": False}, options, 90, all_of("*fp16")),
        "forward, fp32": compile_one("forward_kernel", forward | small, options, 90, all_of("*fp32")),
        "dx, fp32": compile_one("dx_kernel", dx | small, options, 90, all_of("*fp32")),
        "dx, fp16": compile_one("dx_kernel", dx | {"USE_ASM": False}, options, 90, all_of("*fp16")),
    }


def all_of(type_: str) -> dict[str, str]:
    return {f"{name}_ptr": type_ for name in ("x", "y", "u", "b", "dy", "dx", "du", "a")}


def compile_one(
    name: str, constants: dict[str, Any], options: dict[str, Any], capability: int, types: dict[str, Any] | None = None
) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tunescope.kernels import nf4_kernels

    kernel = getattr(nf4_kernels, name)
    types = TYPES | dict.fromkeys(FP32, "*fp32") | (types or {})
    absent = {argument: None for argument in kernel.arg_names if argument in types and types[argument] is None}
    constants = constants | absent
    signature = {
        argument: "constexpr" if argument in constants else types.get(argument, "*bf16")
        for argument in kernel.arg_names
    }
    aligned = {
        (index,): [["tt.divisibility", 16]] for index, type_ in enumerate(signature.values()) if type_.startswith("*")
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", capability, 32), options=options
    )
    cubin = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    ptx = compiled.asm["ptx"]
    return {
        **{key.lower(): int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)},
        "shared_bytes": compiled.metadata.shared,
        "is_fused": bool(re.search(r"\bfma\.rn\.f32\b", ptx)),
        "warpgroup_products": len(re.findall(r"\bwgmma\.mma_async", ptx)),
        "warp_products": len(re.findall(r"\bmma\.sync", ptx)),
        "async_16_byte_copies": len(re.findall(r"cp\.async\.cg\S* \[[^\]]+\], \[[^\]]+\], 0x10|cp\.async\.cg\S*", ptx)),
        "vector_stores": len(re.findall(r"st\.global\.v4\.b32", ptx)),
        "byte_permutes": len(re.findall(r"\bprmt\.b32", ptx)),
    }


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return output_of(__file__, tmp_path_factory)


def test_no_kernel_spills_registers(compiled: dict[str, dict[str, Any]]) -> None:
    assert len(compiled) >= 3 * (2 + 2 + 2) + 8
    for name, found in compiled.items():
        assert found["local"] == 0, name
        assert found["stack"] == 0, name


def test_tiles_fit_into_shared_memory_of_every_gpu(compiled: dict[str, dict[str, Any]]) -> None:
    launched = {name: found for name, found in compiled.items() if "capability" in found}
    assert launched
    for name, found in launched.items():
        assert found["shared_bytes"] <= SHARED_LIMIT_BYTES[found["capability"]], name


def test_tiles_of_weights_are_copied_ahead_and_multiplied_by_the_largest_instructions(
    compiled: dict[str, dict[str, Any]],
) -> None:
    for name, found in compiled.items():
        if "capability" in found:
            assert found["async_16_byte_copies"] > 0, name
            assert (found["warpgroup_products"] > 0) == (found["capability"] == 90), name
            assert found["byte_permutes"] > 0, name


def test_dequantisation_rounds_like_bitsandbytes_and_stores_16_bytes_at_a_time(
    compiled: dict[str, dict[str, Any]],
) -> None:
    """A multiplication and an addition in one instruction would not round in between."""
    for capability in CAPABILITIES:
        found = compiled[f"dequantize, sm_{capability}"]
        assert not found["is_fused"]
        assert found["vector_stores"] > 0
        assert not compiled[f"scales, sm_{capability}"]["is_fused"]
    assert not compiled["dequantize, fp16"]["is_fused"]


if __name__ == "__main__":
    print(json.dumps(compile_all(), indent=1))
