"""The kernels of convolution and norm through Triton's own compiler, for GPUs that this machine need not have.

Interpreted kernels prove the arithmetic, not that the compiler takes them; a kernel that spills or reads two bytes at a
time is right and slow. Runs itself in another process: here the interpreter may have replaced the compiler.
"""

import json
from typing import Any

import pytest
from helpers_compile import accesses, compile_kernel, output_of

CAPABILITIES = (80, 90)  # Ampere, Hopper
# x in bf16 as in training, or in fp32 (V = 4); whole groups (UNIT = V) or not.
CONV = {"W": 4, "V": 8, "BLOCK_E": 1}
VARIANTS = {
    "conv forward": ("causal_conv", "_forward_kernel", CONV | {"UNIT": 8, "BLOCK_P": 256}),
    "conv forward, few groups": ("causal_conv", "_forward_kernel", CONV | {"UNIT": 8, "BLOCK_P": 16, "BLOCK_E": 8}),
    "conv forward, odd length": ("causal_conv", "_forward_kernel", CONV | {"UNIT": 1, "BLOCK_P": 256}),
    "conv forward, fp32": ("causal_conv", "_forward_kernel", CONV | {"V": 4, "UNIT": 4, "BLOCK_P": 256}),
    "conv backward, fp32": ("causal_conv", "_backward_kernel", CONV | {"V": 4, "UNIT": 4, "BLOCK_P": 128}),
    "conv backward": ("causal_conv", "_backward_kernel", CONV | {"UNIT": 8, "BLOCK_P": 128}),
    "conv backward, few groups": ("causal_conv", "_backward_kernel", CONV | {"UNIT": 8, "BLOCK_P": 16, "BLOCK_E": 8}),
    "conv backward, odd length": ("causal_conv", "_backward_kernel", CONV | {"UNIT": 1, "BLOCK_P": 128}),
    "norm forward": ("rms_norm", "_forward_kernel", {}),
    "norm forward, first block": ("rms_norm", "_forward_kernel", {"residual_ptr": None}),
    "norm backward": ("rms_norm", "_backward_kernel", {}),
    "norm backward, last block": ("rms_norm", "_backward_kernel", {"dresidual_out_ptr": None}),
}  # fmt: skip
FP32_POINTERS = {"residual_ptr", "residual_out_ptr", "rstd_ptr", "dresidual_out_ptr", "dresidual_ptr", "dweight_ptr"}


def compile_all() -> dict[str, dict[str, Any]]:
    """Global memory instructions (PTX) and resources (the assembler's count) of each variant on each capability."""
    return {
        f"{name}, sm_{capability}": compile_one(*variant, capability=capability)
        for name, variant in VARIANTS.items()
        for capability in CAPABILITIES
    }


def compile_one(module: str, name: str, constants: dict[str, Any], *, capability: int) -> dict[str, Any]:
    import importlib

    kernels = importlib.import_module(f"tunescope.kernels.{module}")
    kernel = getattr(kernels, name)
    num_warps = 4
    if module == "rms_norm":
        blocks = kernels._blocks(1472)
        constants = constants | {"D": 1472, "BLOCK_D": blocks["BLOCK_D"]}
        num_warps = blocks["num_warps"]
    signature = {
        argument: "constexpr" if argument in constants else type_of(argument, module, constants)
        for argument in kernel.arg_names
    }
    ptx, resources = compile_kernel(kernel, signature, constants, capability=capability, num_warps=num_warps)
    return {"accesses": accesses(ptx), "shared": "st.shared" in ptx, **resources}


def type_of(argument: str, module: str, constants: dict[str, Any]) -> str:
    if argument == "eps":
        return "fp32"
    if not argument.endswith("_ptr"):
        return "i32"
    is_fp32 = argument in FP32_POINTERS if module == "rms_norm" else constants["V"] == 4
    return "*fp32" if is_fp32 else "*bf16"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return output_of(__file__, tmp_path_factory)


def test_every_kernel_compiles_and_keeps_its_values_in_registers(compiled: dict[str, dict[str, Any]]) -> None:
    assert len(compiled) == len(VARIANTS) * len(CAPABILITIES)
    for name, found in compiled.items():
        assert found["STACK"] == found["LOCAL"] == 0, name
        assert found["REG"] <= 128, name  # half of the threads that an SM can hold


def test_whole_groups_are_read_and_written_16_bytes_at_a_time(compiled: dict[str, dict[str, Any]]) -> None:
    """Three vectors of x and two of dy per thread in backward; what is narrower are weights, biases and their sums."""
    for capability in CAPABILITIES:
        forward = compiled[f"conv forward, sm_{capability}"]["accesses"]
        assert forward.count("ld.global.v4.b32") == 4  # two groups per thread, each with the one before
        assert forward.count("st.global.v4.b32") == 2
        assert not compiled[f"conv forward, sm_{capability}"]["shared"]  # shifts cost no exchange between threads
        backward = compiled[f"conv backward, sm_{capability}"]["accesses"]
        assert backward.count("ld.global.v4.b32") == 5
        assert backward.count("st.global.v4.b32") == 1
        assert backward.count("ld.global.b16") == backward.count("st.global.b16") == 5


def test_norms_rows_are_read_and_written_in_vectors(compiled: dict[str, dict[str, Any]]) -> None:
    for capability in CAPABILITIES:
        for direction, num_scalars in (("forward", 0), ("backward", 1)):
            accesses = compiled[f"norm {direction}, sm_{capability}"]["accesses"]
            assert {access for access in accesses if access.startswith("ld")} >= {
                "ld.global.v2.b32",
                "ld.global.v4.b32",
            }
            scalars = [access for access in accesses if ".v" not in access and access.startswith("ld")]
            assert len(scalars) == num_scalars  # 1 / rms of the row


if __name__ == "__main__":
    print(json.dumps(compile_all()))
