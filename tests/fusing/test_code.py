"""Patterns of code: what is found, what stands there then, and what is left since it might mean something else."""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import retainops as ro
from retainops.fusing._code import methods, rewritten, sites_of
from retainops.fusing._patterns import Pattern, Rewriter


def rewrite(code: str, before: str, after: str) -> str:
    tree = ast.parse("def f(self, x, y):\n" + textwrap.indent(textwrap.dedent(code), "    ")).body[0]
    pattern = Pattern(before, after)
    found = Rewriter(tree, pattern, frozenset())
    found.visit(tree)
    rewriter = Rewriter(tree, pattern, frozenset(site.place for site in found.sites))
    rewriter.visit(tree)
    return "\n".join(ast.unparse(line) for line in tree.body)


NORMED = "h = X + Y\nr = h\nh = self.NORM(h)", "h, r = self.add(self.NORM, X, Y)"
GATED = "_a = self.ACT(X)\nb = Y\nc = _a * b", "_a = X\nb = Y\nc = self.gated(self.ACT, _a, b)"
CALLED = "ACT(X) * Y", "self.g(ACT, X, Y)"
REST = "FN(X, *REST, **NAMED)", "self.g(FN, X, *REST, **NAMED)"
BLOCK = "h = X + 1\nif z:\n    BODY\n    h = Y", "if z:\n    h = X\n    BODY\n    h = Y + 1\nelse:\n    h = X + 1"
SAME = "if X:\n    BODY\nelse:\n    BODY", "if True:\n    BODY"
CHAIN = "h = self.A(x)\nh = self.B(h)", "h = self.ab(x)"
CASES = [
    (SAME, "if y:\n    self.f(x)\nelse:\n    self.f(x)", "if True:\n    self.f(x)"),
    (SAME, "if y:\n    self.f(x)\nelse:\n    self.g(x)", None),
    (CHAIN, "x = self.f(x)\nx = self.g(x)", "x = self.ab(x)"),  # read before anything is assigned to
    (BLOCK, "x = y + 1\nif y:\n    x = 2 * x", "if y:\n    x = y\n    x = 2 * x + 1\nelse:\n    x = y + 1"),
    (
        BLOCK,
        "x = y + 1\nif y:\n    for z in x:\n        y = 2 * z\n    self.f(y)\n    x = y",
        "if y:\n    x = y\n    for z in x:\n        y = 2 * z\n    self.f(y)\n    x = y + 1\nelse:\n    x = y + 1",
    ),
    (BLOCK, "x = y + 1\nif x:\n    x = 2 * x", None),  # what is asked of is another x
    (BLOCK, "x = y + 1\nif y:\n    self.f(x)", None),
    (BLOCK, "x = y + 1\nif y:\n    x = 2 * x\nelse:\n    x = 1", None),
    (NORMED, "x = x + y\nz = x\nx = self.ln(x)", "x, z = self.add(self.ln, x, y)"),
    (NORMED, "x = x + self.f(y)\nz = x\nx = self.ln(x)\nx += 1", "x, z = self.add(self.ln, x, self.f(y))\nx += 1"),
    (NORMED, "x = x + y\nz = x\ny = self.ln(x)", None),  # another variable
    (NORMED, "x = x + y\nz = x\nw = 1\nx = self.ln(x)", None),  # something between
    (NORMED, "x = x - y\nz = x\nx = self.ln(x)", None),
    (NORMED, "x = x + y\nz = x\nx = self.ln(x, 1)", None),
    (NORMED, "x = x + y\nz = x\nx = other.ln(x)", None),
    (("self.A(self.B(X))", "self.ab(X)"), "return self.f(self.g(x + 1)) + 2", "return self.ab(x + 1) + 2"),
    (("self.A(self.B(X))", "self.ab(X)"), "return self.f(self.g(x, y))", None),
    (("self.A(self.B(X))", "self.ab(X)"), "return self.f(self.g(*x))", "return self.ab(*x)"),
    (("f(X, X)", "twice(X)"), "return f(x.a, x.a), f(x, y)", "return (twice(x.a), f(x, y))"),
    (("f(X)", "g(X)"), "return (f(x), self.f(x), h(x))", "return (g(x), self.f(x), h(x))"),
    (("self.ACT(X) * Y", "g(X, Y)"), "return y * self.silu(x)", None),  # Y would be computed after X
    (GATED, "a = self.act(x)\nb = self.w(y)\nz = a * b", "a = x\nb = self.w(y)\nz = self.gated(self.act, a, b)"),
    (GATED, "a = self.act(x)\nb = self.w(y)\nz = a * b\nreturn a", None),  # a is used once more
    (GATED, "a = self.act(x)\nb = self.w(a)\nz = a * b", None),  # and here
    (CALLED, "return (F.silu(x) * y, silu(x) * 2)", "return (self.g(F.silu, x, y), silu(x) * 2)"),
    (CALLED, "return self.act(x) * y + a.b.c(x) * y", "return self.g(self.act, x, y) + self.g(a.b.c, x, y)"),
    (CALLED, "return y(x) * y + self.a.b(x) * y + f()(x) * y + (lambda f: f(x) * y)(x)", None),  # no names of globals
    (CALLED, "import a.b\nfrom c import d\nreturn a(x) * y + d(x) * y", None),
    (CALLED, "act = self.act\nreturn act(x) * y", None),
    (REST, "return F.f(x, y, 1, k=2, **y)", "return self.g(F.f, x, y, 1, k=2, **y)"),
    (REST, "return F.f(x + 1)", "return self.g(F.f, x + 1)"),
    (REST, "return F.f(k=x)", None),
    (
        NORMED,
        "if y:\n    x = x + y\n    z = x\n    x = self.ln(x)\nelse:\n    x = self.ln(x)",
        "if y:\n    x, z = self.add(self.ln, x, y)\nelse:\n    x = self.ln(x)",
    ),
]


