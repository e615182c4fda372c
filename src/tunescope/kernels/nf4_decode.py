"""4-bit weights to bf16 in PTX, four bytes at a time, and the same in plain Triton for what is not bf16 on a GPU."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton knows its values' types itself.)

import triton
import triton.language as tl

# Four bytes to eight values of 16 bits. A byte permute looks up four 3-bit indices at once among eight bytes, so a
# table of 16 values is read as two halves of low bytes and two of high bytes, and each nibble's top bit, spread over a
# byte, chooses between the halves. In all 20 instructions for integers, of which a multiprocessor has half the lanes
# that it has for floats: they, not the bytes, are the limit at few rows, so none is spent on shifts to a byte's place.
# $4: bytes. $5-$20: the table's low bytes 0-7 and 8-15, then its high bytes, each four times, as for every element.
_LOOK_UP = """
{
.reg .b32 sel, next, shifted, mask, a, b, low, high;
.reg .b32 l0, l1, l2, l3, h0, h1, h2, h3;
mov.b64 {l0, l1}, $5;
mov.b64 {l2, l3}, $9;
mov.b64 {h0, h1}, $13;
mov.b64 {h2, h3}, $17;
and.b32 sel, $4, 0x77777777;
shr.b32 next, sel, 16;
shl.b32 shifted, $4, 4;
prmt.b32 mask, $4, shifted, 0x9d8c;
prmt.b32 a, l0, l1, sel;
prmt.b32 b, l2, l3, sel;
lop3.b32 low, mask, b, a, 0xca;
prmt.b32 a, h0, h1, sel;
prmt.b32 b, h2, h3, sel;
lop3.b32 high, mask, b, a, 0xca;
prmt.b32 $0, low, high, 0x7351;
prmt.b32 $2, low, high, 0x6240;
prmt.b32 mask, $4, shifted, 0xbfae;
prmt.b32 a, l0, l1, next;
prmt.b32 b, l2, l3, next;
lop3.b32 low, mask, b, a, 0xca;
prmt.b32 a, h0, h1, next;
prmt.b32 b, h2, h3, next;
lop3.b32 high, mask, b, a, 0xca;
prmt.b32 $1, low, high, 0x7351;
prmt.b32 $3, low, high, 0x6240;
"""
# The same with all values in order, two a register: $0-$3 of the four bytes.
_LOOK_UP_IN_ORDER = (
    _LOOK_UP.replace("prmt.b32 $0, low, high, 0x7351;", "prmt.b32 $0, low, high, 0x4051;")
    .replace("prmt.b32 $2, low, high, 0x6240;", "prmt.b32 $1, low, high, 0x6273;")
    .replace("prmt.b32 $1, low, high, 0x7351;", "prmt.b32 $2, low, high, 0x4051;")
    .replace("prmt.b32 $3, low, high, 0x6240;", "prmt.b32 $3, low, high, 0x6273;")
)
# A table for one scale, so that each value of a block is rounded once as if it were multiplied by itself: a block has
# 64 values, and 16 that differ. $0-$3: the table as above. $4: the scale. $5-$20: the values, not scaled.
_SCALED_TABLE = (
    "{\n.reg .f32 x, y;\n.reg .b32 v<8>, l0, l1, l2, l3, h0, h1, h2, h3;\n"
    + "".join(
        f"mul.rn.f32 x, $4, ${5 + 2 * pair};\nmul.rn.f32 y, $4, ${6 + 2 * pair};\ncvt.rn.bf16x2.f32 v{pair}, y, x;\n"
        for pair in range(8)
    )
    + "".join(
        f"prmt.b32 l{four}, v{2 * four}, v{2 * four + 1}, 0x6420;\n"
        f"prmt.b32 h{four}, v{2 * four}, v{2 * four + 1}, 0x7531;\n"
        for four in range(4)
    )
    + "mov.b64 $0, {l0, l1};\nmov.b64 $1, {l2, l3};\nmov.b64 $2, {h0, h1};\nmov.b64 $3, {h2, h3};\n}"
)
# $21, $22: scales. A product as a sum with -0, since Ampere has no other on pairs.
_TIMES_SCALE = """
mov.b32 a, 0x80008000;
fma.rn.bf16x2 $0, $0, $21, a;
fma.rn.bf16x2 $1, $1, $22, a;
fma.rn.bf16x2 $2, $2, $21, a;
fma.rn.bf16x2 $3, $3, $22, a;
"""
_ARGUMENTS = "=&r,=&r,=&r,=&r,r" + ",l" * 16
_DECODE = tl.constexpr(_LOOK_UP + "}")
_DECODE_IN_ORDER = tl.constexpr(_LOOK_UP_IN_ORDER + "}")
_TABLE = tl.constexpr(_SCALED_TABLE)
_TABLE_ARGUMENTS = tl.constexpr("=&l,=&l,=&l,=&l" + ",f" * 17)
_DECODE_ARGUMENTS = tl.constexpr(_ARGUMENTS)
_DECODE_SCALED = tl.constexpr(_LOOK_UP + _TIMES_SCALE + "}")
_DECODE_SCALED_ARGUMENTS = tl.constexpr(_ARGUMENTS + ",r,r")


@triton.jit
def tables_of(code_ptr):
    """The table of 16 values, rounded to bf16: low bytes of values 0-7 and 8-15, high bytes of both."""
    low0 = tl.full((), 0, tl.int64)
    low1 = tl.full((), 0, tl.int64)
    high0 = tl.full((), 0, tl.int64)
    high1 = tl.full((), 0, tl.int64)
    for index in tl.static_range(8):
        first = tl.load(code_ptr + index).to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int64)
        second = tl.load(code_ptr + 8 + index).to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int64)
        low0 |= (first & 0xFF) << (8 * index)
        low1 |= (second & 0xFF) << (8 * index)
        high0 |= ((first >> 8) & 0xFF) << (8 * index)
        high1 |= ((second >> 8) & 0xFF) << (8 * index)
    return low0, low1, high0, high1


@triton.jit
def decode(bytes_, code_ptr, tables, dtype: tl.constexpr, USE_ASM: tl.constexpr):
    """Values of the even columns and of the odd ones, not scaled."""
    if USE_ASM:
        low0, low1, high0, high1 = tables
        even, odd = tl.inline_asm_elementwise(
            _DECODE, _DECODE_ARGUMENTS, [bytes_, low0, low1, high0, high1],
            (tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        even = tl.load(code_ptr + (bytes_ >> 4)).to(dtype)
        odd = tl.load(code_ptr + (bytes_ & 15)).to(dtype)
    return even, odd


@triton.jit
def decode_scaled(bytes_, scale, code_ptr, tables, dtype: tl.constexpr, USE_ASM: tl.constexpr):
    """The same times their scales (fp32, to be broadcast)."""
    if USE_ASM:
        low0, low1, high0, high1 = tables
        even, odd = tl.inline_asm_elementwise(
            _DECODE_SCALED, _DECODE_SCALED_ARGUMENTS, [bytes_, low0, low1, high0, high1, scale.to(tl.bfloat16)],
            (tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        even = (tl.load(code_ptr + (bytes_ >> 4)) * scale).to(dtype)
        odd = (tl.load(code_ptr + (bytes_ & 15)) * scale).to(dtype)
    return even, odd


@triton.jit
def scaled_tables(scale_B, code_ptr):
    """A table for each scale, as tables_of makes one, of the values times the scale rounded once."""
    return tl.inline_asm_elementwise(
        _TABLE, _TABLE_ARGUMENTS,
        [
            scale_B, tl.load(code_ptr), tl.load(code_ptr + 1), tl.load(code_ptr + 2), tl.load(code_ptr + 3),
            tl.load(code_ptr + 4), tl.load(code_ptr + 5), tl.load(code_ptr + 6), tl.load(code_ptr + 7),
            tl.load(code_ptr + 8), tl.load(code_ptr + 9), tl.load(code_ptr + 10), tl.load(code_ptr + 11),
            tl.load(code_ptr + 12), tl.load(code_ptr + 13), tl.load(code_ptr + 14), tl.load(code_ptr + 15),
        ],
        (tl.int64, tl.int64, tl.int64, tl.int64), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def decode_in_order(bytes_BV, tables):
    """The two values of each byte, the even column's in the low half of an int32. tables: one for each row of bytes.

    A thread has at least four bytes of a row together, as it loads and stores no less: so the table of the first byte
    is that of all four.
    """
    low0_B, low1_B, high0_B, high1_B = tables
    return tl.inline_asm_elementwise(
        _DECODE_IN_ORDER, _DECODE_ARGUMENTS,
        [bytes_BV, low0_B[:, None], low1_B[:, None], high0_B[:, None], high1_B[:, None]],
        tl.int32, is_pure=True, pack=4,
    )  # fmt: skip
