"""Following control flow through machine code, on listings written by hand: each is a shape that ptxas emits."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

pytest.importorskip("triton", reason="retainops.testing.sass needs the tools in triton's wheel")
from retainops.testing.flow import Step, whole_tile
from retainops.testing.sass import Instruction, parse


def listing(text: str) -> list[Instruction]:
    """Instructions, one a line; "label:" names the next, and is written as a branch's operand."""
    lines = [line.strip() for line in text.strip().splitlines()]
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in lines:
        if line.endswith(":"):
            labels[line[:-1]] = 16 * len(code)
        else:
            code.append(line)
    for name, address in labels.items():
        code = [line.replace(f"<{name}>", f"{address:#x}") for line in code]
    return parse(
        "\n".join(f"  /*{16 * k:04x}*/ {line} ; /* 0x{k:016x} */\n /* 0x{k:016x} */" for k, line in enumerate(code))
    )


def accesses(steps: Sequence[Step]) -> list[str]:
    return [s.instruction.access or "" for s in steps if s.active and s.instruction.is_global]


BRANCHES = """
    ISETP.GT.AND P0, PT, R2, UR6, PT
    @!P0 BRA <whole>
    @!P1 LDG.E R4, desc[UR4][R2.64]
    @!P2 LDG.E R5, desc[UR4][R2.64+0x4]
    @!P3 LDG.E R6, desc[UR4][R2.64+0x8]
    @P4 BRA <join>
    LDG.E R7, desc[UR4][R2.64+0xc]
    BRA <join>
whole:
    LDG.E.128 R4, desc[UR4][R2.64]
join:
    STG.E.128 desc[UR4][R8.64], R4
    EXIT
"""


def test_the_unmasked_body_is_taken_and_not_the_tail() -> None:
    assert accesses(whole_tile(listing(BRANCHES))) == ["LDG.128", "STG.128"]


def test_fewer_accesses_go_before_fewer_instructions() -> None:
    """bfloat16 in one 128-bit load has to be unpacked: more instructions than two 64-bit loads."""
    unpacking = "LDG.E.128 R4, desc[UR4][R2.64]\n" + "PRMT R9, R4, 0x7632, R9\n" * 4
    narrow = "LDG.E.64 R4, desc[UR4][R2.64]\n LDG.E.64 R6, desc[UR4][R2.64+0x8]\n"
    code = listing(f"@P0 BRA <whole>\n {narrow} EXIT\n whole:\n {unpacking} EXIT")
    assert accesses(whole_tile(code)) == ["LDG.128"]


def test_the_branch_of_a_diverged_warp_is_not_taken() -> None:
    code = listing("BRA.DIV UR4, <apart>\n FADD R1, R1, R4\n FADD R1, R1, R4\n EXIT\n apart:\n EXIT")
    assert [s.instruction.base for s in whole_tile(code)] == ["BRA", "FADD", "FADD", "EXIT"]


def test_an_early_exit_is_not_taken() -> None:
    code = listing("@P0 EXIT\n LDG.E.128 R4, desc[UR4][R2.64]\n STG.E.128 desc[UR4][R8.64], R4\n EXIT")
    assert accesses(whole_tile(code)) == ["LDG.128", "STG.128"]


# `whole` is !P2. The wide access is predicated rather than branched to, so both bodies are on one straight line.
PREDICATED = """
    ISETP.GT.AND P2, PT, R2, UR6, PT
    {keep}
    @!P2 LDG.E.128 R4, desc[UR4][R2.64]
    {clobber}
    {restore}
    @!P2 BRA <join>
    @!P3 LDG.E R4, desc[UR4][R2.64]
    @!P4 LDG.E R5, desc[UR4][R2.64+0x4]
join:
    {again}
    @!P2 STG.E.128 desc[UR4][R8.64], R4
    @!P2 EXIT
    @!P3 STG.E desc[UR4][R8.64], R4
    @!P4 STG.E desc[UR4][R8.64+0x4], R5
    EXIT
"""
CLOBBER = "ISETP.GE.AND P2, PT, R9, UR7, PT"


@pytest.mark.parametrize(
    ("keep", "clobber", "restore", "again"),
    [
        ("NOP", "NOP", "NOP", "NOP"),
        ("P2R R20, PR, RZ, 0x4", CLOBBER, "ISETP.NE.AND P2, PT, R20, RZ, PT", "ISETP.NE.AND P2, PT, R20, RZ, PT"),
        ("ISETP.NE.AND P5, PT, R1, RZ, PT", "NOP", "NOP", "NOP"),
        (
            "UPLOP3.LUT UP1, UPT, UPT, UPT, UP0, 0x80, 0x0",
            "NOP",
            "NOP",
            "NOP",
        ),
    ],
    ids=["held", "kept in a general register", "another test beside", "another uniform predicate beside"],
)
def test_predicated_bodies_are_told_apart_by_their_guard(keep: str, clobber: str, restore: str, again: str) -> None:
    code = listing(PREDICATED.format(keep=keep, clobber=clobber, restore=restore, again=again))
    assert accesses(whole_tile(code)) == ["LDG.128", "STG.128"]


