"""Parameter trees as flat dicts by path, for renaming, sharding and storing; flax's functions with precise types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import traverse_util
from jaxtyping import PyTree


def flatten(tree: PyTree) -> dict[str, Any]:
    """{'decoder': {'norm': {'scale': x}}} -> {'decoder/norm/scale': x}; empty dicts are omitted."""
    return dict(traverse_util.flatten_dict(tree, sep='/'))


def unflatten(leaves: Mapping[str, Any]) -> PyTree:
    """{'decoder/norm/scale': x} -> {'decoder': {'norm': {'scale': x}}}."""
    return traverse_util.unflatten_dict(leaves, sep='/')
