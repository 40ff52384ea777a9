"""Which guards in machine code test the same condition.

The compiler computes `whole` once and then guards with it in many places: branches, predicated accesses, an early
EXIT. With only seven predicate registers it also keeps it in a general register meanwhile (`P2R R8, PR, RZ, 0x4`)
and takes it back (`ISETP.NE.AND P2, PT, R8, RZ, PT`). Value numbering sees through that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from retainops.testing.sass import Instruction

Condition = tuple[str, int]  # one computed condition: the register and the address at which it was written or merged
Guard = tuple[Condition, bool]  # an instruction acts when this condition has this value
_State = dict[str, Condition]  # what registers hold: "P0", "UP1", and "R8" for a predicate kept in a general register


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
                register = i.condition.lstrip("!")
                found[i.address] = (state.get(register, _arriving(register, block)), not i.condition.startswith("!"))
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


def _arriving(register: str, block: int) -> Condition:
    return f"{register} on arrival", block


def _execute(state: _State, i: Instruction) -> None:
    """Bring what the registers hold up to date with one instruction."""
    operands = [o.strip().removesuffix(".reuse") for o in i.operands.split(",")]
    kept = re.fullmatch(r"PR, RZ, (0x[0-9a-f]+)", ", ".join(operands[1:]))
    if i.base == "P2R" and kept and not i.guard:
        bits = int(kept[1], 16)
        held = state.get(f"P{bits.bit_length() - 1}") if bits.bit_count() == 1 else None
        state.pop(operands[0], None)
        if held:
            state[operands[0]] = held
        return
    if i.opcode == "ISETP.NE.AND" and operands[1:2] + operands[3:] == ["PT", "RZ", "PT"] and not i.guard:
        if held := state.get(operands[2]):
            state[operands[0]] = held
            return
    if i.base in ("R2P", "CALL"):
        for register in [r for r in state if i.base == "CALL" or r.startswith("P")]:
            state[register] = (register, i.address)
    for operand in operands[:3]:  # the results stand first; taking a source for one only forgets what was known
        if re.fullmatch(r"U?P\d", operand):
            state[operand] = (operand, i.address)
    if written := re.fullmatch(r"R(\d+)", operands[0]):
        for n in range(_registers(i)):
            state.pop(f"R{int(written[1]) + n}", None)


def _registers(i: Instruction) -> int:
    """How many 32-bit registers an instruction may write."""
    if i.bits:
        return max(1, i.bits // 32)
    return 2 if re.search(r"64|WIDE|CS2R|^D", i.opcode) else 1