def test_copies_of_a_uniform_predicate_are_one_condition() -> None:
    code = listing(
        """
        UISETP.LE.AND UP0, UPT, UR7, UR10, UPT
        PLOP3.LUT P1, PT, PT, PT, UP0, 0x80, 0x8
        PLOP3.LUT P2, PT, PT, PT, UP0, 0x40, 0x0
        @P1 LDG.E.128 R4, desc[UR4][R2.64]
        @P2 LDG.E R6, desc[UR4][R2.64+0x8]
        BRA.U UP0, <join>
        @!P3 LDG.E R4, desc[UR4][R2.64]
        @P2 LDG.E R5, desc[UR4][R2.64+0x4]
    join:
        BRA.U !UP0, <tail>
        STG.E.128 desc[UR4][R8.64], R4
        EXIT
    tail:
        STG.E desc[UR4][R8.64], R4
        EXIT
        """
    )
    steps = whole_tile(code)
    assert accesses(steps) == ["LDG.128", "STG.128"]
    assert [s.instruction.opcode for s in steps if not s.active] == ["LDG.E", "BRA.U"]  # P2 is not UP0


def test_what_a_false_guard_holds_back_still_takes_its_slot() -> None:
    steps = whole_tile(
        listing(PREDICATED.format(keep="@P2 MUFU.SIN R1, R1", clobber="NOP", restore="NOP", again="NOP"))
    )
    (sin,) = [s for s in steps if s.instruction.base == "MUFU"]
    assert not sin.active


@pytest.mark.parametrize(
    ("keep", "restore", "again"),
    [
        ("NOP", "NOP", CLOBBER),
        ("P2R R20, PR, RZ, 0x4", "IMAD R20, R1, R1, RZ\n ISETP.NE.AND P2, PT, R20, RZ, PT", CLOBBER),
        ("P2R R20, PR, RZ, 0x4", "LDC.64 R19, c[0x0][0x208]\n ISETP.NE.AND P2, PT, R20, RZ, PT", CLOBBER),
        ("P2R R20, PR, RZ, 0x4", "R2P PR, R1, 0x7f", CLOBBER),
    ],
    ids=["not kept", "its register written", "its register written as one of two", "all written at once"],
)
def test_a_predicate_written_anew_is_another_condition(keep: str, restore: str, again: str) -> None:
    """Each @!P2 tests something else, so the load's two bodies may both run."""
    code = listing(PREDICATED.format(keep=keep, clobber=CLOBBER, restore=restore, again=again))
    assert accesses(whole_tile(code)) == ["LDG.128", "LDG.32", "LDG.32", "STG.128"]


@pytest.mark.parametrize("first", ["ISETP.GT.AND P2, PT, R2, UR6, PT", f"@P0 BRA <j>\n {CLOBBER}\n j:"])
def test_where_ways_meet_a_predicate_may_be_another(first: str) -> None:
    code = listing(
        f"""
        {first}
        @!P2 LDG.E.128 R4, desc[UR4][R2.64]
        @P1 BRA <meet>
        {CLOBBER}
    meet:
        @!P2 BRA <out>
        LDG.E R4, desc[UR4][R2.64]
    out:
        EXIT
        """
    )
    assert accesses(whole_tile(code)) == ["LDG.128", "LDG.32"]


SIN = """
    LDG.E R4, desc[UR4][R2.64]
    FSETP.GE.AND P0, PT, R5, 105615, PT
    @!P0 BRA <fast>
    FMUL R6, R6, R6
table:
    LDG.E.CONSTANT R3, desc[UR4][R12.64]
    IMAD.WIDE.U32 R6, R3, R3, R6
    @P1 BRA <table>
    DMUL R4, R2, R6
fast:
    STG.E desc[UR4][R8.64], R4
    EXIT
"""


def test_a_slow_path_is_taken_only_when_asked_for() -> None:
    fast, slow = (whole_tile(listing(SIN), slow) for slow in (False, True))
    assert [s.instruction.base for s in fast] == ["LDG", "FSETP", "BRA", "STG", "EXIT"]
    assert [s.instruction.base for s in slow if s.loop == "table"] == ["LDG", "IMAD", "BRA"]
    assert len(slow) == 10
    assert accesses(slow) == accesses(fast) == ["LDG.32", "STG.32"]


def test_a_subroutine_is_counted_where_it_is_called() -> None:
    code = listing(
        """
        LDG.E R4, desc[UR4][R2.64]
        @P0 BRA <join>
        CALL.REL.NOINC <divide>
    join:
        CALL.REL.NOINC <divide>
        STG.E desc[UR4][R8.64], R4
        EXIT
    divide:
        MUFU.RCP R5, R4
        FMUL R4, R4, R5
        RET.REL.NODEC R2 0x0
        """
    )
    assert [s.instruction.base for s in whole_tile(code)] == [
        "LDG",
        "BRA",
        "CALL",
        "MUFU",
        "FMUL",
        "RET",
        "STG",
        "EXIT",
    ]


