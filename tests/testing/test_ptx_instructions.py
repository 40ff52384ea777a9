"""The PTX emulator on hand-written PTX: one instruction at a time, calls, divergence, and faults."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from retainops.testing.ptx import Emulator, PTXError

PTX = """
.version 8.0
.target sm_90
.address_size 64
.visible .entry k(.param .u64 .ptr .global .align 8 X, .param .u64 .ptr .global .align 8 Y)
{
    .reg .pred %p<4>; .reg .b16 %rs<4>; .reg .b32 %r<9>; .reg .b64 %rd<9>;
    ld.param.b64 %rd7, [X];
    ld.param.b64 %rd8, [Y];
    ld.global.v2.b64 {%rd1, %rd2}, [%rd7];
    ld.global.b64 %rd3, [%rd7+16];
    cvt.u32.u64 %r1, %rd1; cvt.u32.u64 %r2, %rd2; cvt.u32.u64 %r3, %rd3; cvt.u16.u32 %rs1, %r1; cvt.u16.u32 %rs2, %r2;
    mov.b64 %rd4, 0; mov.b32 %r4, 0; mov.u32 %r0, %tid.x; setp.eq.b32 %p0, %r0, 9999;
    { .reg .b32 %r1; mov.b32 %r1, 7; }
    BODY
    st.global.b64 [%rd8], %rd4;
    ret;
}
"""


def execute(body: str, *inputs: int, threads: int = 32, module: str = PTX) -> int:
    """Runs instructions on inputs in %rd1 to %rd3 (%r1.., %rs1..: their lower bits); the result is taken from %rd4."""
    numbers = [n % 2**64 for n in (*inputs, 0, 0, 0)[:3]]
    x = torch.from_numpy(np.array([*numbers, 0], np.uint64).view(np.int64))
    y = torch.zeros(1, dtype=torch.int64)
    Emulator(module.replace("BODY", body)).launch((1,), threads, [x, y])
    return int(y[0]) % 2**64


MODULE = (
    PTX.replace(
        ".visible .entry",
        """
.extern .func missing(.param .b32 a);
.func (.param .b64 result) twice(.param .b64 a);
.const .align 8 .b64 table[3] = {5, 7, -9};
.global .align 4 .b32 word = 11;
.shared .align 8 .b8 kept[64];
.visible .entry""",
    )
    + """
