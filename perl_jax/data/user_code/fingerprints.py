"""Fingerprints of preprocessors: equal where they treat rows alike, in every process, and different where they do not.

    a function      its code, closure, defaults, and the constants of its module that it reads
    an object       its class and its state, as pickle sees it
    of a library    its name and its code
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import re
import sys
import sysconfig
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, tuple, frozenset)
_ATOMS = (*_CONSTANTS[:-2], type(...))
_LIBRARIES = (sysconfig.get_paths()['stdlib'], sysconfig.get_paths()['purelib'])


class OpaqueError(Exception):
    """A value without a state that can be read; its text names it."""


def fingerprint(value: Any, outer: tuple[Any, ...] = ()) -> str:
    """Hash a value.

    Args:
      value: a preprocessor, or what one refers to.
      outer: the values that refer to this one.

    Raises:
      OpaqueError: its state cannot be read.
    """
    if any(value is x for x in outer):  # functions that call each other
        return str(len(outer))
    within = functools.partial(fingerprint, outer=(*outer, value))
    parts = next(to_parts for is_kind, to_parts in _KINDS if is_kind(value))(value, within)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def of_vocabulary(vocabulary: Any) -> str:
    """Hash a vocabulary by what it makes of texts and tokens, since it may load its model late."""
    token_texts = [vocabulary.decode([i]) for i in range(0, vocabulary.vocab_size, 1 + vocabulary.vocab_size // 256)]
    facts = [type(vocabulary).__name__, vocabulary.vocab_size, vocabulary.encode('The quick brown fox: é, 3.14!')]
    return hashlib.sha256(json.dumps([token_texts, facts]).encode()).hexdigest()


def _function_parts(function: Any, within: Any) -> list[Any]:
    if _is_of_library(function) and '<locals>' not in function.__qualname__:
        return [function.__module__, function.__qualname__, within(inspect.unwrap(function).__code__)]
    cells = []
    for cell in function.__closure__ or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            cells.append(...)
    constants = {name: function.__globals__[name] for name in _names(function.__code__) & function.__globals__.keys()}
    return [
        *(within(x) for x in (function.__code__, cells, function.__defaults__, function.__kwdefaults__)),
        _constant_parts(constants, within),
    ]


def _names(code: types.CodeType) -> set[str]:
    """Returns the names that the code reads, and those of the functions in it."""
    return {*code.co_names}.union(*(_names(x) for x in code.co_consts if isinstance(x, types.CodeType)))


def _class_parts(cls: type, within: Any) -> list[Any]:
    parts: list[Any] = [cls.__module__, cls.__qualname__]
    if _is_of_library(cls):
        return parts
    functions = {name: getattr(x, '__func__', getattr(x, 'fget', x)) for name, x in vars(cls).items()}
    methods = [[name, within(x)] for name, x in sorted(functions.items()) if inspect.isfunction(x)]
    attributes = {name: x for name, x in vars(cls).items() if not name.startswith('__')}
    return [*parts, methods, _constant_parts(attributes, within), [within(base) for base in cls.__bases__]]


def _constant_parts(values: Mapping[str, Any], within: Any) -> list[Any]:
    """Returns the constants among these; what else a module or a class holds may change while a program runs."""
    return [[name, within(x)] for name, x in sorted(values.items()) if isinstance(x, _CONSTANTS)]


def _object_parts(value: Any, within: Any) -> list[Any]:
    try:
        reduced = value.__reduce_ex__(2)
    except Exception as error:  # a lock, an open file, a table of TensorFlow: each says so in its own way
        raise OpaqueError(f'a {type(value).__module__}.{type(value).__qualname__}') from error
    if isinstance(reduced, str):  # the name of a global
        return [type(value).__module__, reduced]
    function, arguments, state, *items = [*reduced, None][:max(3, len(reduced))]
    return [within(function), within(arguments), within(state), *([within(list(x)) for x in items if x is not None])]


def _is_of_library(value: Any) -> bool:
    module = sys.modules.get(value.__module__ or '')
    file = getattr(module, '__file__', None)
    return file is None and value.__module__ in sys.builtin_module_names or bool(file and file.startswith(_LIBRARIES))


def _instance_of(*types: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, types)


def _is_vocabulary(value: Any) -> bool:
    seqio = sys.modules.get('seqio')
    return seqio is not None and isinstance(value, seqio.Vocabulary)


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray | np.generic) and value.dtype != object


_KINDS: tuple[tuple[Callable[[Any], bool], Callable[[Any, Any], list[Any]]], ...] = (  # the first that fits
    (_instance_of(*_ATOMS), lambda x, within: [type(x).__name__, repr(x)]),
    (_instance_of(functools.partial), lambda x, within: [within(x.func), within(x.args), within(x.keywords)]),
    (inspect.isfunction, _function_parts),
    (inspect.ismethod, lambda x, within: [within(x.__func__), within(x.__self__)]),
    (_instance_of(types.CodeType), lambda x, within: [x.co_code.hex(), x.co_names, within(x.co_consts)]),
    (_instance_of(list, tuple), lambda x, within: [within(item) for item in x]),
    (_instance_of(set, frozenset), lambda x, within: sorted(map(within, x))),  # a process has its own order of them
    (_instance_of(Mapping), lambda x, within: [[within(key), within(item)] for key, item in x.items()]),
    (_is_array, lambda x, within: [x.dtype.str, x.shape, hashlib.sha256(x.tobytes()).hexdigest()]),
    (_instance_of(re.Pattern), lambda x, within: [within(x.pattern), x.flags]),
    (inspect.isclass, _class_parts),
    (inspect.ismodule, lambda x, within: [x.__name__]),
    (lambda x: hasattr(x, '__wrapped__'), lambda x, within: [type(x).__name__, within(x.__wrapped__)]),  # lru_cache
    (_is_vocabulary, lambda x, within: [of_vocabulary(x)]),
    (lambda x: True, _object_parts),
)
