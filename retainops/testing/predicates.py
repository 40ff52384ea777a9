"""Which guards in machine code test the same condition.

The compiler computes `whole` once and then guards with it in many places: branches, predicated accesses, an early
EXIT. With only seven predicate registers it copies it about: from a uniform one (`PLOP3.LUT P2, PT, PT, PT, UP0, 0x80,
0x0`), into a general register (`P2R R8, PR, RZ, 0x4`) and back (`ISETP.NE.AND P2, PT, R8, RZ, PT`). Following the
copies tells which guards test the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from retainops.testing.sass import Instruction

Condition = tuple[str, int]  # the register that held it first, and the address where that was written
Guard = tuple[Condition, bool]  # acts when the condition has this value
_State = dict[str, Guard]  # what registers hold: "P0", "UP1", and "R8" for a predicate kept in a general register
_LUT_SAME, _LUT_NOT = "0x80", "0x40"  # of PLOP3 with both other inputs true: its third input, or the opposite


def guards(
    order: list[int], blocks: Mapping[int, list[Instruction]], successors: Callable[[int], list[int | None]]
) -> dict[int, Guard]:
    """The condition of every guarded instruction and every conditional branch, by address.

    Args:
        order: the blocks, each after all that lead to it but for loops.
        blocks: their instructions, by the address of the first.
        successors: where control can go from a block; None is the end.
    """
    into: dict[int, _State] = {order[0]: {}}
    changed = True
    while changed:
        changed = False
        for block in order:
            state = dict(into[block])
            for i in blocks[block]:
                _execute(state, i)
            for s in successors(block):
                if s is not None and (merged := _merge(into.get(s), state, s)) != into.get(s):
                    into[s], changed = merged, True
    found: dict[int, Guard] = {}
    for block in order:
        state = dict(into[block])
        for i in blocks[block]:
            if i.condition and "&" not in i.condition:
                register, plain = i.condition.lstrip("!"), not i.condition.startswith("!")
                condition, value = state.get(register, _arriving(register, block))
                found[i.address] = condition, value == plain
            _execute(state, i)
    return found


def _merge(known: _State | None, state: _State, block: int) -> _State:
    """What is known where ways meet: a register that they leave different holds a condition of its own."""
    if known is None:
        return dict(state)
    merged = {}
    for register in known.keys() & state.keys():
        same = known[register] == state[register]
        if same or not register.startswith("R"):
            merged[register] = known[register] if same else _arriving(register, block)
    return merged


def _arriving(register: str, block: int) -> Guard:
    return (f"{register} on arrival", block), True


def _execute(state: _State, i: Instruction) -> None:
    """Bring what the registers hold up to date with one instruction."""
    if i.base == "BRA":  # `BRA.U UP0, 0xca0` reads its operands
        return
    operands = [o.strip().removesuffix(".reuse") for o in i.operands.split(",")]
    copied = None if i.guard else _copied(state, i, operands)
    if i.base in ("R2P", "CALL"):
        for register in [r for r in state if i.base == "CALL" or r.startswith("P")]:
            state[register] = (register, i.address), True
    for operand in operands[:3]:  # results stand first; to take a source for one only forgets what was known
        if re.fullmatch(r"U?P\d", operand):
            state[operand] = (operand, i.address), True
    if written := re.fullmatch(r"R(\d+)", operands[0]):
        for n in range(_registers(i)):
            state.pop(f"R{int(written[1]) + n}", None)
    if copied:
        state[operands[0]] = copied


def _copied(state: _State, i: Instruction, operands: list[str]) -> Guard | None:
    """The guard that an instruction copies to its first operand, if that is all it does."""
    if i.base == "P2R" and operands[1:3] == ["PR", "RZ"]:
        bits = int(operands[3], 16)
        return state.get(f"P{bits.bit_length() - 1}") if bits.bit_count() == 1 else None
    if i.opcode == "ISETP.NE.AND" and operands[1:2] + operands[3:] == ["PT", "RZ", "PT"]:
        return state.get(operands[2])
    is_plop = i.opcode in ("PLOP3.LUT", "UPLOP3.LUT") and operands[2:4] in (["PT", "PT"], ["UPT", "UPT"])
    if is_plop and operands[4] in state and operands[5] in (_LUT_SAME, _LUT_NOT):
        condition, value = state[operands[4]]
        return condition, value == (operands[5] == _LUT_SAME)
    return None


def _registers(i: Instruction) -> int:
    """How many 32-bit registers an instruction may write."""
    if i.bits:
        return max(1, i.bits // 32)
    return 2 if re.search(r"64|WIDE|CS2R|^D", i.opcode) else 1
