"""Settings are checked by their annotations, types and ranges alike.

    @dataclasses.dataclass(frozen=True)
    class SamplingConfig:
        num_samples: Count = 1
        temperature: Annotated[float, Interval(ge=0, le=100)] = 1.0

        def __post_init__(self) -> None:
            settings.check(self)

Functions that gin files configure are wrapped in `checked`. Nothing is converted: '1' and True are no integers, an
integer is a float, and infinities and NaN are refused everywhere.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import reprlib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Interval

from perl_jax.errors import UserError

F = TypeVar('F', bound=Callable[..., Any])

CHECKED = 'is_checked'  # the attribute of functions that `checked` returns
INT_MAX = 2**31 - 1  # steps and sizes are int32 on devices
Count = Annotated[int, Interval(ge=1, le=INT_MAX)]
Natural = Annotated[int, Interval(ge=0, le=INT_MAX)]
Size = Annotated[int, Interval(ge=0, le=2**53)]  # of bytes or parameters
Layers = Annotated[int, Interval(ge=1, le=10_000)]  # each is a Python loop's turn somewhere
Share = Annotated[float, Interval(ge=0, le=1)]
Decay = Annotated[float, Interval(ge=0, lt=1)]  # of a moving average, or a dropout rate: 1 would learn nothing
Positive = Annotated[float, Interval(gt=0, le=1e9)]
NonNegative = Annotated[float, Interval(ge=0, le=1e9)]
Real = Annotated[float, Interval(ge=-1e9, le=1e9)]
Activation = Literal['silu', 'gelu', 'relu']
Dtype = Literal['float32', 'bfloat16', 'float16']
Remat = Literal['none', 'full', 'minimal']
LearningRate = Annotated[float, Interval(ge=0, le=100)]

_REMEDIES = {  # by pydantic's type of an error
    'int_type': 'a whole number', 'float_type': 'a number', 'string_type': 'a string', 'bool_type': 'True or False',
    'none_required': 'None', 'finite_number': 'a finite number', 'greater_than_equal': 'a number of at least {ge}',
    'greater_than': 'a number above {gt}', 'less_than_equal': 'a number of at most {le}',
    'less_than': 'a number below {lt}', 'literal_error': '{expected}', 'value_error': '{error}',
    'callable_type': 'a function', 'sequence_str': 'a list', 'list_type': 'a list', 'tuple_type': 'a tuple',
    'mapping_type': 'a dictionary', 'dict_type': 'a dictionary',
}  # fmt: skip


class SettingError(UserError):
    """A setting of a wrong type, or out of its range.

    Attributes:
      setting: its name, 'Class.field' or 'function.argument'.
      problem: its value, and what to give instead.
    """

    def __init__(self, setting: str, problem: str) -> None:
        super().__init__(f'{setting}{problem}')
        self.setting, self.problem = setting, problem


def check(config: Any) -> None:
    """Check the fields of a dataclass by their annotations.

    Raises:
      SettingError: naming the first field of a wrong type, or out of its range.
    """
    _check(type(config).__name__, _hints(type(config)), vars(config))


def checked(function: F, **annotations: Any) -> F:
    """Check the arguments of every call by the annotations.

    Args:
      function: which gin files configure.
      annotations: for a function of another library, types of the arguments to be checked; they replace its own.

    Returns:
      A function of the same signature, which raises SettingError.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        hints = annotations or _hints(function)
        _check(function.__name__, hints, signature.bind_partial(*args, **kwargs).arguments)
        return function(*args, **kwargs)

    setattr(call, CHECKED, True)
    setattr(call, '__signature__', signature)  # noqa: B010 (gin reads the arguments there)
    return typing.cast(F, call)


def flag(annotation: Any) -> Callable[[str], int | float]:
    """Return the `type` of an argparse flag whose value has a range."""

    def parse(text: str) -> int | float:
        try:
            value = int(text)
        except ValueError:
            try:
                value = float(text)
            except ValueError:
                raise argparse.ArgumentTypeError(f"'{text}': give a number") from None
        if problem := find_problem(annotation, value):
            raise argparse.ArgumentTypeError(problem.removeprefix(' = '))
        return value

    return parse


def find_problem(annotation: Any, value: Any) -> str | None:
    """Return ' = VALUE: give ...' for a value of another type or out of range, with its place inside; None if right."""
    import pydantic  # a tenth of a second, which --help need not wait for

    try:
        _adapter(annotation).validate_python(value)
    except pydantic.ValidationError as invalid:
        errors = invalid.errors(include_url=False)
        remedies = [_REMEDIES.get(x['type'], x['msg']).format(**_texts(x.get('ctx', {}))) for x in errors]
        place = ''.join(f'[{key!r}]' for key in errors[0]['loc']) if len(errors) == 1 else ''
        wrong_value = errors[0]['input'] if place else value
        return f'{place} = {reprlib.repr(wrong_value)}: give {" or ".join(dict.fromkeys(remedies))}'
    return None


def _texts(context: Mapping[str, Any]) -> dict[str, str]:
    formats = {float: 'g', int: ','}
    return {name: format(value, formats[type(value)]) if type(value) in formats else str(value)
            for name, value in context.items()}  # fmt: skip


def _check(owner: str, hints: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if name in hints and (problem := find_problem(hints[name], value)):
            raise SettingError(f'{owner}.{name}', problem)


@functools.cache
def _hints(owner: Callable[..., Any]) -> Mapping[str, Any]:
    hints = typing.get_type_hints(owner, include_extras=True)
    names = [x.name for x in dataclasses.fields(owner)] if dataclasses.is_dataclass(owner) else list(hints)
    return {name: hints[name] for name in names if name in hints and name != 'return'}


@functools.lru_cache(maxsize=1024)
def _adapter(annotation: Any) -> Any:
    import pydantic

    config = pydantic.ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
    return pydantic.TypeAdapter(_by_instance(annotation), config=config)


def _by_instance(annotation: Any) -> Any:
    """Replace classes in an annotation by isinstance: pydantic would check and copy dataclasses field by field."""
    import pydantic

    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return Annotated[(_by_instance(arguments[0]), *arguments[1:])]
    if origin in (typing.Union, types.UnionType):
        return typing.Union[tuple(map(_by_instance, arguments))]  # noqa: UP007 (of a tuple)
    if origin in (Sequence, Mapping, tuple):
        arguments = tuple(x if x is ... else _by_instance(x) for x in arguments)
        return origin[arguments]  # pyright: ignore[reportInvalidTypeArguments]
    if isinstance(annotation, type) and annotation not in (Any, bool, int, float, str, type(None)) and origin is None:
        return Annotated[Any, pydantic.AfterValidator(functools.partial(_check_instance, annotation))]
    return annotation


def _check_instance(cls: type, value: Any) -> Any:
    if isinstance(value, type) and issubclass(value, cls):
        raise ValueError(f'a {cls.__name__}: in gin, @{cls.__name__}() with parentheses')
    if not isinstance(value, cls):
        raise ValueError(f'a {cls.__name__}')
    return value
