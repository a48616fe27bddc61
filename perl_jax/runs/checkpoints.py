"""Checkpoints hold what one run has learned. The base is recorded in them by path and fingerprint, never copied.

MODEL_DIR/checkpoints/STEP/state    adapter, optimizer, step (Orbax; written in the background, then renamed)
MODEL_DIR/checkpoints/STEP/about    {'phase', 'base': {'path', 'fingerprint', 'dtype'}, 'adapters': {...},
                                     'window', 'best_metric', 'metrics', 'checksums', 'crc32'}

The two latest are kept, and the best by an evaluation metric. Every number is checked when it is read: storage and
copies do damage files, and a flipped bit of an exponent would be trained on without a word.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import serialization
from jaxtyping import PyTree
from orbax.checkpoint import checkpoint_managers

from perl_jax import json_files
from perl_jax.errors import UserError
from perl_jax.models.lora import Adapter, as_scale
from perl_jax.parallel.stderr import ignore_closed_loops, silenced
from perl_jax.runs import fingerprints

RESTORED_AT_ONCE_GB = 1  # of an adapter; otherwise Orbax holds all of it in host memory
LATEST = 2  # how many checkpoints are kept: if the last is damaged, the run goes on from the one before
# The JSON of a checkpoint. Orbax and TensorStore, which read it too, die of deep brackets (SIGSEGV).
_JSON = 'about/metadata', 'state/_METADATA', 'state/_sharding', 'state/array_metadatas/process_*'
_ABOUT = {'phase': str, 'base': dict[str, Any], 'adapters': dict[str, dict[str, Any]]}
NARROW = 'bfloat16', 'float16'  # what a fully tuned adapter may be read as, beside the float32 that was saved
_OPTIONS = {'anchor': 'ANCHOR_EMA', 'value': 'ALGORITHM'}  # the settings that decide whether a role is learned


class Checkpoints:
    """The checkpoints of one run: the latest two, and the best by one evaluation metric."""

    def __init__(self, model_dir: str, best_metric: str | None = None, *, read_only: bool = False) -> None:
        """Open the checkpoints of a MODEL_DIR.

        Args:
          model_dir: of the run.
          best_metric: the name of a metric that is passed to `save`, larger is better; None keeps only the latest two.
          read_only: whether nothing will be saved.
        """
        ignore_closed_loops()
        model_dir = os.fspath(model_dir)
        self.folder = os.path.join(model_dir if '://' in model_dir else os.path.abspath(model_dir), 'checkpoints')
        # Part of `about`, for readers that do not know the setting.
        self.extra_fields = {} if best_metric is None else {'best_metric': best_metric}
        policies: list[Any] = [checkpoint_managers.LatestN(LATEST)]
        if best_metric is not None:
            policies.append(
                checkpoint_managers.BestN(
                    get_metric_fn=lambda metrics: metrics[best_metric],
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            best_fn=None if best_metric is None else lambda metrics: metrics[best_metric],
            cleanup_tmp_directories=not read_only,  # partial saves of killed processes
            read_only=read_only,
        )
        try:
            self.manager = ocp.CheckpointManager(self.folder, options=options)
        except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError) as error:
            # Of the metadata of a step, whose name Orbax does not say.
            raise UserError(
                f'{self.folder}: the _CHECKPOINT_METADATA of a step cannot be read ({error}); move that file, '
                "or the step's folder, elsewhere"
            ) from error

    def latest(self) -> int | None:
        """Returns the last complete step; None if there is none."""
        return self.manager.latest_step()

    def best(self) -> int | None:
        """Returns the best step by the metric that the run saved with; the latest without a metric or a measurement."""
        latest = self.latest()
        metric = None if latest is None else self.about(latest).get('best_metric')
        if metric is None:
            return latest
        metrics_by_step = {step: self._metadata(step).get('metrics') for step in self.manager.all_steps()}
        measured = [(metrics[metric], step) for step, metrics in metrics_by_step.items() if metrics]
        return max(measured)[1] if measured else latest

    def about(self, step: int) -> dict[str, Any]:
        """Returns the metadata of a checkpoint."""
        return {k: v for k, v in self._metadata(step).items() if k not in ('metrics', 'checksums')}

    def save(self, step: int, state: PyTree, about: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
        """Save in the background; returns as soon as arrays and metadata are copied, which the caller may then change.

        Args:
          step: completed steps.
          state: a tree of arrays, by role.
          about: `phase`, `base` and `adapters` of the file (see above); and `window`, metrics that are not written yet.
          metrics: of the evaluation at this step, if there was one.
        """
        saved = serialization.to_state_dict(state)
        measured = {name: float(value) for name, value in (metrics or {}).items()}
        about = copy.deepcopy(about) | self.extra_fields | {'metrics': measured, 'checksums': _checksums(saved)}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(saved), about=ocp.args.JsonSave(about | {'crc32': _crc32(about)})
        )
        self.manager.save(step, args=args, metrics=metrics)

    def restore(self, step: int, target: PyTree, suspects: Sequence[str] = ()) -> PyTree:
        """Returns the saved state with the structure, shapes and shardings of `target`.

        Args:
          step: of the checkpoint.
          target: shapes, or arrays, of the state.
          suspects: a line for each changed setting that may have changed an optimizer's state, for messages.

        Raises:
          UserError: the checkpoint cannot be read, or has another structure: of another optimizer or adapter.
        """
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, serialization.to_state_dict(target))
        if difference := _difference(self._shapes(step), _shapes(template), suspects):
            folder = os.path.join(self.folder, str(step))
            raise UserError(f'checkpoint {folder} {difference}, or name another MODEL_DIR')
        restored = self._read(step, state=ocp.args.StandardRestore(template))['state']
        self._verify(step, restored)
        return serialization.from_state_dict(target, restored)

    def adapters(self, step: int) -> dict[str, Adapter]:
        """Returns the shapes of the adapter of every role, without needing its configuration."""
        adapter_settings = sorted(self.about(step)['adapters'].items())
        try:
            metadata = self._arrays(step)
            adapters = {
                role: Adapter(**metadata[role]['adapter'], **settings | {'scale': as_scale(settings['scale'])})
                for role, settings in adapter_settings
            }
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), adapters)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._unreadable(step) from error

    def restore_adapters(self, step: int, targets: Mapping[str, Adapter] | None = None) -> dict[str, Adapter]:
        """Returns adapters, without reading the rest of the checkpoint.

        Args:
          step: of the checkpoint.
          targets: shapes with shardings (Partitioner.adapter) of the roles to read, of which each process reads its own
            shards; None reads every role into host arrays.
        """
        targets = self.adapters(step) if targets is None else targets
        item = {role: {'adapter': serialization.to_state_dict(adapter)} for role, adapter in targets.items()}
        args = ocp.args.PyTreeRestore(item, jax.tree.map(_restored_as, item), partial_restore=True)
        handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=RESTORED_AT_ONCE_GB)
        try:
            with _quiet(), ocp.Checkpointer(handler) as checkpointer:
                restored = checkpointer.restore(self._item(step), args=args)
        except Exception as error:
            raise self._unreadable(step) from error
        self._verify(step, restored)
        return {role: adapter.replace(**restored[role]['adapter']) for role, adapter in targets.items()}

    def close(self) -> None:
        """Wait for pending saves."""
        self.manager.close()

    def _item(self, step: int) -> str:
        return os.path.join(self.folder, str(step), 'state')

    def _shapes(self, step: int) -> dict[str, Any]:
        try:
            return _shapes(self._arrays(step))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._unreadable(step) from error

    def _metadata(self, step: int) -> dict[str, Any]:
        """Returns what `save` wrote beside the state; checkpoints of perl_jax 0.1 lack 'metrics' and 'checksums'."""
        metadata = self._read(step, about=ocp.args.JsonRestore())['about']
        if metadata.pop('crc32', None) not in (None, _crc32(metadata)):
            raise self._unreadable(step, 'its metadata are not those that were saved')
        json_files.check(metadata, os.path.join(self.folder, str(step), 'about', 'metadata'), _ABOUT)
        if 'checksums' not in metadata and 'best_metric' in metadata:
            metadata['metrics'] = self.manager.metrics(step)
        return metadata

    def _arrays(self, step: int) -> PyTree:
        """Returns the names, shapes and dtypes of the state's arrays."""
        self._check_json(step)
        try:
            with _quiet():
                metadata = ocp.PyTreeCheckpointer().metadata(self._item(step)).item_metadata
        except Exception as error:
            raise self._unreadable(step) from error
        if metadata is None:
            raise self._unreadable(step)
        return metadata.tree

    def _check_json(self, step: int) -> None:
        """Raise UserError if a file that Orbax and TensorStore read as JSON is none."""
        folder = epath.Path(self.folder, str(step))
        for path in sorted(path for pattern in _JSON for path in folder.glob(pattern)):
            json_files.read(path, remedy=f'checkpoint {folder} cannot be read: {self._remedy(step)}')

    def _read(self, step: int, **args: Any) -> Any:
        self._check_json(step)
        try:
            with _quiet():
                return self.manager.restore(step, args=ocp.args.Composite(**args))
        except Exception as error:
            raise self._unreadable(step) from error

    def _verify(self, step: int, restored: PyTree) -> None:
        """Raise UserError if a leaf has other bits than were saved."""
        if (saved := self._metadata(step).get('checksums')) is None:
            return
        dtypes = {name: str(x.dtype) for name, x in _named(restored).items()}
        for name, checksum in fingerprints.checksums(restored).items():
            if checksum not in (saved.get(name), saved.get(f'{name} as {dtypes[name]}')):
                raise self._unreadable(step, f'the numbers of {name} are not those that were saved')

    def _unreadable(self, step: int, reason: str = 'it is truncated or of another run') -> UserError:
        """Returns the error of a damaged checkpoint, which says where the run can go on."""
        folder = os.path.join(self.folder, str(step))
        return UserError(f'checkpoint {folder} cannot be read: {reason}; {self._remedy(step)}')

    def _remedy(self, step: int) -> str:
        others = [other for other in self.manager.all_steps() if other != step]
        rest = f'and step {max(others)} is used' if others else 'and the run begins again; no other step is left'
        return f'restore that folder from a copy, or move it elsewhere, {rest}'