@pytest.mark.parametrize(("pattern", "code", "expected"), CASES)
def test_patterns(pattern: tuple[str, str], code: str, expected: str | None) -> None:
    assert rewrite(code, *pattern) == (code if expected is None else expected)


def decorated(function: Callable) -> Callable:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) + 1

    return wrapper


SENTINEL = object()


class Net(nn.Module):
    """Decorators, defaults, a second method, and names that the module does not have yet when it is defined."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)
        self.act, self.drop = nn.GELU(), nn.Dropout(0.5)

    @decorated
    def forward(self, x: Undefined, mark: object = SENTINEL, *, more: list = []) -> torch.Tensor:  # noqa: F821, B006
        if mark is not SENTINEL:  # no assert: pytest rewrites those, and then the source is not that of the code
            raise ValueError(mark)
        more.append("called")
        return later(self.inner(self.act(self.fc1(x))))

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.drop(x))


def later(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def test_a_method_keeps_all_that_is_around_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net, x = Net(), torch.randn(3, 4)
    torch.manual_seed(1)
    expected = net(x)
    assert [row.op for row in ro.fuse(net)] == ["bias_act(fc1, act)"]
    torch.manual_seed(1)
    torch.testing.assert_close(net(x), expected)
    assert inspect.unwrap(Net.forward).__kwdefaults__["more"] == ["called"] * 2  # the same list
    assert list(inspect.signature(net.forward).parameters) == ["x", "mark", "more"]
    monkeypatch.setitem(globals(), "later", lambda x: x * 0)  # its globals are the module's own
    assert torch.equal(net(x), torch.ones(3, 4))


def documented(function: Callable) -> Callable:
    """As transformers' auto_docstring, which takes a function whose name has no class for a class."""
    if "." not in function.__qualname__:
        raise AttributeError("'function' object has no attribute '__mro__'")
    function.documents = function.__qualname__
    return function


class Documented(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(4, 4), nn.ReLU()

    @documented
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.fc(x))


def test_a_decorator_that_asks_whose_method_it_is() -> None:
    net, x = Documented(), torch.randn(3, 4)
    expected = net(x)
    assert [row.op for row in ro.fuse(net)] == ["bias_act(fc, act)"]
    assert type(net).forward.documents == Documented.forward.documents == "Documented.forward"
    torch.testing.assert_close(net(x), expected)


def test_tracebacks_show_the_file() -> None:
    class_ = type(Net())
    pattern = Pattern("self.ACT(self.LINEAR(X))", "self.raises(X)")
    sites = [site for site in sites_of(class_, pattern) if dict(site.attributes)["ACT"] == "fc2"]
    inner = rewritten(methods(class_), tuple(sites))["inner"]
    with pytest.raises(AttributeError, match="raises") as caught:
        inner(Net(), torch.ones(4))
    last = caught.traceback[1]
    assert str(last.path) == __file__
    assert "return self.fc2(self.drop(x))" in str(last.statement)


CODE = """
import torch
from torch import nn

def factory(k):
    class Closed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.act = nn.Linear(4, 4), nn.ReLU()

        def forward(self, x):
            return self.act(self.fc(x)) * k

    return Closed

class Open(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.act = nn.Linear(4, 4), nn.ReLU()

    def forward(self, x):
        return self.act(self.fc(x)){tail}
"""


def loaded(path: Path, tail: str = "") -> dict[str, Any]:
    path.write_text(CODE.format(tail=tail))
    scope: dict[str, Any] = {"__name__": "loaded"}
    exec(compile(path.read_text(), str(path), "exec"), scope)
    return scope


UNREAD = "the source of its forward cannot be read, or is not that of its code"
CLOSED = "its method forward uses k of the function that it was made in"


