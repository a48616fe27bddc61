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

from perl_jax import settings, trees
from perl_jax.errors import UserError
from perl_jax.interop import hf, paths, safetensors, t5x
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

    Attributes:
      network: a module with the methods of models.decoder.Decoder and a `config`.
      path: see above; None draws random weights from the run's seed.
      dtype: of the parameters on the devices; 'bfloat16' halves their memory.
      shared: False gives policy, value, anchor and learned reward a copy each, as the paper did.

    Raises:
      UserError: a setting of another type, or an empty path.
    """

    network: nn.Module
    path: str | None = None
    dtype: settings.Dtype = 'float32'
    shared: bool = True

    def __post_init__(self) -> None:
        settings.check(self)
        if self.path == '':
            raise UserError("INITIAL_CHECKPOINT_PATH = '': name weights or a MODEL_DIR; None is random weights")


@dataclasses.dataclass(frozen=True)
class Base:
    """Parameters on the mesh, with what checkpoints record of them.

    Attributes:
      params: the parameters.
      axes: their logical axis names.
      path: of the weights, absolute if they are files.
      fingerprint: of the parameters (fingerprints.py).
      network: a description of the network that uses them (models/description.py).
    """

    params: PyTree
    axes: PyTree
    path: str
    fingerprint: str
    network: Description

    def without_arrays(self) -> Base:
        """Returns a copy with shapes only, so that the arrays can be freed."""
        return dataclasses.replace(self, params=jax.eval_shape(lambda x: x, self.params))

    @property
    def name(self) -> dict[str, Any]:
        """The record of this base in checkpoints and run.json."""
        dtype = str(jax.tree.leaves(self.params)[0].dtype)
        return {'path': self.path, 'fingerprint': self.fingerprint, 'dtype': dtype, 'network': self.network}


def check(config: BaseConfig) -> None:
    """Check that there are weights at the path, and that they are of the config's network if they describe theirs.

    Only headers are read, so this is called before the data are.

    Args:
      config: network and path.

    Raises:
      UserError: naming what is missing or differs.
    """
    if config.path is None:
        return
    if hf.is_checkpoint(config.path):
        hf.agree(config.path, config.network)
        safetensors.entries(hf.resolve(config.path))
    elif config.path.endswith('.gguf'):
        paths.resolve(config.path)
    elif t5x.find(config.path) is None:
        _open_run(config.path)


def load(config: BaseConfig, partitioner: Partitioner, seed: int, classifier: bool = False) -> Base:
    """Read the base onto the mesh.

    Args:
      config: network, path and dtype.
      partitioner: the devices, and how the parameters are split over them.
      seed: of random weights.
      classifier: accept one of transformers' classifiers too, for a reward.

    Raises:
      UserError: no such path, or a tensor that is missing, extra or of another shape than the network's.
    """
    shapes, axes = partitioning.abstract_params(config.network)
    partitioner.check_params(shapes, axes)
    shardings = partitioner.tree(axes)
    if config.path is None:
        init = functools.partial(partitioning.init_params, config.network, dtype=config.dtype)
        params = jax.jit(init, out_shardings=shardings)(jax.random.key(seed))
        return Base(params, axes, f'random:{seed}', fingerprint(params), describe(config.network))
    if (weights := _find_leaves(config.path, config.network, shapes, classifier)) is None:
        params = _load_merged(config.path, config, partitioner, shapes, axes)
    else:
        _check_shapes(config.path, shapes, weights)
        params = partitioner.place(weights, shardings, config.dtype)
    fingerprint_, nonfinite = fingerprints.fingerprint_and_nonfinite(params)
    if nonfinite:
        raise UserError(
            f"'{config.path}': {nonfinite[0]} ({len(nonfinite)} tensors in all) has numbers that are not finite; "
            'download or convert it again'
        )
    is_fixed = '://' in config.path or config.path.startswith(paths.PREFIX)
    path = config.path if is_fixed else os.path.abspath(config.path)  # so that any working directory finds it
    return Base(params, axes, path, fingerprint_, describe(config.network))


def load_base(
    path: str | None,
    network: nn.Module | None = None,
    *,
    dtype: settings.Dtype = 'float32',
    seed: int = 0,
    partitioner: Partitioner = Partitioner(),  # noqa: B008 (frozen)
) -> tuple[nn.Module, Base]:
    """Load a network with its frozen weights.

    Args:
      path: a Hugging Face folder, hf://OWNER/NAME, a GGUF file, a T5X checkpoint, or the MODEL_DIR of an SFT or a
        policy run, whose adapter is then merged in. None draws random weights for `network`.
      network: the network of the weights; None reads it from them, which is not possible with T5X's.
      dtype: of the parameters on the devices: 'float32', 'bfloat16' or 'float16'.
      seed: of random weights.
      partitioner: the devices, and how the parameters are split over them.

    Returns:
      The network, and the base: its `params` on the devices, their logical axes `axes`, `path` and `fingerprint`.

    Raises:
      UserError: no such path, or weights of another network than `network`.
    """
    network = lineage.network(path) if network is None else network
    config = BaseConfig(network, path, dtype)
    check(config)
    with partitioner.scope():
        return network, load(config, partitioner, seed)


def load_recorded(
    network: nn.Module, record: Mapping[str, Any], partitioner: Partitioner, fallback_path: str | None = None
) -> Base:
    """Load the base that a checkpoint records.

    Args:
      network: of the run.
      record: the run's `Base.name`.
      partitioner: the devices, and how the parameters are split over them.
      fallback_path: where the base is if it is no longer at the recorded path.

    Raises:
      UserError: the run has another network, or the weights have another fingerprint.
    """
    path, seed = record['path'], 0
    check_network(network, record, f"the run that names '{path}' as its base")
    if path.startswith('random:'):
        path, seed = None, int(path.removeprefix('random:'))
    elif fallback_path is not None and '://' not in path and not os.path.exists(path):
        path = fallback_path
    base = load(
        BaseConfig(network, path, record['dtype']), partitioner, seed, classifier=True
    )  # the run that recorded it has checked that
    if base.fingerprint != record['fingerprint']:
        location = path or record['path']
        raise UserError(
            f"the base at '{location}' has changed since the run that names it; put back what it was made on"
        )
    return base


def check_network(network: nn.Module, record: Mapping[str, Any], run_name: str) -> None:
    """Refuse a run's adapters for another network than theirs, which shapes alone do not show.

    Args:
      network: to use them with.
      record: the run's `Base.name`; older versions recorded no network.
      run_name: what to call the run in the message.

    Raises:
      UserError: naming the setting.
    """
    recorded, current = record.get('network', {}), describe(network)
    if key := difference(recorded, current):
        raise UserError(f'{run_name} is of another network: {key} is {recorded[key]!r} there and {current[key]!r} here')


def _find_leaves(path: str, network: nn.Module, shapes: PyTree, classifier: bool) -> PyTree | None:
    """Returns the leaves of the weights at a path, not read yet; None if it can only be the MODEL_DIR of a run."""
    if hf.is_checkpoint(path):
        return hf.leaves(path, network, shapes, classifier)
    if path.endswith('.gguf'):
        from perl_jax.interop import gguf

        return gguf.leaves(path)
    if t5x.find(path) is not None:
        return t5x.leaves(path, stacked='layers_0' not in shapes.get('encoder', {}))
    return None


def _open_run(path: str) -> finished.FinishedRun:
    """Returns the SFT or policy run at a path that names no weights.

    Raises:
      UserError: there is no such run.
    """
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
    return finished.best(path, phase=('sft', 'policy'), flag='INITIAL_CHECKPOINT_PATH', role='policy')


def _load_merged(path: str, config: BaseConfig, partitioner: Partitioner, shapes: PyTree, axes: PyTree) -> PyTree:
    """Returns the base of an SFT or a policy run with its adapter merged in, on the mesh."""
    run = _open_run(path)
    check_network(config.network, run.about['base'], f"INITIAL_CHECKPOINT_PATH: '{path}'")
    if (full_params := run.shapes['policy'].params) is not None:
        _check_shapes(path, shapes, full_params)
        return run.placed(partitioner, axes, ['policy'], config.dtype)['policy'].params
    base = load_recorded(config.network, run.about['base'], partitioner)
    adapter = run.on_host(['policy'])['policy']
    flat, shardings = (trees.flatten(tree) for tree in (base.params, partitioner.tree(axes)))
    lora_factors = trees.flatten(adapter.lora)
    del base  # so that each array is freed as soon as it is replaced
    for name in flat:
        leaf, layer = Placed(flat[name]), name.removesuffix('/kernel')
        if f'{layer}/a' in lora_factors:
            a, b, scale = lora_factors[f'{layer}/a'], lora_factors[f'{layer}/b'], lora.scale_of(adapter.scale, layer)
            merged = Merged(leaf, flat[name].dtype, a, b, scale)
            flat[name] = place(merged, shardings[name], config.dtype, name)
        elif flat[name].dtype != config.dtype:
            flat[name] = place(leaf, shardings[name], config.dtype, name)
    return trees.unflatten(flat)


def _check_shapes(path: str, shapes: PyTree, params: PyTree) -> None:
    expected, actual = (trees.flatten(tree) for tree in (shapes, params))
    for name in sorted(expected.keys() ^ actual.keys()):
        raise UserError(
            f"'{path}' {'lacks' if name in expected else 'has the extra'} tensor {name}; is the model's gin file right?"
        )
    for name, leaf in expected.items():
        if leaf.shape != actual[name].shape:
            raise UserError(
                f"'{path}': {name} has shape {list(actual[name].shape)}, the model's gin file says {list(leaf.shape)}"
            )


def describe_devices() -> str:
    """Returns the devices of a run, for run.json."""
    return f'{jax.devices()[0].device_kind} x {jax.device_count()}'
