"""Names of T5X's gin files that would change nothing here, and so are refused. All others: docs/t5x.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perl_jax.errors import UserError

PAGE = "T5X's names and ours: docs/t5x.md"

# What each may be without changing what a run does, and why no other value is taken.
_OFF: dict[str, tuple[tuple[Any, ...], str]] = {
    'DROPOUT_RATE': ((0.0,), "the base is frozen and runs without T5's dropout; LoRA's is lora.LoraSpec.dropout"),
    'Z_LOSS': ((0.0,), 'the losses here have no z-loss'),
    'LABEL_SMOOTHING': ((0.0,), 'the losses here have no label smoothing'),
    'LOSS_NORMALIZING_FACTOR': (
        (None, 'NUM_REAL_TARGET_TOKENS'), 'losses here are means over the real tokens, whatever their number',
    ),
}  # fmt: skip
_SHIPPED = {'Z_LOSS': 0.0001}  # in every model file of T5X, chosen by nobody
MACROS = tuple(_OFF)


def check(values: Mapping[str, Any]) -> None:
    """Refuse settings of T5X's that would be without effect.

    Args:
      values: of `MACROS`, those that were set.

    Raises:
      UserError: one that is not off.
    """
    for name, value in values.items():
        off, why = _OFF[name]
        if value not in off and value != _SHIPPED.get(name):
            raise UserError(f'{name} = {value!r} of T5X would change nothing: {why}. Add --gin.{name}={off[0]}; {PAGE}')
