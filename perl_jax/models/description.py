"""A description of a network in JSON types. Checkpoints store it, so that weights are never used in another network.

    describe(Decoder(config))    {'class': 'Decoder', 'vocab_size': 32000, ..., 'rope_scaling': {'factor': 8.0, ...}}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import linen as nn

Description = Mapping[str, Any]
_HOW = ('dtype', 'flash', 'remat')  # these change how a network computes, not what: they may differ


def describe(network: nn.Module) -> dict[str, Any]:
    """Describe a network by its class and every setting of its config that changes what it computes.

    Args:
      network: its `config` has fields of JSON types or dataclasses of them; other values become text.

    Returns:
      {'class': ..., setting: value}.
    """
    config = network.config
    fields = getattr(config, '__dataclass_fields__', {})
    settings = {key: _plain(getattr(config, key)) for key in fields if key not in _HOW}
    return {'class': type(network).__name__} | settings


def difference(first: Description, second: Description) -> str | None:
    """The first setting in which two descriptions differ.

    Numbers are compared in float32, because some files store 1e-05 as 9.999999747378752e-06. A setting that only one of
    them has did not exist when the other was written.

    Args:
      first: of `describe`, or as a checkpoint stores it.
      second: likewise.

    Returns:
      The setting's name; None if all settings that both have agree.
    """
    return next((key for key in first if key in second and _rounded(first[key]) != _rounded(second[key])), None)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_rounded(x) for x in value]
    return float(np.float32(value)) if isinstance(value, float) else value
