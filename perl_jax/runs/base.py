"""The frozen base: one tree of parameters that policy, anchor, reward and value all bind to.

It comes from a path: a weights file (GGUF, `package:NAME/FILE.gguf` for one inside an installed package), a Hugging
Face checkpoint (a folder with a config.json, or hf://OWNER/NAME), a T5X checkpoint (a folder, gs:// too), the MODEL_DIR
of an SFT or a policy run (its own base with its adapter merged in), or nothing, for random weights from the seed.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from flax import linen as nn
from jaxtyping import PyTree

from perl_jax import trees
from perl_jax.errors import UserError
from perl_jax.interop import hf, paths, t5x
from perl_jax.models import lora
from perl_jax.models.description import Description, describe, difference
from perl_jax.parallel import partitioning
from perl_jax.parallel.leaves import Merged, Placed
from perl_jax.parallel.partitioning import Partitioner, place
from perl_jax.runs import fingerprints, finished, lineage
from perl_jax.runs.fingerprints import fingerprint


@dataclasses.dataclass(frozen=True)
class BaseConfig:
    """The frozen model of a run.

    network: a module with the methods of models.decoder.Decoder and a `config`.
    path: see above; None is random weights from the run's seed.
    dtype: of the parameters as they lie on the devices; 'bfloat16' halves them.
    shared: False gives policy, value, anchor and learned reward a copy of it each, as the paper did.
    """

    network: nn.Module
    path: str | None = None
    dtype: str = 'float32'
    shared: bool = True

    def __post_init__(self) -> None:
        if self.path == '':
            raise UserError("INITIAL_CHECKPOINT_PATH = '': name weights or a MODEL_DIR; None is random weights")
        if self.dtype not in ('float32', 'bfloat16', 'float16'):
            raise UserError(f"BASE_DTYPE = {self.dtype!r}: give 'float32', 'bfloat16' or 'float16'")


@dataclasses.dataclass(frozen=True)
class Base:
    """Parameters on the mesh, their logical axes, and what a checkpoint calls them.

    network: what is computed with them (models/description.py).
    """

    params: PyTree
    axes: PyTree
    path: str
    fingerprint: str
    network: Description

    def released(self) -> Base:
        """Without the parameters, of which only the shapes stay: they are not read where others hold them or copies."""
        return dataclasses.replace(self, params=jax.eval_shape(lambda x: x, self.params))

    @property
    def name(self) -> dict[str, Any]:
        """How checkpoints refer to this base."""
        dtype = str(jax.tree.leaves(self.params)[0].dtype)
        return {'path': self.path, 'fingerprint': self.fingerprint, 'dtype': dtype, 'network': self.network}


def check(config: BaseConfig) -> None:
    """Refuse weights that say themselves that they are of another network, before anything else is read.

    Raises:
      UserError: naming what differs.
    """
    if config.path is not None and hf.is_checkpoint(config.path):
        hf.agree(config.path, config.network)


def load(config: BaseConfig, partitioner: Partitioner, seed: int, classifier: bool = False) -> Base:
    """Read the base onto the mesh.

    Args:
      classifier: take one of transformers' classifiers too, for a reward.

    Raises:
      UserError: no such path, or a tensor that is missing, extra or of another shape than the network's.
    """
    shapes, axes = partitioning.abstract(config.network)
    partitioner.check_params(shapes, axes)
    shardings = partitioner.tree(axes)
    if config.path is None:
        draw = functools.partial(partitioning.init_params, config.network, dtype=config.dtype)
        params = jax.jit(draw, out_shardings=shardings)(jax.random.key(seed))
        return Base(params, axes, f'random:{seed}', fingerprint(params), describe(config.network))
    if (tree := _weights(config.path, config.network, shapes, classifier)) is None:
        params = _trained(config.path, config, partitioner, shapes, axes)
    else:
        _check(config.path, shapes, tree)
        params = partitioner.place(tree, shardings, config.dtype)
    hash_, odd = fingerprints.read_through(params)
    if odd:
        raise UserError(
            f"'{config.path}': {odd[0]} ({len(odd)} tensors in all) has numbers that are not finite; get it again"
        )
    elsewhere = '://' in config.path or config.path.startswith(paths.PREFIX)
    path = config.path if elsewhere else os.path.abspath(config.path)  # found from any folder
    return Base(params, axes, path, hash_, describe(config.network))


def load_base(
    path: str | None,
    network: nn.Module | None = None,
    *,
    dtype: str = 'float32',
    seed: int = 0,
    partitioner: Partitioner = Partitioner(),  # noqa: B008 (frozen)
) -> tuple[nn.Module, Base]:
    """Load a network with its frozen weights.

    Args:
      path: a Hugging Face folder, hf://OWNER/NAME, a GGUF file, a T5X checkpoint, or the MODEL_DIR of an SFT or a
        policy run, whose adapter is then merged in. None draws random weights for `network`.
      network: what the weights are of; None asks them, which T5X's do not say.
      dtype: of the parameters on the devices: 'float32', 'bfloat16' or 'float16'.
      seed: of random weights.
      partitioner: the devices, and how the parameters are split over them.

    Returns:
      The network, and the base: its `params` on the devices, their logical axes `axes`, `path` and `fingerprint`.

    Raises:
      UserError: no such path, or weights that are of another network than `network`.
    """
    network = lineage.network(path) if network is None else network
    config = BaseConfig(network, path, dtype)
    check(config)
    with partitioner.scope():
        return network, load(config, partitioner, seed)


def named(network: nn.Module, name: Mapping[str, Any], partitioner: Partitioner, now: str | None = None) -> Base:
    """Load the base that a checkpoint names.

    Args:
      now: where it lies if it is no longer where it was.

    Raises:
      UserError: the run was of another network, or what is there has another fingerprint.
    """
    path, seed = name['path'], 0
    check_network(network, name, f"the run that names '{path}' as its base")
    if path.startswith('random:'):
        path, seed = None, int(path.removeprefix('random:'))
    elif now is not None and '://' not in path and not os.path.exists(path):
        path = now
    base = load(BaseConfig(network, path, name['dtype']), partitioner, seed, classifier=True)  # whoever named it knew
    if base.fingerprint != name['fingerprint']:
        where = path or name['path']
        raise UserError(f"the base at '{where}' has changed since the run that names it; put back what it was made on")
    return base


def check_network(network: nn.Module, name: Mapping[str, Any], run: str) -> None:
    """Refuse a run's adapters for another network than theirs, which shapes alone do not tell.

    Args:
      name: the run's `Base.name`; runs of older versions do not say what their network was.
      run: what to call the run in the message.

    Raises:
      UserError: naming the setting.
    """
    theirs, ours = name.get('network', {}), describe(network)
    if key := difference(theirs, ours):
        raise UserError(f'{run} is of another network: {key} is {theirs[key]!r} there and {ours[key]!r} here')


def _weights(path: str, network: nn.Module, shapes: PyTree, classifier: bool) -> PyTree | None:
    """The leaves of the weights at a path, not read yet; None where it can only be the MODEL_DIR of a run.

    Raises:
      UserError: it is neither.
    """
    if hf.is_checkpoint(path):
        return hf.leaves(path, network, shapes, classifier)
    if path.endswith('.gguf'):
        from perl_jax.interop import gguf

        return gguf.leaves(path)
    if t5x.find(path) is not None:
        return t5x.leaves(path, stacked='layers_0' not in shapes.get('encoder', {}))
    if not epath.Path(path).is_dir():
        raise UserError(
            f"INITIAL_CHECKPOINT_PATH: '{path}' is no .gguf file, no Hugging Face or T5X checkpoint and no "
            'MODEL_DIR of an SFT or a policy run'
        )
    if epath.Path(path, 'adapter_config.json').exists():
        raise UserError(
            f"INITIAL_CHECKPOINT_PATH: '{path}' is an adapter of PEFT; make a MODEL_DIR of it with "
            '`perl_jax import --format=peft`'
        )
    return None


def _trained(path: str, config: BaseConfig, partitioner: Partitioner, shapes: PyTree, axes: PyTree) -> PyTree:
    """What an SFT or a policy run made of its base, on the mesh."""
    run = finished.best(path, phase=('sft', 'policy'), flag='INITIAL_CHECKPOINT_PATH', role='policy')
    check_network(config.network, run.about['base'], f"INITIAL_CHECKPOINT_PATH: '{path}'")
    if (full := run.shapes['policy'].params) is not None:
        _check(path, shapes, full)
        return run.placed(partitioner, axes, ['policy'], config.dtype)['policy'].params
    base = named(config.network, run.about['base'], partitioner)
    adapter = run.on_host(['policy'])['policy']
    flat, where = (trees.flatten(tree) for tree in (base.params, partitioner.tree(axes)))
    pairs = trees.flatten(adapter.lora)
    del base  # each of its arrays is let go as soon as another takes its place
    for name in flat:
        leaf, layer = Placed(flat[name]), name.removesuffix('/kernel')
        if f'{layer}/a' in pairs:
            a, b, scale = pairs[f'{layer}/a'], pairs[f'{layer}/b'], lora.scale_of(adapter.scale, layer)
            merged = Merged(leaf, flat[name].dtype, a, b, scale)
            flat[name] = place(merged, where[name], config.dtype, name)
        elif flat[name].dtype != config.dtype:
            flat[name] = place(leaf, where[name], config.dtype, name)
    return trees.unflatten(flat)


def _check(path: str, shapes: PyTree, params: PyTree) -> None:
    want, have = (trees.flatten(tree) for tree in (shapes, params))
    for name in sorted(want.keys() ^ have.keys()):
        raise UserError(
            f"'{path}' {'lacks' if name in want else 'has the extra'} tensor {name}; is the model's gin file right?"
        )
    for name, x in want.items():
        if x.shape != have[name].shape:
            raise UserError(
                f"'{path}': {name} has shape {list(have[name].shape)}, the model's gin file says {list(x.shape)}"
            )


def describe_devices() -> str:
    """What a run ran on, for run.json."""
    return f'{jax.devices()[0].device_kind} x {jax.device_count()}'
