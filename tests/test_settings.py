"""Settings of another type, or out of their range, are refused: walks over every field of every configurable."""

import contextlib
import dataclasses
import math
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import gin
import optax
import pytest
from annotated_types import Interval

from perl_jax import settings
from perl_jax.cli import configurables, configure
from perl_jax.errors import UserError
from perl_jax.settings import find_problem

CONFIGURABLES = {x.__name__: x for group in configurables.named().values() for x in group}
CLASSES = {name: x for name, x in CONFIGURABLES.items() if isinstance(x, type) and dataclasses.is_dataclass(x)}


@pytest.mark.parametrize(('annotation', 'value', 'problem'), [
    (settings.Count, 0, ' = 0: give a number of at least 1'),
    (settings.Count, True, ' = True: give a whole number'),
    (settings.Count, '1', " = '1': give a whole number"),
    (settings.Count, 2.0, ' = 2.0: give a whole number'),
    (settings.Count, 2**31, ' = 2147483648: give a number of at most 2,147,483,647'),
    (settings.Share, math.nan, ' = nan: give a finite number'),
    (settings.Real, -math.inf, ' = -inf: give a finite number'),
    (settings.Decay, 1, ' = 1: give a number below 1'),
    (settings.Positive | None, 0, ' = 0: give a number above 0'),
    (Annotated[float, Interval(ge=0, le=100)], 1e30, ' = 1e+30: give a number of at most 100'),
    (Mapping[str, settings.Count], {'inputs': 8, 'targets': '9'}, "['targets'] = '9': give a whole number"),
    (Sequence[str], 'ab', " = 'ab': give a list"),
    (Sequence[str], ['a', 1], '[1] = 1: give a string'),
    (Literal['full', 'none'], 'all', " = 'all': give 'full' or 'none'"),
    (settings.Count | None, 'x' * 99, " = 'xxxxxxxxxxxx...xxxxxxxxxxxxx': give a whole number"),
])  # fmt: skip
def test_what_is_wrong_is_said(annotation, value, problem):
    assert find_problem(annotation, value) == problem


@pytest.mark.parametrize(('annotation', 'value'), [
    (settings.Real, 1), (settings.Count | None, None), (Sequence[str], ('a',)), (settings.Share, 0.0),
])  # fmt: skip
def test_what_is_right_passes(annotation, value):
    assert find_problem(annotation, value) is None


def test_every_number_has_a_range():
    """A plain int or float would take -1, 1e30 and infinity."""
    for name, cls in CLASSES.items():
        for field, hint in typing.get_type_hints(cls, include_extras=True).items():
            parts = typing.get_args(hint) if type(None) in typing.get_args(hint) else [hint]
            assert not {int, float} & set(parts), f'{name}.{field}'


@pytest.mark.parametrize('name', CLASSES)
def test_every_field_refuses_what_it_cannot_be(name):
    fields = [x for x in dataclasses.fields(CLASSES[name]) if x.init]
    hints = typing.get_type_hints(CLASSES[name], include_extras=True)
    for field in fields:
        for value in (object(), 'abc', True, -1, 10**30, 1e999, math.nan, [], None):
            if problem := find_problem(hints[field.name], value):
                others = {x.name: _any_of(hints[x.name]) for x in fields if x.default is dataclasses.MISSING}
                with pytest.raises(UserError) as error:
                    CLASSES[name](**others | {field.name: value})
                if 'give' in str(error.value) and f'{name}.' in str(error.value):
                    assert str(error.value).startswith(f'{name}.')
                assert '\n' not in str(error.value) and problem


def _any_of(hint):
    """Some value that a required field accepts."""
    candidates = 8, 1.0, 'x', {'inputs': 8}, optax.sgd(0.1), None
    return next((x for x in candidates if find_problem(hint, x) is None), object())


def test_a_class_where_its_value_is_wanted():
    for name in 'Decoder', 'T5':
        with pytest.raises(UserError, match=rf'{name}.config = .*: give a {name}Config: in gin, @{name}Config\(\)'):
            CONFIGURABLES[name](config=CONFIGURABLES[f'{name}Config'])


@pytest.mark.parametrize(('binding', 'line'), [
    ('optax.sgd.learning_rate = -1', 'sgd.learning_rate = -1: give a number of at least 0 or a function'),
    ("RATE = 'abc'\noptax.sgd.learning_rate = %RATE", "RATE = 'abc': give a number or a function"),
    ('adafactor.momentum = -1', 'adafactor.momentum = -1: give a number of at least 0'),
    ('two/optax.adam.b2 = 1.0', 'adam.b2 = 1.0: give a number below 1'),
    ('optax.clip_by_global_norm.max_norm = 0', 'clip_by_global_norm.max_norm = 0: give a number above 0'),
    ('RATE = @optax.constant_schedule()\nconstant_schedule.value = 1e-3\noptax.adamw.learning_rate = %RATE', None),
])  # fmt: skip
def test_optimizers_of_another_library_have_ranges_too(binding, line):
    configurables.register()
    with configure.restored_state():
        gin.clear_config()
        gin.parse_config(binding)
        with contextlib.nullcontext() if line is None else pytest.raises(UserError) as error:
            gin.finalize()
    assert line is None or str(error.value) == line
