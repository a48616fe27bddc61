"""Functions of the text that score an answer: (prompt, response, example) -> float."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, cast

from perl_jax.errors import UserError

TextFunction = Callable[[str, str, Mapping[str, Any]], float] | str  # or its dotted name, 'my_module.my_function'


def function(name: TextFunction) -> Callable[[str, str, Mapping[str, Any]], float]:
    """A text function, by itself or by its dotted name."""
    if not isinstance(name, str):
        return name
    try:
        found, why = pkgutil.resolve_name(name), 'that is none'
    except (ImportError, AttributeError, ValueError) as error:
        found, why = None, error
    if not callable(found):
        raise UserError(f"no function '{name}': {why}; write 'module.function', with the module on the path")
    return cast(Callable[[str, str, Mapping[str, Any]], float], found)


def functions(names: Mapping[str, TextFunction] | None) -> dict[str, Callable[[str, str, Mapping[str, Any]], float]]:
    """Several of them, by what they are called; None is none."""
    return {name: function(f) for name, f in (names or {}).items()}
