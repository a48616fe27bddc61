"""Refuses or reports bindings that nothing reads, which gin ignores silently: a scope or a configurable of no use.

gin calls what a value refers to, from the command's own function on. So the bindings that a command reads follow from
the references in the configuration, before anything is called:

    @value/optax.adafactor()    is called in the scope 'value', and so is all that it refers to
    %VALUE_OPTIMIZER            is a call too, in the scope 'VALUE_OPTIMIZER' instead: a scope ends at a macro
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from perl_jax.errors import UserError

_MACRO, _CONSTANT = 'gin.macro', 'gin.constant'


class Key(NamedTuple):
    """A parameter: its scope, the full name of its configurable, and its name."""

    scope: str
    selector: str
    argument: str

    def __str__(self) -> str:
        return f'{_scoped(self.scope, _shown(self.selector))}.{self.argument}'


class Reads(NamedTuple):
    """What a command reads.

    Attributes:
      keys: the bindings whose values are read.
      scopes: the scopes in which each configurable is called.
      users: for each configurable, the parameters that refer to it, directly or by macros.
    """

    keys: set[Key]
    scopes: dict[str, set[str]]
    users: dict[str, set[Key]]


def check(name: str, arguments: Collection[str], flags: Iterable[str], file_names: Iterable[str]) -> None:
    """Refuse bindings of flags that nothing reads, and warn of those of the user's files.

    Args:
      name: the configurable that the command calls.
      arguments: the parameters of it that the command sets itself.
      flags: the names that flags bind, such as 'value/optax.adafactor.learning_rate'.
      file_names: likewise, the names that the user's files bind.

    Raises:
      UserError: nothing reads a flag; the message has the scopes that there are, or the way to use it.
    """
    reads = _walk([name, *_planned(name)], arguments)
    for key in _unread(flags, reads):
        raise UserError(f'gin: nothing reads {key}: {_reason(key, reads)}')
    if names := sorted(map(str, _unread(file_names, reads))):
        logging.getLogger('perl_jax').warning(f'gin: nothing reads {", ".join(names)}, which a file sets')


def _planned(name: str) -> list[str]:
    """Returns the training that a program of `plan` stands for: a plan takes the flags of the run."""
    module, _, phase = name.rpartition('.')
    return [f'train_{phase}.train'] if module == 'programs' else []


def _unread(names: Iterable[str], reads: Reads) -> list[Key]:
    keys = [key for name in names if (key := _key(name)) is not None]
    return [key for key in keys if key not in reads.keys]


def _key(name: str) -> Key | None:
    """Returns the parameter of a name; None for macros (macros.py), and for names of a file's own imports."""
    from gin.config import ParsedBindingKey

    if '.' not in name:
        return None
    try:
        return Key(*ParsedBindingKey.parse(name).scope_selector_arg)
    except ValueError:
        return None


def _reason(key: Key, reads: Reads) -> str:
    configurable, scopes = _shown(key.selector), sorted(reads.scopes.get(key.selector, ()))
    if not scopes:
        reference = f'@{_scoped(key.scope, configurable)}()'
        return f'this run has no {configurable}; leave it out, or refer to it, as in NAME = {reference}'
    inner = [scope for scope in scopes if f'{scope}/'.startswith(f'{key.scope}/') or not key.scope]
    if inner:
        winners = sorted({str(k) for k in reads.keys if k[1:] == key[1:] and k.scope in _prefixes(inner[0])})
        return f'{" and ".join(winners) or "the command itself"} takes precedence' + '; set that' * bool(winners)
    users = [user for user in reads.users[key.selector] if key.scope in _prefixes(user.scope)]
    if users:  # a macro in between has ended the scope
        return f"{users[0]} is a macro's, outside of that scope; add --gin.{users[0]}='@{key.scope}/{configurable}()'"
    known = ', '.join([*(f'{scope}/{configurable}' for scope in scopes if scope), f'and plain {configurable}'])
    return f"there is no scope '{key.scope}' of {configurable}; there are {known}"


def _walk(starts: Iterable[str], arguments: Collection[str]) -> Reads:
    """Returns what is read by calling these configurables, and those that Python code calls without a reference."""
    import gin.config

    reads, visited = Reads(set(), {}, {}), set()

    def visit(scope: str, selector: str, supplied: Collection[str], user: Key | None) -> None:
        if user is not None:
            reads.users.setdefault(selector, set()).add(user)
        if (scope, selector, user) in visited:
            return
        visited.add((scope, selector, user))
        reads.scopes.setdefault(selector, set()).add(scope)
        values: dict[str, tuple[Key, Any]] = {}
        for prefix in _prefixes(scope):  # the innermost counts
            bound = gin.config._CONFIG.get((prefix, selector), {})
            values |= {argument: (Key(prefix, selector, argument), value) for argument, value in bound.items()}
        for argument in values.keys() - set(supplied):
            key, value = values[argument]
            reads.keys.add(key)
            next_user = user if selector == _MACRO else Key(scope, selector, argument)
            for reference in _references(value):
                inner_scope, inner_selector = reference.config_key
                for each in {inner_scope or scope, inner_scope} if not reference.evaluate else {inner_scope or scope}:
                    visit(each, inner_selector, (), next_user)

    for name in starts:
        configurable: Any = gin.config._REGISTRY.get_match(name)
        visit('', configurable.selector, arguments, None)
    for scope, selector in list(gin.config._CONFIG):
        if _is_called_from_python(gin.config._REGISTRY[selector]):
            visit(scope, selector, (), None)
    return reads


def _references(value: Any) -> Iterator[Any]:
    from gin.config import ConfigurableReference

    if isinstance(value, ConfigurableReference):
        yield value
    elif isinstance(value, Mapping):
        yield from _references([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from _references(item)


def _is_called_from_python(configurable: Any) -> bool:
    """Returns whether code that names a configurable calls gin's wrapper, as it does under @gin.configurable."""
    function = configurable.wrapped
    module = sys.modules.get(getattr(function, '__module__', ''))
    exported = getattr(module, getattr(function, '__name__', ''), None)
    is_wrapper = configurable.wrapper in (function, exported)
    return configurable.selector not in (_MACRO, _CONSTANT) and (is_wrapper or configurable.is_method)


def _prefixes(scope: str) -> list[str]:
    """Returns '', 'a' and 'a/b' of 'a/b'."""
    components = scope.split('/') if scope else []
    return ['/'.join(components[:i]) for i in range(len(components) + 1)]


def _scoped(scope: str, name: str) -> str:
    return f'{scope}/{name}' if scope else name


def _shown(selector: str) -> str:
    """Returns the name of a configurable as our files write it: optax.adafactor, lora.LoraSpec."""
    return '.'.join(selector.split('.')[-2:])
