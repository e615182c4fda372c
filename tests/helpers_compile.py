"""Kernels through Triton's own compiler, for GPUs that this machine need not have.

In another process: here the interpreter may have replaced the compiler.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SRC = Path(__file__).parents[1] / "src"


def compile_kernel(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], *, capability: int, num_warps: int
) -> tuple[str, dict[str, int]]:
    """PTX and the assembler's count of resources (REG, STACK, LOCAL, SHARED), for pointers to multiples of 16 bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = [index for index, type_ in enumerate(signature.values()) if type_.startswith("*")]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, {(index,): [["tt.divisibility", 16]] for index in pointers}),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps},
    )
    cubin = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    resources = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    return compiled.asm["ptx"], resources


def accesses(ptx: str) -> list[str]:
    """Its instructions on global memory, without their addresses."""
    return re.findall(r"\b(?:ld|st)\.global(?:\.v\d)?\.b\d+", ptx)


def output_of(script: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The JSON that a test file prints when it is run as a program, with the compiler and a cache of its own."""
    environment = os.environ | {
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "PYTHONPATH": os.pathsep.join([str(SRC), os.environ.get("PYTHONPATH", "")]),
    }
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