LOOPS = {
    "tested at its end": """
        MOV R1, RZ
    head:
        LDG.E.128 R4, desc[UR4][R2.64]
        FADD R1, R1, R4
        @P0 BRA <head>
        STG.E desc[UR4][R8.64], R1
        EXIT
    """,
    "tested at its head": """
        MOV R1, RZ
    head:
        @P0 BRA <out>
        LDG.E.128 R4, desc[UR4][R2.64]
        FADD R1, R1, R4
        BRA <head>
    out:
        STG.E desc[UR4][R8.64], R1
        EXIT
    """,
    "with two ways back": """
        MOV R1, RZ
    head:
        @P0 BRA <out>
        @P1 BRA <other>
        LDG.E.128 R4, desc[UR4][R2.64]
        FADD R1, R1, R4
        BRA <head>
    other:
        FADD R1, R1, 1
        BRA <head>
    out:
        STG.E desc[UR4][R8.64], R1
        EXIT
    """,
    "in a loop whose head it jumps to": """
        MOV R1, RZ
    outer:
        @P0 BRA <out>
    head:
        LDG.E.128 R4, desc[UR4][R2.64]
        FADD R1, R1, R4
        @P1 BRA <head>
        BRA <outer>
    out:
        STG.E desc[UR4][R8.64], R1
        EXIT
    """,
    "left straight for the next trip of another": """
        MOV R1, RZ
    outer:
        @P0 BRA <out>
    head:
        FADD R1, R1, R4
        @P1 BRA <outer>
        LDG.E.128 R4, desc[UR4][R2.64]
        BRA <head>
    out:
        STG.E desc[UR4][R8.64], R1
        EXIT
    """,
    "entered again by its own last instruction": """
        MOV R1, RZ
    head:
        FADD R1, R1, R4
        LDG.E.128 R4, desc[UR4][R2.64]
        @P0 BRA <head>
        STG.E desc[UR4][R8.64], R1
        EXIT
    """,
}


@pytest.mark.parametrize("text", LOOPS.values(), ids=LOOPS)
def test_a_loop_is_run_once_and_marked(text: str) -> None:
    steps = whole_tile(listing(text))
    assert accesses(steps) == ["LDG.128", "STG.32"]
    assert [s.instruction.base for s in steps if s.loop == "memory"].count("FADD") == 1
    assert {s.loop for s in steps if s.instruction.base in ("MOV", "STG", "EXIT")} == {""}


def test_a_loop_at_the_first_instruction_is_found() -> None:
    steps = whole_tile(
        listing("head:\n LDG.E R4, desc[UR4][R2.64]\n @P0 BRA <head>\n STG.E desc[UR4][R8.64], R4\n EXIT")
    )
    assert [s.loop for s in steps] == ["memory", "memory", "", ""]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("BRX R4 -0x10\n EXIT", "jumps indirectly"),
        (
            "@P0 BRA <b>\n a:\n NOP\n @P1 BRA <b>\n EXIT\n b:\n NOP\n BRA <a>",
            "a cycle that is no loop",
        ),
    ],
)
def test_what_cannot_be_followed_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        whole_tile(listing(text))


def test_several_functions_are_refused() -> None:
    with pytest.raises(ValueError, match="several functions"):
        whole_tile(listing("EXIT") * 2)


WIDTHS = {
    "LDG.E R4, desc[UR4][R2.64]": "LDG.32",
    "@!P6 LDG.E.U16 R4, desc[UR4][R2.64]": "LDG.16",
    "LDG.E.U8.CONSTANT R4, desc[UR4][R2.64]": "LDG.CONSTANT.8",
    "LDG.E.EL.LTC128B.64 R4, desc[UR4][R2.64]": "LDG.64",
    "LDG.E.ENL2.256 R4, R8, desc[UR4][R2.64]": "LDG.256",
    "LDGSTS.E.BYPASS.128 [R7], desc[UR4][R2.64]": "LDGSTS.128",
    "STS.U16 [R7], R4": "STS.16",
    "RED.E.ADD.F16x2.RN.STRONG.GPU desc[UR4][R2.64], R5": "RED.32",
    "ATOMG.E.ADD.64.STRONG.GPU PT, R4, desc[UR4][R2.64], R6": "ATOMG.64",
    "LDSM.16.M88.4 R8, [R7]": "LDSM",
    "UTMALDG.2D [UR8], [UR4]": "UTMALDG",
    "FADD R1, R1, R4": None,
}


@pytest.mark.parametrize(("line", "access"), WIDTHS.items(), ids=WIDTHS)
def test_widths(line: str, access: str | None) -> None:
    assert listing(line)[0].access == access


def test_scheduling_notes_are_no_operands() -> None:
    (i,) = listing("@!P2 LDG.E.128 R4, desc[UR4][R2.64]   &req={1} &wr=0x5   ?trans6")
    assert (i.guard, i.opcode, i.operands) == ("!P2", "LDG.E.128", "R4, desc[UR4][R2.64]")


def test_text_of_another_tool_is_refused() -> None:
    with pytest.raises(ValueError, match="no instruction in the text"):
        parse("ptxas info : Used 24 registers")
