"""The PTX that decodes 4-bit weights, run instruction by instruction: the interpreter of Triton cannot run it.

What each instruction does is from NVIDIA's manual (PTX ISA 8.5, section 9.7).
"""

import re
import struct
from collections.abc import Callable

import pytest
import torch
from bitsandbytes.functional import get_4bit_type
from hypothesis import given
from hypothesis import strategies as st

from tunescope.kernels import nf4_decode

CODES = {kind: get_4bit_type(kind, device="cpu").tolist() for kind in ("nf4", "fp4")}
BYTES = st.lists(st.integers(0, 255), min_size=4, max_size=4)
EARLY = {"$0", "$1", "$2", "$3"}  # outputs


def bf16_bits(value: float) -> int:
    return torch.tensor(value, dtype=torch.float32).to(torch.bfloat16).view(torch.int16).item() & 0xFFFF


def of_bf16(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits << 16))[0]


def fp32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def lanes(pair: int) -> list[float]:
    return [of_bf16(pair & 0xFFFF), of_bf16(pair >> 16)]


def prmt(a: int, b: int, selector: int) -> int:
    pool = [(word >> shift) & 0xFF for word in (a, b) for shift in (0, 8, 16, 24)]
    result = 0
    for at in range(4):
        nibble = (selector >> (4 * at)) & 0xF
        byte = pool[nibble & 7]
        if nibble & 8:
            byte = 0xFF if byte & 0x80 else 0
        result |= byte << (8 * at)
    return result


def fma_bf16x2(a: int, b: int, c: int) -> int:
    low, high = (bf16_bits(x * y + z) for x, y, z in zip(lanes(a), lanes(b), lanes(c), strict=True))
    return low | high << 16


ROUNDED: dict[str, Callable[..., int | float]] = {
    "and.b32": lambda a, b: a & b,
    "shr.b32": lambda a, b: a >> b,
    "shl.b32": lambda a, b: (a << b) & 0xFFFFFFFF,
    "prmt.b32": prmt,
    "mov.b32": lambda a: a,
    "fma.rn.bf16x2": fma_bf16x2,
    "mul.rn.f32": lambda a, b: fp32(a * b),
    "cvt.rn.bf16x2.f32": lambda high, low: bf16_bits(high) << 16 | bf16_bits(low),
}  # fmt: skip


def run(ptx: str, inputs: dict[str, int | float]) -> dict[str, int | float]:
    """Outputs by name. Registers that were not written, and instructions not known, raise."""
    values = dict(inputs)

    def value(operand: str) -> int | float:
        return values[operand] if operand in values else int(operand, 0)

    for statement in ptx.strip().strip("{}").split(";"):
        statement = statement.strip()
        if not statement or statement.startswith(".reg"):
            continue
        name, rest = statement.split(" ", 1)
        operands = re.findall(r"\{[^}]*\}|[$\w]+", rest)
        target, *sources = operands
        if name == "mov.b64" and target.startswith("{"):
            for at, half in enumerate(re.findall(r"\w+", target)):
                values[half] = (int(value(sources[0])) >> (32 * at)) & 0xFFFFFFFF
        elif name == "mov.b64":
            low, high = (int(value(half)) for half in re.findall(r"\w+", sources[0]))
            values[target] = low | high << 32
        elif name == "lop3.b32":
            a, b, c, table = (int(value(source)) for source in sources)
            assert table == 0xCA
            values[target] = (a & b) | (~a & c)
        else:
            values[target] = ROUNDED[name](*(value(source) for source in sources))
    return {name: values[name] for name in EARLY}


def tables(code: list[float]) -> dict[str, int]:
    """As nf4_decode.tables_of makes them, each in the operands that it takes."""
    bits = [bf16_bits(value) for value in code]
    words = [
        sum(((bits[first + at] >> shift) & 0xFF) << (8 * at) for at in range(8)) for shift in (0, 8) for first in (0, 8)
    ]
    return {f"${5 + 4 * word + copy}": words[word] for word in range(4) for copy in range(4)}


def packed(bytes_: list[int]) -> dict[str, int]:
    return {"$4": sum(byte << (8 * at) for at, byte in enumerate(bytes_))}


@pytest.mark.parametrize("kind", CODES)
@given(bytes_=BYTES)
def test_even_and_odd_columns(kind: str, bytes_: list[int]) -> None:
    code = CODES[kind]
    found = run(nf4_decode._DECODE.value, packed(bytes_) | tables(code))
    even = [of_bf16(bf16_bits(code[byte >> 4])) for byte in bytes_]
    odd = [of_bf16(bf16_bits(code[byte & 15])) for byte in bytes_]
    assert lanes(found["$0"]) + lanes(found["$1"]) == even
    assert lanes(found["$2"]) + lanes(found["$3"]) == odd


@given(bytes_=BYTES, scales=st.lists(st.floats(2**-13, 1, width=32), min_size=4, max_size=4))
def test_even_and_odd_columns_scaled(bytes_: list[int], scales: list[float]) -> None:
    bits = [bf16_bits(scale) for scale in scales]
    operands = {"$21": bits[0] | bits[1] << 16, "$22": bits[2] | bits[3] << 16}
    found = run(nf4_decode._DECODE_SCALED.value, packed(bytes_) | tables(CODES["nf4"]) | operands)
    for shift, outputs in ((4, ("$0", "$1")), (0, ("$2", "$3"))):
        expected = [
            of_bf16(bf16_bits(of_bf16(bf16_bits(CODES["nf4"][(byte >> shift) & 15])) * of_bf16(scale)))
            for byte, scale in zip(bytes_, bits, strict=True)
        ]
        assert lanes(found[outputs[0]]) + lanes(found[outputs[1]]) == expected


@pytest.mark.parametrize("kind", CODES)
@given(bytes_=BYTES, scale=st.floats(2**-13, 8, width=32))
def test_dequantisation_rounds_each_product_once(kind: str, bytes_: list[int], scale: float) -> None:
    code = CODES[kind]
    table = run(nf4_decode._TABLE.value, {"$4": scale} | {f"${5 + at}": value for at, value in enumerate(code)})
    operands = {f"${5 + 4 * word + copy}": table[f"${word}"] for word in range(4) for copy in range(4)}
    found = run(nf4_decode._DECODE_IN_ORDER.value, packed(bytes_) | operands)
    nibbles = [nibble for byte in bytes_ for nibble in (byte >> 4, byte & 15)]
    expected = [of_bf16(bf16_bits(fp32(code[nibble] * scale))) for nibble in nibbles]
    assert [value for at in range(4) for value in lanes(found[f"${at}"])] == expected
