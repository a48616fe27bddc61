"""Whose annotations are checked under pytest, shapes included: jaxtyping with beartype (conftest.py)."""

import beartype
from jaxtyping import _import_hook

MODULES = ['masked', 'models', 'optim', 'rewards', 'rl', 'sharded', 'train', 'trees']

# Modules of these that are not checked, with the reason for each.
UNCHECKED = {
    'optim.schedules': 'its functions say themselves what is wrong with a setting: a user gets a UserError',
}

_CONFIG = beartype.BeartypeConf(is_pep484_tower=True)  # an int is a float, as for pyright


def functions(function):
    """Checks a function's arguments and result.

    But for `__init__`: JAX fills the fields of its dataclasses with other things than arrays, and those of settings
    raise a UserError.
    """
    if function.__name__ == '__init__' or function.__module__.removeprefix('perl_jax.') in UNCHECKED:
        return function
    return beartype.beartype(conf=_CONFIG)(function)


def _methods_alone(transformer, node):
    """Leaves a class itself as it is: gin would not see the defaults of an `__init__` that is wrapped."""
    transformer._parents.append(node)
    transformer.generic_visit(node)
    transformer._parents.pop()
    return node


_import_hook.JaxtypingTransformer.visit_ClassDef = _methods_alone