.func (.param .b64 result) twice(.param .b64 a)
{
    .reg .b64 %rd<3>;
    ld.param.b64 %rd1, [a];
    add.s64 %rd2, %rd1, %rd1;
    st.param.b64 [result], %rd2;
    ret;
}
"""
)
CALL = """{ .param .b64 a; .param .b64 r; st.param.b64 [a], %rd1;
    call.uni (r), twice, (a); ld.param.b64 %rd4, [r]; }"""


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("ld.const.b64 %rd4, [table+16];", -9),
        ("mov.b64 %rd5, table; ld.const.b64 %rd4, [%rd5+8];", 7),
        ("ld.global.s32 %rd4, [word];", 11),
        (CALL, 42),
        ("setp.eq.u32 %p1, %r0, 0; mov.b64 %rd4, 1; @%p1 bra C; bra E; C: " + CALL + " E:", 42),  # of one thread
        (".local .align 8 .b8 own[16]; mov.b64 %rd5, own; cvta.local.u64 %rd6, %rd5; st.b32 [%rd6+4], %r1; "
         "ld.local.s32 %rd4, [own+4];", 21),
        ("cvt.u64.u32 %rd5, %r0; mov.b64 %rd6, kept; mad.lo.s64 %rd5, %rd5, 2, %rd6; cvta.shared.u64 %rd5, %rd5; "
         "cvt.u16.u32 %rs1, %r0; st.b16 [%rd5], %rs1; bar.warp.sync -1; ld.shared.u16 %rd4, [kept+34];", 17),
        ("cvta.to.global.u64 %rd5, %rd7; ld.b64 %rd4, [%rd5];", 21),
    ],
)  # fmt: skip
def test_functions_tables_and_generic_addresses(body, expected):
    assert execute(body, 21, module=MODULE) == expected % 2**64


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{ .param .b32 a; st.param.b32 [a], 1; call.uni missing, (a); }", "missing, which is not in this PTX"),
        ("st.const.b64 [table], %rd1;", "a store to the constant table table"),
        ("ld.const.b64 %rd4, [table+24];", "byte 24 of table, which has 24 bytes"),
        ("call.uni (%r4), %rd4, (%r1);", "function pointer"),
    ],
)
def test_faults_in_functions_and_tables(body, message):
    with pytest.raises(PTXError, match=message):
        execute(body, module=MODULE)


def test_divergence_at_a_barrier_and_at_a_shuffle():
    with pytest.raises(PTXError, match=r"divergence.*\n.*32 threads wait at bar.sync 0.*thread 32 of CTA"):
        execute("setp.lt.u32 %p1, %r0, 32; @%p1 bra B; bar.sync 0; bra E; B: bar.sync 1; E:", threads=64)
    with pytest.raises(PTXError, match=r"divergence.*\n.*16 threads wait at shfl"):
        execute("setp.lt.u32 %p1, %r0, 16; @%p1 bra E; shfl.sync.bfly.b32 %r4, %r1, 1, 31, -1; E:")
    # Where the paths meet again nobody waits, whichever way the code is laid out.
    execute("setp.lt.u32 %p1, %r0, 16; @%p1 bra F; B: shfl.sync.bfly.b32 %r4, %r1, 1, 31, -1; bra E; F: bra B; E:")
    # Threads that have ended are not waited for at a barrier.
    execute("setp.lt.u32 %p1, %r0, 16; @%p1 ret; bar.sync 0;", threads=64)
    with pytest.raises(PTXError, match="a shuffle reads from a thread that does not take part"):
        execute("setp.lt.u32 %p1, %r0, 16; @!%p1 bra E; shfl.sync.idx.b32 %r4, %r1, 20, 31, 0xffff; E:")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 %r4, [%rd4];", "belongs to no argument"),
        ("ld.shared.b32 %r4, [%r4];", "out of bounds"),
        ("trap;", "failed assertion"),
        ("mov.u32 %r4, %clock;", "special register %clock"),
        ("atom.global.add.u32 %r4, [%rd8], 1;", "atomics"),
        ("mov.b32 %r4, %unknown;", "special register %unknown"),
    ],
)
def test_faults(body, message):
    with pytest.raises(PTXError, match=message):
        execute(body)


def test_unsupported_instructions_raise_when_they_are_reached():
    with pytest.raises(PTXError, match=r"(?s)unsupported instruction frob.rn.f32; to add it, register.*PTX line 15"):
        execute("frob.rn.f32 %r3, %r1, %r2;", 1, 2)
    with pytest.raises(PTXError, match=r"unsupported instruction add.rna.f32"):  # a rounding mode nobody looked at
        execute("add.rna.f32 %r3, %r1, %r2;", 1, 2)
    with pytest.raises(PTXError, match=r"mul.lo.s32 with 3 sources is not emulated"):
        execute("mul.lo.s32 %r3, %r1, %r2, %r2;", 1, 2)
    execute("@!%p0 bra DONE; frob.rn.f32 %r3, %r1, %r2; DONE:", 1, 2)  # not reached


def test_misuse():
    with pytest.raises(PTXError, match="no .entry"):
        Emulator(".version 8.0\n")
    with pytest.raises(PTXError, match="unknown name 'nonsense' in PTX line 15: mov.b32 %r1, nonsense"):
        execute("mov.b32 %r1,\n nonsense;")
    with pytest.raises(PTXError, match="cannot read PTX line"):
        Emulator(PTX.replace("BODY", "#define"))
    with pytest.raises(PTXError, match="has 2 parameters; 3 were passed"):
        Emulator(PTX.replace("BODY", "")).launch((1,), 32, [1, 2, 3])
    with pytest.raises(PTXError, match="48 threads in a CTA; expected a multiple of 32"):
        Emulator(PTX.replace("BODY", "")).launch((1,), 48, [1, 2])


# Single instructions: (instructions, inputs, what is left in %rd4)

F32 = {x: int(np.float32(x).view(np.uint32)) for x in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, -1.0, math.inf, -math.inf, 1e30)}
NAN, MINUS_ZERO, TINY = 0x7FC00000, 0x80000000, 0x00000001
INT_MIN = 2**31


def r4(instruction: str) -> str:
    return f"{instruction}; cvt.u64.u32 %rd4, %r4"


INSTRUCTIONS = [
    ("mul.hi.u64 %rd4, %rd1, %rd2", (2**64 - 3, 2**63 + 12345), (2**64 - 3) * (2**63 + 12345) >> 64),
    ("mul.hi.s64 %rd4, %rd1, %rd2", (-3, 2**62 + 5), (-3 * (2**62 + 5)) >> 64),
    (r4("mul.hi.s32 %r4, %r1, %r2"), (-7, 2**30 + 3), (-7 * (2**30 + 3)) >> 32 & 0xFFFFFFFF),
    ("mul.wide.s32 %rd4, %r1, %r2", (-7, 2**30), -7 * 2**30),
    ("mad.wide.u32 %rd4, %r1, %r2, %rd3", (2**32 - 1, 2**32 - 1, 5), (2**32 - 1) ** 2 + 5),
    ("mad.lo.s64 %rd4, %rd1, %rd2, %rd3", (-5, 2**40, 1), -5 * 2**40 + 1),
    ("add.cc.u32 %r4, %r1, %r2; addc.u32 %r5, %r3, 0; mov.b64 %rd4, {%r4, %r5}", (2**32 - 1, 2, 7), 8 << 32 | 1),
    ("sub.cc.u32 %r4, %r1, %r2; subc.u32 %r5, %r3, 0; mov.b64 %rd4, {%r4, %r5}", (1, 2, 7), 6 << 32 | 2**32 - 1),
    (
        "mad.lo.cc.u32 %r4, %r1, %r2, %r3; madc.hi.u32 %r5, %r1, %r2, 0; mov.b64 %rd4, {%r4, %r5}",
        (2**32 - 1, 2**32 - 1, 2**32 - 1),
        (2**32 - 1) ** 2 + 2**32 - 1,
    ),
    ("div.s64 %rd4, %rd1, %rd2", (-7, 2), -3),
    ("rem.s64 %rd4, %rd1, %rd2", (-7, 2), -1),
    (r4("div.u32 %r4, %r1, %r2"), (5, 0), 2**32 - 1),
    (r4("rem.u32 %r4, %r1, %r2"), (5, 0), 5),
    (r4("div.s32 %r4, %r1, %r2"), (INT_MIN, -1), INT_MIN),
    (r4("shl.b32 %r4, %r1, %r2"), (1, 32), 0),
    (r4("shr.s32 %r4, %r1, %r2"), (-8, 40), 2**32 - 1),
    (r4("shr.u32 %r4, %r1, %r2"), (2**31, 31), 1),
    (r4("shf.l.wrap.b32 %r4, %r1, %r2, %r3"), (0x80000001, 0x12345678, 36), 0x23456788),
    (r4("shf.r.clamp.b32 %r4, %r1, %r2, %r3"), (1, 0x12345678, 99), 0x12345678),
    (r4("bfe.u32 %r4, %r1, 4, 8"), (0xABCDE,), 0xCD),
    (r4("bfe.s32 %r4, %r1, 4, 8"), (0xABCDE,), 0xFFFFFFCD),
    (r4("bfe.s32 %r4, %r1, 28, 8"), (0x90000000,), 0xFFFFFFF9),
    (r4("bfe.u32 %r4, %r1, 4, 0"), (0xABCDE,), 0),
    (r4("bfi.b32 %r4, %r1, %r2, 8, 8"), (0x1AB, 0x12345678), 0x1234AB78),
    (r4("clz.b32 %r4, %r1"), (0,), 32),
    (r4("clz.b64 %r4, %rd1"), (2**33,), 30),
    (r4("popc.b64 %r4, %rd1"), (2**64 - 2,), 63),
    (r4("brev.b32 %r4, %r1"), (0b1011,), 0b1101 << 28),
    (r4("bfind.s32 %r4, %r1"), (-5,), 2),
    (r4("bfind.u32 %r4, %r1"), (0,), 2**32 - 1),
    (r4("prmt.b32 %r4, %r1, %r2, 0x7C20"), (0x33221100, 0x778899AA), 0x77FF2200),
    (r4("bfind.shiftamt.u32 %r4, %r1"), (1,), 31),
    ("mad.hi.s64 %rd4, %rd1, %rd2, %rd3", (-3, 2**62, 10), (-3 * 2**62 >> 64) + 10),
    ("cnot.b64 %rd4, %rd1", (0,), 1),
    ("mov.b64 %rd4, {%r2, %r1}", (1, 2), 1 << 32 | 2),
    (r4("cvt.sat.u8.s32 %r4, %r1"), (300,), 255),
    ("cvt.u64.u32 %rd4, %laneid", (), 31),
    (
        "mov.b32 %r5, -1; setp.lt.u32 %p1, %r0, 3; @!%p1 bra E; activemask.b32 %r5; E:"
        + r4("redux.sync.min.u32 %r4, %r5, -1"),
        (),
        7,
    ),
    (r4("lop3.b32 %r4, %r1, %r2, %r3, 0xE8"), (0b1100, 0b1010, 0b0110), 0b1110),
    (r4("min.s32 %r4, %r1, %r2"), (-1, 1), 2**32 - 1),
    (r4("min.u32 %r4, %r1, %r2"), (-1, 1), 1),
    ("cvt.s64.s16 %rd4, %rs1", (0x8000,), -0x8000),
    ("cvt.u64.u16 %rd4, %rs1", (0x8000,), 0x8000),
    ("cvt.s64.s8 %rd4, %r1", (0x80,), -128),
    (r4("min.f32 %r4, %r1, %r2"), (MINUS_ZERO, 0), MINUS_ZERO),
    (r4("max.f32 %r4, %r1, %r2"), (MINUS_ZERO, 0), 0),
    (r4("max.f32 %r4, %r1, %r2"), (NAN, F32[1.0]), F32[1.0]),
    (r4("max.NaN.f32 %r4, %r1, %r2"), (NAN, F32[1.0]), NAN),
    (r4("max.f32 %r4, %r1, %r2, %r3"), (F32[1.0], F32[3.0], F32[2.0]), F32[3.0]),
    (r4("min.xorsign.abs.f32 %r4, %r1, %r2"), (F32[-1.0], F32[3.0]), F32[-1.0]),
    (r4("add.ftz.f32 %r4, %r1, %r2"), (TINY, TINY), 0),
    (r4("add.f32 %r4, %r1, %r2"), (TINY, TINY), 2),
    (r4("mul.ftz.f32 %r4, %r1, %r2"), (0x80800000, F32[0.5]), MINUS_ZERO),
    (r4("add.sat.f32 %r4, %r1, %r2"), (F32[1.0], F32[1.0]), F32[1.0]),
    (r4("add.rz.f32 %r4, %r1, %r2"), (F32[1.0], 0xB3000000 - 2**23), 0x3F7FFFFF),  # 1 - 2**-26
    (r4("add.rp.f32 %r4, %r1, %r2"), (F32[1.0], TINY), 0x3F800001),
    (r4("add.rm.f32 %r4, %r1, %r2"), (F32[-1.0], 0x80000001), 0xBF800001),
    (r4("mul.rz.f32 %r4, %r1, %r2"), (0x7F7FFFFF, F32[2.0]), 0x7F7FFFFF),
    (r4("div.approx.f32 %r4, %r1, %r2"), (F32[1.0], 0x7F000000), 0),
    (r4("div.full.f32 %r4, %r1, %r2"), (F32[-1.0], 0), F32[-math.inf]),
    (r4("rcp.approx.ftz.f32 %r4, %r1"), (MINUS_ZERO,), F32[-math.inf]),
    (r4("copysign.f32 %r4, %r1, %r2"), (F32[-1.0], F32[3.0]), F32[3.0] | MINUS_ZERO),
    (r4("cvt.rzi.s32.f32 %r4, %r1"), (F32[-math.inf],), INT_MIN),
    (r4("cvt.rzi.u32.f32 %r4, %r1"), (F32[-1.0],), 0),
    (r4("cvt.rzi.s32.f32 %r4, %r1"), (NAN,), 0),
    ("cvt.rzi.s64.f32 %rd4, %r1", (F32[1e30],), 2**63 - 1),
    (r4("cvt.rni.s32.f32 %r4, %r1"), (F32[0.5],), 0),
    (r4("cvt.rni.s32.f32 %r4, %r1"), (F32[1.5],), 2),
    (r4("cvt.rn.f32.s64 %r4, %rd1"), (2**24 + 1 + 2**40,), int(np.float32(2**24 + 1 + 2**40).view(np.uint32))),
    (r4("cvt.rn.f32.u64 %r4, %rd1"), (2**63 + 2**39 + 1,), 0x5F000001),  # rounding to double first would tie
    ("cvt.rn.bf16.f64 %rs3, %rd1; cvt.u64.u16 %rd4, %rs3", (0x3FF0100000000001,), 0x3F81),  # and here
    ("cvt.rz.bf16.f32 %rs3, %r1; cvt.u64.u16 %rd4, %rs3", (0x3F80FFFF,), 0x3F80),
    (r4("cvt.rn.bf16x2.f32 %r4, %r1, %r2"), (F32[1.0], F32[2.0]), 0x3F804000),
    (r4("cvt.rn.f16x2.f32 %r4, %r1, %r2"), (F32[1.0], F32[2.0]), 0x3C004000),
    (r4("fma.rn.bf16x2 %r4, %r1, %r2, %r3"), (0x3F804000, 0x40404040, 0x3F803F80), 0x408040E0),
    (r4("max.bf16x2 %r4, %r1, %r2"), (0x3F80C000, 0x40403F80), 0x40403F80),
    ("setp.gtu.f32 %p1, %r1, %r2; selp.b64 %rd4, 1, 2, %p1", (NAN, 0), 1),
    ("setp.gt.f32 %p1, %r1, %r2; selp.b64 %rd4, 1, 2, %p1", (NAN, 0), 2),
    ("setp.ne.f32 %p1, %r1, %r2; selp.b64 %rd4, 1, 2, %p1", (NAN, 0), 2),
    ("setp.nan.f32 %p1|%p2, %r1, %r2; selp.b64 %rd4, 1, 2, %p2", (NAN, 0), 2),
    ("setp.lt.and.s32 %p1, %r1, %r2, !%p0; selp.b64 %rd4, 1, 2, %p1", (-1, 1), 1),
    ("setp.lt.xor.s32 %p1|%p2, %r1, %r2, %p0; selp.b64 %rd4, 1, 2, %p2", (-1, 1), 2),
    ("setp.gt.bf16x2 %p1|%p2, %r1, %r2; selp.b64 %rd4, 1, 2, %p1", (0x3F80C000, 0x3F003F00), 2),
    ("testp.subnormal.f32 %p1, %r1; selp.b64 %rd4, 1, 2, %p1", (TINY,), 1),
    ("vote.sync.ballot.b32 %r4, %p0, -1; cvt.u64.u32 %rd4, %r4", (), 0),
    ("setp.gt.u32 %p1, %r0, 29; vote.sync.ballot.b32 %r4, %p1, -1; cvt.u64.u32 %rd4, %r4", (), 3 << 30),
    (r4("redux.sync.add.s32 %r4, %r0, -1"), (), 31 * 16),
    (r4("shfl.sync.up.b32 %r5|%p1, %r0, 1, 0, -1; redux.sync.add.s32 %r4, %r5, -1"), (), 30 * 31 // 2),
    (r4("shfl.sync.down.b32 %r5, %r0, 1, 31, -1; redux.sync.add.s32 %r4, %r5, -1"), (), 31 * 16 + 31),
    (r4("shfl.sync.idx.b32 %r5, %r0, 5, 0x181f, -1; redux.sync.max.u32 %r4, %r5, -1"), (), 29),
]  # fmt: skip


@pytest.mark.parametrize(("body", "inputs", "expected"), INSTRUCTIONS, ids=[row[0][:40] for row in INSTRUCTIONS])
def test_instruction(body, inputs, expected):
    assert execute(body + ";", *inputs) == expected % 2**64