def _difference(saved: Mapping[str, Any], expected: Mapping[str, Any], suspects: Sequence[str]) -> str | None:
    """Returns in which array a saved state differs from the one expected, and a remedy; None if it does not."""
    differing = saved.keys() ^ expected.keys()
    if suspects:  # without a changed setting, other shapes are a damage, which reading names
        differing |= {name for name, _ in saved.items() ^ expected.items()}
    if not differing:
        return None
    name = min(differing)
    state = 'of another shape'
    if (name in saved) != (name in expected):
        state = 'there' if name in saved else 'not there'
    roles = sorted({x.partition('/')[0] for x in saved} ^ {x.partition('/')[0] for x in expected})
    option = next((_OPTIONS[role] for role in roles if role in _OPTIONS), 'OPTIMIZER or TUNING')
    remedy = f'use the {option} that it was made with'
    if suspects and not roles:
        option, remedy = 'optimizer state', f'{"; ".join(suspects)}: put it back'
    return f'is of another {option}: {name} is {state}; {remedy}'


def _restored_as(x: jax.ShapeDtypeStruct) -> ocp.RestoreArgs:
    if x.sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype)


def _quiet() -> contextlib.AbstractContextManager[None]:
    """Silence Orbax's threads, which print tracebacks; not in a job of several, whose parent reads JAX's last words."""
    return silenced() if jax.process_count() == 1 else contextlib.nullcontext()


def _checksums(saved: PyTree) -> dict[str, int]:
    """Returns the checksum of each leaf, and of the parameters of full tuning also in the dtypes they are read in."""
    checksums = fingerprints.checksums(saved)
    for name, x in _named(saved).items():
        if '/adapter/params/' in name and x.dtype == jnp.float32:
            casts = {f'{name} as {dtype}': x.astype(dtype) for dtype in NARROW}
            checksums |= fingerprints.checksums(casts)
    return checksums


def _crc32(about: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(about, sort_keys=True).encode())


def _named(tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    paths = jax.tree.leaves_with_path(tree, is_leaf=is_leaf)
    return {jax.tree_util.keystr(path, simple=True, separator='/'): x for path, x in paths}


def _shapes(tree: PyTree) -> dict[str, Any]:
    """Returns the names of all leaves, with (shape, dtype) of those of optimizers.

    States without arrays, such as a weight decay's, count too: they are numbered together with the others.
    """
    is_empty = lambda x: isinstance(x, dict) and not x  # noqa: E731
    return {
        name: (tuple(x.shape), jnp.dtype(x.dtype).name) if '/opt_state/' in name and not is_empty(x) else None
        for name, x in _named(tree, is_empty).items()
    }
