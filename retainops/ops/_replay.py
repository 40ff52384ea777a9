"""What the host does for a call, written down as a short function, and done again by that function.

An op's `forward` and `backward` decide much in Python: which kernels, of which tiles, over which tensors. All of it
follows from the layouts of what they are given. So when calls of the same layouts come again, the allocations and
launches of one are noted; from then on they are made by a function of these lines and no others, such as

    def replay(slots, leaves, x0, x1):
        t0 = empty_strided((1024,), (1,), dtype=c0, device=c1)
        start0(0, (new(Operand, (x0, c2)), new(Operand, (x1, c2))), new(Operand, (t0, c2)), c3, c4)
        return (t0,)

This is a CUDA graph's idea for the host: the same kernels on new memory, in any stream.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch

from retainops.ops import _launch
from retainops.ops._notes import Notes, Replay
from retainops.ops._operands import ALIGNED
from retainops.ops._plan import Plan
from retainops.ops._saved import Unread
from retainops.registry import Op
from retainops.slots import Slot
from retainops.stats import Stats

Tensor = torch.Tensor
NO_SLOTS: Mapping[str, Any] = {}
NEVER = -1
PLAIN = 3
"""How many calls go by before one is noted, which takes as long as several: some layouts come twice and never again."""
MOST = 4096
"""Calls that are known. When there are more all are forgotten, and noted again as they come."""
_known: dict[Hashable, Replay | int] = {}
"""What replays a call; or how many there were; or NEVER: of these not all could be noted."""
_launch.forgotten.append(_known.clear)


def forward(kernels: Any, inputs: Sequence[Any], layout: Plan) -> tuple[Tensor | None, ...]:
    """kernels.forward(inputs, layout)."""
    if (device := _launch.current(layout.device)) is None:
        return kernels.forward(inputs, layout)
    # The plan stands for all of a tensor's layout but its alignment.
    signs = [x.data_ptr() % ALIGNED if isinstance(x, Tensor) else sign_of_other(x) for x in inputs]
    key = (kernels, maths_of(kernels), device, layout, *signs)
    return replayed(key, lambda *given: kernels.forward(given, layout), inputs)


def backward(
    kernels: Any,
    layout: Plan,
    op: Op,
    inputs: Sequence[Any],
    dys: Sequence[Tensor | None],
    needed: Sequence[bool],
    slots: Mapping[str, Slot],
    leaves: Mapping[str, Tensor],
) -> list[Tensor | None]:
    """kernels.backward(op, inputs, dys, needed, slots, leaves), as of a forward with this plan."""
    device = _launch.current(layout.device)
    asked = asked_of(slots, leaves) if leaves else ()
    if device is None or asked is None:
        return kernels.backward(op, inputs, dys, needed, slots, leaves)
    count, given = len(inputs), (*inputs, *dys)
    key = (kernels, maths_of(kernels), device, layout, needed, *asked, *map(sign, given))

    def do(*given: Any) -> list[Tensor | None]:
        return kernels.backward(op, given[:count], given[count:], needed, slots, leaves)

    return replayed(key, do, given, slots, leaves)


def replayed(
    key: Hashable,
    do: Callable[..., Any],
    given: Sequence[Any],
    slots: Mapping[str, Slot] = NO_SLOTS,
    leaves: Mapping[str, Tensor] = NO_SLOTS,
) -> Any:
    """do(*given): some times as it is, then once with notes, from then on by the notes.

    Args:
        key: all that `do` depends on but the tensors' pointers: layouts and alignment, devices, numbers.
        do: gives tensors and None, in tuples and lists.
        given: tensors, and others.
        slots, leaves: what gives statistics to slots finds them here.
    """
    known = _known.get(key, 0)
    if callable(known):
        return known(slots, leaves, *given)
    if known == PLAIN:
        notes = Notes(given, slots)
        results = notes.take(do)
        if not notes.is_early:
            _known[key] = notes.replay(results) or NEVER
        return notes.given_back(results)
    results = do(*given)
    if known != NEVER:
        if len(_known) >= MOST and not known:
            _known.clear()
        _known[key] = known + 1
    return results


def asked_of(slots: Mapping[str, Slot], leaves: Mapping[str, Tensor]) -> list[Hashable] | None:
    """What is asked of each point; None: of some point what is no replay's to answer, a buffer of the caller's."""
    if len(set(slots.values())) < len(slots):  # points that share a slot
        return None
    asked: list[Hashable] = []
    for name in leaves:
        want = slots[name].want
        if isinstance(want, Stats):
            asked.append((name, want.names, want.over, want.grad))
        elif want is None:
            asked.append(name)
        else:
            return None
    return asked


def maths_of(kernels: Any) -> Any:
    """What makes the functions of an elementwise op: whoever tries others puts them in its place."""
    return getattr(kernels, "maths", None)


def sign(x: Any) -> Hashable:
    """All that a call depends on of something that it is given, but for a tensor's pointer."""
    kind = type(x)
    if kind is Tensor or kind is torch.nn.Parameter:
        return x.shape, x.stride(), x.dtype, x.data_ptr() % ALIGNED
    if kind is Unread:
        return kind, x.shape, x.strides, x.dtype
    return sign_of_other(x)


def sign_of_other(x: Any) -> Hashable:
    """The same of a number, a flag, a name: 1, 1.0 and True differ, and so do 0.0 and -0.0. A NaN is like any other."""
    return None if x is None else (type(x), x if x and x == x else str(x))
