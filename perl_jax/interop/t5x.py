"""T5X's checkpoints, without T5X: both of its formats are read, and the newer one is written.

    checkpoint_N/checkpoint               legacy: an index (msgpack); beside it a zarr array `target.PATH` for each leaf
    checkpoint_N/state/manifest.ocdbt     Orbax: one OCDBT database that holds those same arrays

The `target` of T5X's `t5` example is the tree of models/t5.py, name for name, but for its layers (`layers_0`, ...),
which are stacked here. The rest, above all the optimizer's state, is not even opened. gs:// is read by TensorStore's
own driver; that was never tried out.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax import serialization, traverse_util
from jaxtyping import PyTree

from perl_jax import json_files, settings, trees
from perl_jax.errors import UserError
from perl_jax.models.t5 import T5, T5Config
from perl_jax.parallel.leaves import Index, InMemory, Leaf, Stacked, to_host

_ACTIVATIONS: dict[tuple[str, ...], tuple[settings.Activation, bool]] = {
    ('relu',): ('relu', False), ('gelu', 'linear'): ('gelu', True), ('silu', 'linear'): ('silu', True),
}  # fmt: skip
_SIZES = (
    'vocab_size', 'emb_dim', 'num_heads', 'head_dim', 'mlp_dim', 'num_encoder_layers', 'num_decoder_layers',
    'logits_via_embedding',
)  # fmt: skip
# The last one changes nothing here: attention's scores are float32 anyway.
_UNDERSTOOD = {*_SIZES, 'dtype', 'mlp_activations', 'dropout_rate', 'float32_attention_logits'}
_LAYER = r'/layers_(\d+)/'
INDEX, MANIFEST = 'checkpoint', 'state/manifest.ocdbt'


def network(module: Any) -> T5:
    """Our network of what T5X's `network.Transformer` is configured to be, for gin/models/from_t5x.gin.

    Raises:
      UserError: it is none of T5X's `t5` example, or has activations, or a dropout, that ours does not have.
    """
    check(module)
    c = module.config
    if (activations := tuple(c.mlp_activations)) not in _ACTIVATIONS:
        raise UserError(f'network.T5Config.mlp_activations = {activations}: there are {list(_ACTIVATIONS)}')
    activation, gated = _ACTIVATIONS[activations]
    sizes = {name: getattr(c, name) for name in _SIZES}
    dtype = cast(settings.Dtype, jnp.dtype(c.dtype).name)  # which T5Config checks
    return T5(T5Config(**sizes, activation=activation, gated=gated, dtype=dtype))


def check(module: Any) -> None:
    """Refuse what is none of T5X's `t5` example, and its dropout, which would change nothing."""
    c = module.config
    if odd := sorted((vars(c).keys() - _UNDERSTOOD) | ({*_SIZES} - vars(c).keys())):
        raise UserError(
            f'{type(module).__module__}.Transformer is not the network of t5x.examples.t5 ({", ".join(odd)} differ): '
            'decoder_only and scalable_t5 are not read (docs/howto/t5x.md)'
        )
    if rate := getattr(c, 'dropout_rate', 0):
        raise UserError(
            f"network.T5Config.dropout_rate = {rate} would change nothing: the base is frozen and runs "
            "without it; set it to 0.0 (LoRA's own is lora.LoraSpec.dropout)"
        )


def find(path: str) -> str | None:
    """The folder of a T5X checkpoint: `path` itself, or the latest checkpoint_N in it; None if there is none.

    Raises:
      UserError: a bucket that cannot be read.
    """
    if os.path.isfile(path):
        return None
    folder = ts.KvStore.open(_kvstore(path)).result()
    # What is called `checkpoint` or begins with `checkpoint_`: the character after _ is `.
    try:
        names = [name.decode() for name in folder.list(ts.KvStore.KeyRange('checkpoint', 'checkpoint`')).result()]
        is_complete = INDEX in names or folder.read(MANIFEST).result().state == 'value'
    except ValueError as error:
        raise UserError(f"'{path}' cannot be read: {str(error).splitlines()[0]}") from error
    if is_complete:
        return path
    steps = [re.fullmatch(rf'checkpoint_(\d+)/({INDEX}|{MANIFEST})', name) for name in names]
    steps = [int(step[1]) for step in steps if step]
    return f'{path.rstrip("/")}/checkpoint_{max(steps)}' if steps else None


def load(path: str, dtype: str = 'float32') -> PyTree:
    """The parameters of a checkpoint as `leaves` finds them, host arrays in `dtype`."""
    return to_host(leaves(path), jax.dtypes.canonicalize_dtype(dtype))


def leaves(path: str, stacked: bool = True) -> PyTree:
    """Find the parameters of a checkpoint: a tree of leaves.Leaf; indices are read, and no array.

    Layers are stacked; one that lacks something leaves a stack too short for the network, which its shape then tells.

    Args:
      path: a checkpoint_N folder or one that holds some (the latest is taken), local or gs://BUCKET/...
      stacked: False leaves each layer by itself, as T5X's own network has it.

    Raises:
      UserError: there is no T5X checkpoint, it is damaged, or it is of scalable_t5 (umT5), which stacks its layers.
    """
    if (checkpoint := find(path)) is None:
        raise UserError(f"'{path}' is no T5X checkpoint: neither it nor a checkpoint_N in it has {INDEX} or {MANIFEST}")
    places = _read_or_refuse(checkpoint, 'its index', lambda: _places(checkpoint))
    if not places:
        raise UserError(f"'{checkpoint}' has no parameters: nothing in it is called target; save it with T5X's trainer")
    _check_metadata(checkpoint, {name: place for name, place in places.items() if isinstance(place, dict)})
    opened = {name: _open(place) if isinstance(place, dict) else place for name, place in places.items()}
    apart: dict[str, list[Leaf]] = {}
    for name in sorted(opened, key=lambda name: [int(number) for number in re.findall(_LAYER, name)]):
        alike = apart.setdefault(re.sub(_LAYER, '/layers/', name) if stacked else name, [])
        alike.append(_leaf(checkpoint, name, opened[name]))
        if alike[-1].shape != alike[0].shape:
            raise UserError(
                f"'{checkpoint}': {name} has shape {list(alike[-1].shape)}, and in other layers "
                f'{list(alike[0].shape)}'
            )
    tree = {place: Stacked(each) if '/layers/' in place else each[0] for place, each in apart.items()}
    return trees.unflatten(tree)


