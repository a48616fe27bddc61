"""`jax.jit` for commands that run in this process: what one has traced and compiled, the next need not.

Half of a small run's time is tracing the programs of the run before again.
"""

import dataclasses
import functools
import types

import jax
import numpy as np
from flax.linen import spmd

_compiled = {}
_jit = jax.jit


def jit(function=None, **options):
    """`jax.jit`, which returns for a function that equals an earlier one what it made of that one.

    Each run of a command defines its functions anew; they equal those of another run if their code and all values that
    they close over do.
    """
    if function is None:
        return functools.partial(jit, **options)
    try:
        mesh = spmd.get_logical_axis_rules(), jax.sharding.get_abstract_mesh()
        key = equal((function, options, mesh))
    except Unlike:
        return _jit(function, **options)
    if key not in _compiled:
        _compiled[key] = _jit(function, **options)
    return _compiled[key]


def forget():
    """Drop all programs."""
    _compiled.clear()


class Unlike(Exception):
    """A value that cannot be compared."""


def equal(x, outer=()):
    """A hashable value that is equal for equal values, also of functions; raises Unlike where that cannot be told."""
    if any(x is y for y in outer):
        raise Unlike  # a function that knows itself
    if (parts := _parts(x)) is not None:
        return type(x), *(equal(part, (*outer, x)) for part in parts)
    try:
        hash(x)
    except TypeError:
        raise Unlike from None
    return type(x), x


@functools.singledispatch
def _parts(x):
    """What has to be equal for two values of one type to be equal; None: they have to be equal themselves."""
    if isinstance(x, jax.core.Tracer):
        raise Unlike
    if isinstance(x, np.ndarray | jax.Array):
        return x.shape, str(x.dtype), np.asarray(x).tobytes()
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return [getattr(x, field.name) for field in dataclasses.fields(x)]
    return None


@_parts.register
def _(x: types.FunctionType):
    if x.__code__.co_filename.endswith('gin/config.py'):
        raise Unlike  # what gin has bound is not in its closure
    if '<locals>' not in x.__qualname__:
        return None
    if hasattr(x, '__wrapped__'):  # jaxtyping's checks of annotations
        return [x.__wrapped__]
    cells = [cell.cell_contents for cell in x.__closure__ or ()]
    return x.__code__, id(x.__globals__), cells, x.__defaults__, x.__kwdefaults__


@_parts.register
def _(x: functools.partial):
    return x.func, x.args, x.keywords


@_parts.register
def _(x: types.MethodType):
    return x.__func__, x.__self__


@_parts.register(tuple)
@_parts.register(list)
def _(x):
    return x


@_parts.register
def _(x: dict):
    return list(x.items())
