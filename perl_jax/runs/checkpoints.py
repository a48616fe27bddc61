"""Checkpoints: what one run learned and nothing else. The base is named in them by path and fingerprint, never copied.

MODEL_DIR/checkpoints/STEP/state    adapter, optimizer, step (Orbax; written in the background, renamed when whole)
MODEL_DIR/checkpoints/STEP/about    {'phase', 'base': {'path', 'fingerprint', 'dtype'}, 'adapters': {...},
                                     'window', 'best_metric'}
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import serialization
from jaxtyping import PyTree
from orbax.checkpoint import checkpoint_managers

from perl_jax.errors import UserError
from perl_jax.models.lora import Adapter, as_scale

RESTORED_AT_ONCE_GB = 1  # of an adapter; else Orbax holds all of it on its way to the devices
_OPTIONS = {'anchor': 'ANCHOR_EMA', 'value': 'ALGORITHM'}  # what decides whether a role is learned at all


class Checkpoints:
    """The checkpoints of one run: the latest, and the best by one evaluation metric."""

    def __init__(self, model_dir: str, best_metric: str | None = None, *, read_only: bool = False) -> None:
        """`best_metric` is a name of the metrics handed to `save`, larger is better; None keeps only the latest."""
        model_dir = os.fspath(model_dir)
        self.folder = os.path.join(model_dir if '://' in model_dir else os.path.abspath(model_dir), 'checkpoints')
        self.noted = {} if best_metric is None else {'best_metric': best_metric}  # in `about`, for those who only read
        keep: list[Any] = [checkpoint_managers.LatestN(1)]
        if best_metric is not None:
            keep.append(
                checkpoint_managers.BestN(
                    get_metric_fn=lambda metrics: metrics[best_metric],
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(keep),
            best_fn=None if best_metric is None else lambda metrics: metrics[best_metric],
            cleanup_tmp_directories=not read_only,  # what a killed process left half-written
            read_only=read_only,
        )
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        """The last whole step; None if there is none."""
        return self.manager.latest_step()

    def best(self) -> int | None:
        """The best step by the metric that the run was told, the latest if it was told none or none is measured yet."""
        latest = self.latest()
        metric = None if latest is None else self.about(latest).get('best_metric')
        if metric is None:
            return latest
        found = {step: self.manager.metrics(step) for step in self.manager.all_steps()}
        measured = [(metrics[metric], step) for step, metrics in found.items() if metrics]
        return max(measured)[1] if measured else latest

    def about(self, step: int) -> dict[str, Any]:
        """What a checkpoint says of itself."""
        return self._read(step, about=ocp.args.JsonRestore())['about']

    def save(self, step: int, state: PyTree, about: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
        """Write in the background; returns as soon as the arrays are copied off."""
        state = ocp.args.StandardSave(serialization.to_state_dict(state))
        args = ocp.args.Composite(state=state, about=ocp.args.JsonSave(about | self.noted))
        self.manager.save(step, args=args, metrics=metrics)

    def restore(self, step: int, like: PyTree) -> PyTree:
        """A state shaped and placed like `like` (arrays with shardings).

        Raises:
          UserError: the checkpoint cannot be read, or holds other things: another optimizer's, of another adapter.
        """
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, serialization.to_state_dict(like))
        there, wanted = self._names(step), _names(template)
        if there != wanted:
            odd = {name.partition('/')[0] for name in there} ^ {name.partition('/')[0] for name in wanted}
            option = next((_OPTIONS[role] for role in sorted(odd) if role in _OPTIONS), 'OPTIMIZER or TUNING')
            raise UserError(
                f'checkpoint {os.path.join(self.folder, str(step))} is of another {option}: '
                f'{min(there ^ wanted)} is {"there" if there - wanted else "not there"}; give that which it was made '
                'with, or name another MODEL_DIR'
            )
        tree = self._read(step, state=ocp.args.StandardRestore(template))['state']
        return serialization.from_state_dict(like, tree)

    def adapters(self, step: int) -> dict[str, Adapter]:
        """Every role's adapter as shapes, without knowing how it was made."""
        named = sorted(self.about(step)['adapters'].items())
        try:
            there = _metadata(self._item(step))
            adapters = {
                role: Adapter(**there[role]['adapter'], **settings | {'scale': as_scale(settings['scale'])})
                for role, settings in named
            }
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), adapters)
        except Exception as error:
            raise _broken(self.folder, step) from error

    def restore_adapters(self, step: int, like: Mapping[str, Adapter] | None = None) -> dict[str, Adapter]:
        """Read adapters, and nothing else of the checkpoint.

        Args:
          like: shapes with shardings (Partitioner.adapter) of the roles to read, of which each process then reads its
            own part; None is every role as whole host arrays.
        """
        like = self.adapters(step) if like is None else like
        item = {role: {'adapter': serialization.to_state_dict(adapter)} for role, adapter in like.items()}
        args = ocp.args.PyTreeRestore(item, jax.tree.map(_restored_as, item), partial_restore=True)
        handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=RESTORED_AT_ONCE_GB)
        try:
            with ocp.Checkpointer(handler) as checkpointer:
                tree = checkpointer.restore(self._item(step), args=args)
        except Exception as error:
            raise _broken(self.folder, step) from error
        return {role: adapter.replace(**tree[role]['adapter']) for role, adapter in like.items()}

    def close(self) -> None:
        """Wait for what is still being written."""
        self.manager.close()

    def _item(self, step: int) -> str:
        return os.path.join(self.folder, str(step), 'state')

    def _names(self, step: int) -> set[str]:
        try:
            return _names(_metadata(self._item(step)))
        except Exception as error:
            raise _broken(self.folder, step) from error

    def _read(self, step: int, **args: Any) -> Any:
        try:
            return self.manager.restore(step, args=ocp.args.Composite(**args))
        except Exception as error:
            raise _broken(self.folder, step) from error


def _metadata(item: str) -> PyTree:
    metadata = ocp.PyTreeCheckpointer().metadata(item).item_metadata
    assert metadata is not None
    return metadata.tree


def _restored_as(x: jax.ShapeDtypeStruct) -> ocp.RestoreArgs:
    if x.sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype)


def _names(tree: PyTree) -> set[str]:
    return {jax.tree_util.keystr(path, simple=True, separator='/') for path, _ in jax.tree.leaves_with_path(tree)}


def _broken(folder: str, step: int) -> UserError:
    return UserError(
        f'checkpoint {os.path.join(folder, str(step))} cannot be read: it is truncated or of another run; '
        'delete that folder to go on from the checkpoint before it, or else from the start'
    )


