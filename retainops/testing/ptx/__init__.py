"""Layer 2 of verification: the PTX that Triton compiled, executed on CPU tensors.

    from retainops.testing.driver import driver
    from retainops.testing.ptx import run

    with driver("sm_90", execute=run):      # or: simulated_gpu(engine="ptx")
        kernel[(4,)](x, y, n, BLOCK=1024)   # compiled for an H100, executed here; y holds what the GPU would store

Triton's interpreter (layer 1) checks what the source says. This checks what the compiler made of it: the vector
widths it chose, its sin and exp, its reductions through shuffles and shared memory, its rounding, bit for bit.

    Emulator(ptx).launch(grid, threads, args, shared)   executes PTX at hand, and returns
    Counters                                            instructions, bytes, and sectors (coalescing)
    PTXError                                            out of bounds, misaligned, divergence at a barrier or
                                                        shuffle, an unsupported instruction

What is exact: integer and floating-point arithmetic, fma and conversions included (`numerics`), and so everything
libdevice builds from them. What is not:

- `.approx` instructions (`tl.exp`, `tl.rsqrt`, `fast_sinf`, ...) give the correctly rounded result (`floating`).
- A NaN may carry another payload.
- The threads of a CTA go in step between branches, so a race between them that needs a barrier does not show.
  CTAs run beside each other in batches, in an order that no GPU promises either.
- Bounds are those of the tensors that were passed (`spaces`): gaps between the rows of a view count as inside. A
  pointer that a kernel loads from memory instead of getting it as an argument is out of bounds.

What raises: atomics, tensor cores, TMA, clusters. `instructions` says how to add an instruction; the way of one
through the modules is `parse` (text to `program`), `instructions` (bound to its operands), `machine` (executed).
"""

# The group modules fill the instruction table when they are imported.
from retainops.testing.ptx import control, convert, floating, integer, logic, memory  # noqa: F401
from retainops.testing.ptx.counters import Counters
from retainops.testing.ptx.launch import Emulator, run
from retainops.testing.ptx.types import PTXError

__all__ = ["Counters", "Emulator", "PTXError", "run"]
