"""The shapes and dtypes that public functions are annotated with, which all tests check."""

import ast
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

import geode_jax
from geode_jax.geometry.boxes import decode_boxes
from geode_jax.models.drm import spread
from geode_jax.objectives.losses import depth_l1
from geode_jax.ops.attention import attention, causal

ROOMS = ("geometry", "models", "objectives", "ops")
ARRAYS = ("Array", "jax.Array", "np.ndarray")


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda x: decode_boxes(x), id="geometry"),
        pytest.param(lambda x: spread(x > 0, 2), id="models"),
        pytest.param(lambda x: depth_l1(x, x[:1], True), id="objectives"),
        pytest.param(lambda x: attention(x, x, x, causal(1, 2)), id="ops"),
    ],
)
def test_a_wrong_shape_is_an_error_in_every_room(call):
    with pytest.raises(TypeCheckError):
        call(jnp.ones((2, 3, 7)))


def test_a_wrong_dtype_is_an_error():
    with pytest.raises(TypeCheckError):
        decode_boxes(np.ones((3, 8), np.int32))


def without_shape(annotation: ast.expr | None) -> list[str]:
    """Returns the arrays of an annotation that have no shape, `Array` but not `Float[Array, "B"]`.

    The signature of a function that is an argument has no shapes.
    """
    if annotation is None or ast.unparse(annotation).startswith("Callable["):
        return []
    if isinstance(annotation, ast.Subscript) and isinstance(annotation.slice, ast.Tuple):
        first, *rest = annotation.slice.elts
        if ast.unparse(first) in ARRAYS and isinstance(rest[0], ast.Constant):
            return []
    name = ast.unparse(annotation)
    if name in ARRAYS:
        return [name]
    return [x for part in ast.iter_child_nodes(annotation) for x in without_shape(part)]


def public_functions(body: list[ast.stmt], prefix: str):
    """Yields (name, function) of the public functions and methods, `__call__` among them."""
    for part in body:
        if isinstance(part, ast.ClassDef) and not part.name.startswith("_"):
            yield from public_functions(part.body, f"{prefix}{part.name}.")
        if isinstance(part, ast.FunctionDef) and re.match(r"[^_]|__call__", part.name):
            yield prefix + part.name, part


@pytest.mark.parametrize("room", ROOMS)
def test_every_array_of_a_public_function_has_a_shape(room):
    bare, seen = [], 0
    for path in sorted((Path(geode_jax.__file__).parent / room).rglob("*.py")):
        for name, function in public_functions(ast.parse(path.read_text()).body, f"{path.stem}."):
            arguments = function.args
            annotations = [
                argument.annotation
                for argument in (*arguments.args, *arguments.kwonlyargs, arguments.vararg)
                if argument is not None
            ]
            seen += len(annotations)
            if any(without_shape(a) for a in (*annotations, function.returns)):
                bare.append(name)
    assert seen
    assert not bare, f'no shape, as in Float[Array, "B T D"], of an array of {", ".join(bare)}'
