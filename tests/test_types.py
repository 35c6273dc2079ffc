"""The stub that tells type checkers what calls return agrees with the package."""

import ast
import inspect
from pathlib import Path

import pytest

import cute_kernels

STUB = ast.parse((Path(cute_kernels.__file__).parent / "__init__.pyi").read_text())
OVERLOADED = {}
for _node in STUB.body:
    if isinstance(_node, ast.FunctionDef):
        OVERLOADED.setdefault(_node.name, []).append(_node)


def keys(name):
    """Of a TypedDict of the stub, those of its bases included."""
    (found,) = (x for x in STUB.body if isinstance(x, ast.ClassDef) and x.name == name)
    of_bases = [keys(base.id) for base in found.bases if base.id != "TypedDict"]
    own = {x.target.id for x in found.body if isinstance(x, ast.AnnAssign)}
    return own.union(*of_bases)


def test_the_stub_has_all_names():
    given = {x.asname for node in STUB.body if isinstance(node, ast.ImportFrom) for x in node.names}
    annotated = {x.target.id for x in STUB.body if isinstance(x, ast.AnnAssign)}
    assert (given - {None}) | set(OVERLOADED) | (annotated - {"__all__"}) == set(
        cute_kernels.__all__
    )


@pytest.mark.parametrize("name", OVERLOADED)
def test_an_overloaded_function_has_the_arguments(name):
    actual = inspect.signature(getattr(cute_kernels, name)).parameters
    for overload in OVERLOADED[name]:
        positional = [x.arg for x in overload.args.args]
        assert positional == list(actual)[: len(positional)]
        named = {x.arg for x in overload.args.kwonlyargs}
        options = keys(overload.args.kwarg.annotation.slice.id)
        assert named | options == set(actual) - set(positional)
        assert not named & options
    # Those without a default are so in both.
    required = [x for x, p in actual.items() if p.default is p.empty]
    arguments = OVERLOADED[name][0].args
    assert len(arguments.args) - len(arguments.defaults) == len(required)
