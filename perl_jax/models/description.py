"""What a network computes, in JSON types: checkpoints keep it, so that weights never meet a network that differs.

    describe(Decoder(config))    {'class': 'Decoder', 'vocab_size': 32000, ..., 'rope_scaling': {'factor': 8.0, ...}}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import linen as nn

Description = Mapping[str, Any]
_HOW = ('dtype', 'flash', 'remat')  # how it is computed: these may differ


def describe(network: nn.Module) -> dict[str, Any]:
    """Name a network's class and every setting of its config that changes what it computes.

    Args:
      network: with a `config` of fields that JSON can hold, or dataclasses of such; others stand as text.

    Returns:
      {'class': ..., setting: value}.
    """
    config = network.config
    fields = getattr(config, '__dataclass_fields__', {})
    settings = {key: _plain(getattr(config, key)) for key in fields if key not in _HOW}
    return {'class': type(network).__name__} | settings


def difference(theirs: Description, ours: Description) -> str | None:
    """The first setting in which two networks differ; None where they agree in all that both name.

    Numbers are compared in float32, in which some files keep 1e-05 as 9.999999747378752e-06. A setting that only one
    of them names was not known yet when the other was written.
    """
    return next((key for key in theirs if key in ours and _rounded(theirs[key]) != _rounded(ours[key])), None)


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