@dataclasses.dataclass(frozen=True)
class _Array:
    """A zarr array of the checkpoint `path` (leaves.Leaf); of its chunks, those that a slice touches are read."""

    path: str
    name: str
    store: ts.TensorStore

    @property
    def shape(self) -> tuple[int, ...]:
        return self.store.shape

    def read_into(self, out: np.ndarray, index: Index) -> None:
        source = ts.cast(self.store[index], out.dtype)
        _read_or_refuse(self.path, self.name, lambda: ts.array(out).write(source).result())


def save(path: str, params: PyTree, step: int) -> None:
    """Write the local folder `path`/checkpoint_`step`, which T5X restores.

    It holds parameters and step and no optimizer: enough to infer with. To train on, T5X wants RestoreCheckpointConfig
    (fallback_to_scratch = True, strict = False, assignment_map = ((r'state/param_states/.*', None),)).

    Raises:
      UserError: there is such a checkpoint already.
    """
    state = {'target': _apart(params), 'state': {'step': jnp.int32(step)}}
    options = ocp.CheckpointManagerOptions(step_prefix='checkpoint')
    handlers = {'state': ocp.PyTreeCheckpointHandler(use_ocdbt=True)}
    with ocp.CheckpointManager(os.path.abspath(path), options=options, item_handlers=handlers) as manager:
        if step in manager.all_steps():
            raise UserError(f"'{path}' has a checkpoint_{step} already; delete it or name another folder")
        manager.save(step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(state)))


def _apart(params: PyTree) -> PyTree:
    """The tree with its layers not stacked, as T5X has it."""
    flat = {}
    for path, x in trees.flatten(params).items():
        stacked = '/layers/' in path
        flat |= {path.replace('/layers/', f'/layers_{i}/'): x[i] for i in range(len(x))} if stacked else {path: x}
    return trees.unflatten(flat)


def _kvstore(path: str, inside: str = '') -> dict[str, Any]:
    """TensorStore's name for a folder."""
    if path.startswith('gs://'):
        bucket, _, key = path.removeprefix('gs://').partition('/')
        return {'driver': 'gcs', 'bucket': bucket, 'path': f'{key.rstrip("/")}/{inside}'}
    return {'driver': 'file', 'path': f'{os.path.abspath(path)}/{inside}'}


def _places(path: str) -> dict[str, Any]:
    """Where each parameter is: by its path with slashes, a TensorStore kvstore, or the array itself."""
    index = ts.KvStore.open(_kvstore(path)).result().read(INDEX).result()
    if index.state == 'value':
        target = serialization.msgpack_restore(index.value)['optimizer']['target']
        flat = traverse_util.flatten_dict(target, sep='/', is_leaf=lambda _, x: 'driver' in x)
        return {name: _beside(path, leaf) if isinstance(leaf, dict) else leaf for name, leaf in flat.items()}
    base = {'driver': 'ocdbt', 'base': _kvstore(path, 'state/')}
    keys = ts.KvStore.open(base).result().list(ts.KvStore.KeyRange('target.', 'target/')).result()
    names = [name.decode().removesuffix('/.zarray') for name in keys if name.endswith(b'/.zarray')]
    return {name.removeprefix('target.').replace('.', '/'): base | {'path': f'{name}/'} for name in names}


def _beside(path: str, spec: dict[str, Any]) -> dict[str, Any]:
    """What the legacy index says of an array is right but for where it was; older ones have `path` a level higher."""
    return _kvstore(path, spec['kvstore'].get('path') or spec['path'])


def _check_metadata(path: str, kvstores: Mapping[str, dict[str, Any]]) -> None:
    """Raise UserError if an array's metadata are not JSON: TensorStore dies of deep brackets (SIGSEGV)."""
    reads = {name: ts.KvStore.open(kvstore).result().read('.zarray') for name, kvstore in kvstores.items()}
    for name, read in reads.items():
        _read_or_refuse(path, name, lambda read=read: json_files.loads(read.result().value))


def _open(kvstore: dict[str, Any]) -> ts.Future:
    """Begin to open an array; with hundreds in a bucket, all at once."""
    # Else a chunk that is missing would be read as zeros.
    spec = {'driver': 'zarr', 'kvstore': kvstore, 'fill_missing_data_reads': False}
    return ts.open(spec, open=True, read=True)


def _leaf(path: str, name: str, array: ts.Future | np.ndarray) -> Leaf:
    if not isinstance(array, ts.Future):
        return InMemory(np.asarray(array))
    store = _read_or_refuse(path, name, array.result)
    if len(store.shape) > 2:
        raise UserError(
            f"'{path}': {name} has shape {list(store.shape)}, as scalable_t5 stacks layers; take one of T5X's t5"
        )
    return _Array(path, name, store)


def _read_or_refuse(path: str, description: str, read: Any) -> Any:
    try:
        return read()
    except Exception as error:  # TensorStore and msgpack have no kinds of errors to tell apart
        raise UserError(f"'{path}': {description} is missing or truncated; copy the checkpoint again") from error