def test_what_cannot_be_made_again_is_left_and_said(tmp_path: Path) -> None:
    scope = loaded(tmp_path / "net.py")
    assert len(ro.fuse(scope["Open"]())) == 1
    assert [row.why for row in ro.fuse(scope["factory"](2)(), rules=["bias_act"])] == [f"bias_act(fc, act): {CLOSED}"]
    without_source: dict[str, Any] = {"__name__": "nowhere"}
    exec(CODE.format(tail=""), without_source)
    net = without_source["Open"]()
    assert [(row.name, row.op, row.why) for row in ro.fuse(net)] == [("", None, UNREAD)]
    net.act = nn.Identity()  # nothing that a rule is for
    assert not ro.fuse(net)
    net.act = nn.ReLU()
    assert not ro.fuse(net, rules=["norm"])


def test_a_file_that_was_edited_since_it_was_imported_is_left(tmp_path: Path) -> None:
    """inspect would give the new text for the old function."""
    scope = loaded(tmp_path / "net.py", " + 1")
    (tmp_path / "net.py").write_text(CODE.format(tail=" + 2"))
    linecache.checkcache()
    net = scope["Open"]()
    expected = net(torch.ones(4))
    assert [row.why for row in ro.fuse(net)] == [UNREAD]
    assert torch.equal(net(torch.ones(4)), expected)


def unmarked(function: Callable) -> Callable:
    """A decorator that does not say what it wraps."""

    def wrapper(self: Any, x: torch.Tensor) -> torch.Tensor:
        return function(self, x)

    return wrapper


class Others(nn.Module):
    """What else keeps code from being made again, or looks as if it did."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(4, 4), nn.ReLU()


class Wrapped(Others):
    @unmarked
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.fc(x))


class CallsSuper(Others):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        super().train(self.training)
        return self.act(self.fc(x))


class CallsSuperAlone(Others):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        super().train(self.training)
        return x


class Renamed(Others):
    def forward(s, self: torch.Tensor) -> torch.Tensor:
        return s.act(s.fc(self)) + self


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (Wrapped, ["its forward uses function of the function that it was made in"]),
        (CallsSuper, ["bias_act(fc, act): its method forward calls super()"]),
        (CallsSuperAlone, []),
    ],
)
def test_functions_around_a_forward(cls: type[nn.Module], why: list[str]) -> None:
    assert [row.why for row in ro.fuse(cls())] == why


def of_another_name(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.act(self.fc(x))


def test_a_function_that_a_class_has_by_another_name() -> None:
    net, x = type("Aliased", (Others,), {"forward": of_another_name})(), torch.randn(3, 4)
    expected = net(x)
    assert [row.op for row in ro.fuse(net)] == ["bias_act(fc, act)"]
    torch.testing.assert_close(net(x), expected)
    assert net.forward.__name__ == "of_another_name"

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.inner(x))

    assert not ro.fuse(type("Calling", (Others,), {"forward": forward, "inner": of_another_name})())


def test_self_may_have_another_name() -> None:
    net, x = Renamed(), torch.randn(3, 4)
    expected = net(x)
    assert [row.op for row in ro.fuse(net)] == ["bias_act(fc, act)"]
    torch.testing.assert_close(net(x), expected)


def test_an_overriding_subclass_keeps_what_it_adds() -> None:
    """Of code there is nothing to know: only what stands there is replaced, whoever wrote it."""

    class Doubled(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(self.fc1(x)) * 2

    net, x = Doubled(), torch.randn(3, 4)
    expected = net(x)
    table = ro.fuse(net)
    torch.testing.assert_close(net(x), expected)
    assert [row.op for row in table] == ["bias_act(fc1, act)"]


class InPlace(nn.Module):
    """The second factor changes what the first one was computed of."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.gate = nn.ReLU(), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.gate(x)
        return self.act(x) * x.sub_(1)


def test_order_matters() -> None:
    net, x = InPlace(), torch.randn(3, 4)
    with torch.no_grad():
        expected = net(x)
        ro.fuse(net)
        assert torch.equal(net(x), expected)


def test_a_forward_that_is_another_one_by_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known of a class is of the functions that it has at the time."""
    ro.fuse(InPlace())
    ro.fuse(Net())

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.fc2(x))

    monkeypatch.setattr(Net, "forward", forward)
    net, x = Net(), torch.randn(3, 4)
    expected = net(x)
    assert [row.op for row in ro.fuse(net).replaced] == ["bias_act(fc2, act)"]
    torch.testing.assert_close(net(x), expected)


class Experts(nn.Module):
    """Code in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.gates = nn.SiLU(), nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for gate in self.gates:
            h = gate(x)
            x = self.act(h) * x
        return x


def test_code_in_a_loop_is_left() -> None:
    why = "gated(act): it is in a loop, and its points would be of several calls"
    assert [(row.op, row.why) for row in ro.fuse(Experts())] == [(None, why)]
