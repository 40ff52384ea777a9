"""The pointwise family: y = f(c), c = a o b, each in one kernel, whose point is c."""

# Made from the tables of retainops/ops/pointwise.py by `python -m retainops.ops._stubs`.

import torch

from retainops.retained import Retained

def mul_sin(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """sin(a * b) in one kernel, with the gradient of c = a * b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a * b.

    Returns:
        sin(a * b), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a * b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.mul_sin(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def mul_cos(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """cos(a * b) in one kernel, with the gradient of c = a * b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a * b.

    Returns:
        cos(a * b), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a * b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.mul_cos(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def mul_tanh(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """tanh(a * b) in one kernel, with the gradient of c = a * b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a * b.

    Returns:
        tanh(a * b), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a * b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.mul_tanh(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def mul_sigmoid(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """sigmoid(a * b) in one kernel, with the gradient of c = a * b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a * b.

    Returns:
        sigmoid(a * b), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a * b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.mul_sigmoid(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def mul_exp(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """exp(a * b) in one kernel, with the gradient of c = a * b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a * b.

    Returns:
        exp(a * b), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a * b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.mul_exp(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def mul_relu(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """relu(a * b) in one kernel, with the gradient of c = a * b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a * b.

    Returns:
        relu(a * b), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a * b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.mul_relu(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def mul_gelu(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """gelu(a * b) in one kernel, with the gradient of c = a * b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a * b.

    Returns:
        gelu(a * b), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a * b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.mul_gelu(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def mul_gelu_tanh(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """gelu(a * b, approximate='tanh') in one kernel, with the gradient of c = a * b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a * b.

    Returns:
        gelu(a * b, approximate='tanh'), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a * b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.mul_gelu_tanh(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def mul_silu(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """silu(a * b) in one kernel, with the gradient of c = a * b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a * b.

    Returns:
        silu(a * b), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a * b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.mul_silu(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def mul_softplus(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """softplus(a * b) in one kernel, with the gradient of c = a * b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a * b.

    Returns:
        softplus(a * b), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a * b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.mul_softplus(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def mul_square(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """square(a * b) in one kernel, with the gradient of c = a * b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a * b.

    Returns:
        square(a * b), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a * b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.mul_square(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def add_sin(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """sin(a + b) in one kernel, with the gradient of c = a + b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a + b.

    Returns:
        sin(a + b), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a + b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.add_sin(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def add_cos(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """cos(a + b) in one kernel, with the gradient of c = a + b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a + b.

    Returns:
        cos(a + b), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a + b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.add_cos(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def add_tanh(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """tanh(a + b) in one kernel, with the gradient of c = a + b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a + b.

    Returns:
        tanh(a + b), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a + b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.add_tanh(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def add_sigmoid(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """sigmoid(a + b) in one kernel, with the gradient of c = a + b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a + b.

    Returns:
        sigmoid(a + b), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a + b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.add_sigmoid(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def add_exp(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """exp(a + b) in one kernel, with the gradient of c = a + b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a + b.

    Returns:
        exp(a + b), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a + b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.add_exp(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def add_relu(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """relu(a + b) in one kernel, with the gradient of c = a + b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a + b.

    Returns:
        relu(a + b), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a + b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.add_relu(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def add_gelu(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """gelu(a + b) in one kernel, with the gradient of c = a + b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a + b.

    Returns:
        gelu(a + b), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a + b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.add_gelu(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def add_gelu_tanh(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """gelu(a + b, approximate='tanh') in one kernel, with the gradient of c = a + b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a + b.

    Returns:
        gelu(a + b, approximate='tanh'), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a + b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.add_gelu_tanh(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def add_silu(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """silu(a + b) in one kernel, with the gradient of c = a + b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a + b.

    Returns:
        silu(a + b), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a + b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.add_silu(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def add_softplus(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """softplus(a + b) in one kernel, with the gradient of c = a + b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a + b.

    Returns:
        softplus(a + b), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a + b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.add_softplus(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def add_square(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """square(a + b) in one kernel, with the gradient of c = a + b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a + b.

    Returns:
        square(a + b), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a + b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.add_square(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def sub_sin(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """sin(a - b) in one kernel, with the gradient of c = a - b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a - b.

    Returns:
        sin(a - b), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a - b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.sub_sin(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def sub_cos(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """cos(a - b) in one kernel, with the gradient of c = a - b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a - b.

    Returns:
        cos(a - b), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a - b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.sub_cos(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def sub_tanh(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """tanh(a - b) in one kernel, with the gradient of c = a - b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a - b.

    Returns:
        tanh(a - b), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a - b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.sub_tanh(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def sub_sigmoid(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """sigmoid(a - b) in one kernel, with the gradient of c = a - b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a - b.

    Returns:
        sigmoid(a - b), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a - b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.sub_sigmoid(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def sub_exp(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """exp(a - b) in one kernel, with the gradient of c = a - b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a - b.

    Returns:
        exp(a - b), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a - b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.sub_exp(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def sub_relu(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """relu(a - b) in one kernel, with the gradient of c = a - b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a - b.

    Returns:
        relu(a - b), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a - b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.sub_relu(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def sub_gelu(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """gelu(a - b) in one kernel, with the gradient of c = a - b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a - b.

    Returns:
        gelu(a - b), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a - b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.sub_gelu(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def sub_gelu_tanh(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """gelu(a - b, approximate='tanh') in one kernel, with the gradient of c = a - b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a - b.

    Returns:
        gelu(a - b, approximate='tanh'), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a - b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.sub_gelu_tanh(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def sub_silu(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """silu(a - b) in one kernel, with the gradient of c = a - b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a - b.

    Returns:
        silu(a - b), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a - b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.sub_silu(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def sub_softplus(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """softplus(a - b) in one kernel, with the gradient of c = a - b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a - b.

    Returns:
        softplus(a - b), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a - b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.sub_softplus(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def sub_square(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """square(a - b) in one kernel, with the gradient of c = a - b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a - b.

    Returns:
        square(a - b), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a - b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.sub_square(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def div_sin(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """sin(a / b) in one kernel, with the gradient of c = a / b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a / b.

    Returns:
        sin(a / b), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a / b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.div_sin(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def div_cos(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """cos(a / b) in one kernel, with the gradient of c = a / b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a / b.

    Returns:
        cos(a / b), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a / b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.div_cos(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def div_tanh(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """tanh(a / b) in one kernel, with the gradient of c = a / b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a / b.

    Returns:
        tanh(a / b), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a / b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.div_tanh(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def div_sigmoid(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """sigmoid(a / b) in one kernel, with the gradient of c = a / b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a / b.

    Returns:
        sigmoid(a / b), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a / b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.div_sigmoid(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def div_exp(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """exp(a / b) in one kernel, with the gradient of c = a / b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a / b.

    Returns:
        exp(a / b), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a / b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.div_exp(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def div_relu(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """relu(a / b) in one kernel, with the gradient of c = a / b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a / b.

    Returns:
        relu(a / b), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a / b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.div_relu(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def div_gelu(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """gelu(a / b) in one kernel, with the gradient of c = a / b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a / b.

    Returns:
        gelu(a / b), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a / b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.div_gelu(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def div_gelu_tanh(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """gelu(a / b, approximate='tanh') in one kernel, with the gradient of c = a / b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a / b.

    Returns:
        gelu(a / b, approximate='tanh'), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a / b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.div_gelu_tanh(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def div_silu(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """silu(a / b) in one kernel, with the gradient of c = a / b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a / b.

    Returns:
        silu(a / b), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a / b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.div_silu(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def div_softplus(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """softplus(a / b) in one kernel, with the gradient of c = a / b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a / b.

    Returns:
        softplus(a / b), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a / b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.div_softplus(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """

def div_square(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """square(a / b) in one kernel, with the gradient of c = a / b on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a / b.

    Returns:
        square(a / b), of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a / b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.div_square(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """
