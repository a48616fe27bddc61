"""Functions that score the text of a response: (prompt, response, example) -> float."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, cast

from perl_jax.errors import UserError

TextFunction = Callable[[str, str, Mapping[str, Any]], float] | str  # or its dotted name, 'my_module.my_function'


def resolve_function(name: TextFunction) -> Callable[[str, str, Mapping[str, Any]], float]:
    """Return a text function, which may be given by its dotted name."""
    if not isinstance(name, str):
        return name
    try:
        resolved, reason = pkgutil.resolve_name(name), 'it is not callable'
    except (ImportError, AttributeError, ValueError) as error:
        resolved, reason = None, error
    if not callable(resolved):
        raise UserError(f"no function '{name}': {reason}; write 'module.function', with the module on the path")
    return cast(Callable[[str, str, Mapping[str, Any]], float], resolved)


def resolve_functions(
    names: Mapping[str, TextFunction] | None,
) -> dict[str, Callable[[str, str, Mapping[str, Any]], float]]:
    """Resolve {metric name: text function or dotted name}; None is empty."""
    return {name: resolve_function(f) for name, f in (names or {}).items()}
