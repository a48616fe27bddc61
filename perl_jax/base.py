"""The frozen base: one tree of parameters that policy, anchor, reward and value all bind to.

It comes from a path: a weights file (GGUF, `package:NAME/FILE.gguf` for one inside an installed package), a Hugging
Face checkpoint (a folder with a config.json, or hf://OWNER/NAME), a T5X checkpoint (a folder, gs:// too), the MODEL_DIR
of an SFT run (its own base with its adapter merged in), or nothing, for random weights from the seed.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import linen as nn
from flax import traverse_util
from jaxtyping import PyTree

from perl_jax import lora, partitioning
from perl_jax.checkpoints import Checkpoints, fingerprint
from perl_jax.errors import UserError
from perl_jax.interop import hf, t5x
from perl_jax.partitioning import Partitioner


@dataclasses.dataclass(frozen=True)
class BaseConfig:
    """The frozen model of a run.

    network: a module with the methods of networks.decoder.Decoder and a `config`.
    path: see above; None is random weights from the run's seed.
    dtype: of the parameters as they lie on the devices; 'bfloat16' halves them.
    """

    network: nn.Module
    path: str | None = None
    dtype: str = 'float32'

    def __post_init__(self) -> None:
        if self.dtype not in ('float32', 'bfloat16', 'float16'):
            raise UserError(f"BASE_DTYPE = {self.dtype!r}: give 'float32', 'bfloat16' or 'float16'")


@dataclasses.dataclass(frozen=True)
class Base:
    """Parameters on the mesh, their logical axes, and what a checkpoint calls them."""

    params: PyTree
    axes: PyTree
    path: str
    fingerprint: str

    def released(self) -> Base:
        """Without the parameters, of which only the shapes stay: they are not read where others hold them or copies."""
        return dataclasses.replace(self, params=jax.eval_shape(lambda x: x, self.params))

    @property
    def name(self) -> dict[str, str]:
        """How checkpoints refer to this base."""
        dtype = str(jax.tree.leaves(self.params)[0].dtype)
        return {'path': self.path, 'fingerprint': self.fingerprint, 'dtype': dtype}


def load(config: BaseConfig, partitioner: Partitioner, seed: int) -> Base:
    """Read the base onto the mesh.

    Raises:
      UserError: no such path, or a tensor that is missing, extra or of another shape than the network's.
    """
    shapes, axes = partitioning.abstract(config.network)
    partitioner.check_params(shapes, axes)
    shardings = partitioner.tree(axes)
    if config.path is None:
        init = jax.jit(lambda key: _random(config, key), out_shardings=shardings)
        params = init(jax.random.key(seed))
        return Base(params, axes, f'random:{seed}', fingerprint(params))
    if hf.is_checkpoint(config.path):
        where, dtype = traverse_util.flatten_dict(shardings, sep='/'), jnp.dtype(config.dtype)

        def put(leaf: str, x: np.ndarray) -> jax.Array:  # and wait, so that only one leaf is ever held twice
            return jax.block_until_ready(jax.device_put(x.astype(dtype, copy=False), where[leaf]))

        params = hf.load(config.path, config.network, shapes, put)
    else:
        params = _read(config, partitioner)
        _check(config.path, shapes, params)
        params = jax.tree.map(lambda x, where: jax.device_put(jnp.asarray(x, config.dtype), where), params, shardings)
    path = config.path if '://' in config.path else os.path.abspath(config.path)  # found from any folder
    return Base(params, axes, path, fingerprint(params))


def named(network: nn.Module, name: Mapping[str, str], partitioner: Partitioner, now: str | None = None) -> Base:
    """The base that a checkpoint names; an error if what is there has another fingerprint.

    `now` is where it lies if it is no longer where it was.
    """
    path, seed = name['path'], 0
    if path.startswith('random:'):
        path, seed = None, int(path.removeprefix('random:'))
    elif now is not None and '://' not in path and not os.path.exists(path):
        path = now
    base = load(BaseConfig(network, path, name['dtype']), partitioner, seed)
    if base.fingerprint != name['fingerprint']:
        where = path or name['path']
        raise UserError(f"the base at '{where}' has changed since the run that names it; put back what it was made on")
    return base


def _random(config: BaseConfig, key: jax.Array) -> PyTree:
    one = jnp.zeros((1, 1), jnp.int32)
    params = partitioning.unbox(config.network.init(key, one, one == 0, one[:, None]))['params']
    return jax.tree.map(lambda x: x.astype(config.dtype), params)


def _read(config: BaseConfig, partitioner: Partitioner) -> PyTree:
    path = config.path
    if path.endswith('.gguf'):
        from perl_jax.interop import gguf

        return gguf.load(path)
    if t5x.find(path) is not None:
        return t5x.load(path, config.dtype)
    if not epath.Path(path).is_dir():
        raise UserError(
            f"INITIAL_CHECKPOINT_PATH: '{path}' is no .gguf file, no Hugging Face or T5X checkpoint and no "
            'MODEL_DIR of an SFT run'
        )
    if epath.Path(path, 'adapter_config.json').exists():
        raise UserError(
            f"INITIAL_CHECKPOINT_PATH: '{path}' is an adapter of PEFT; make a MODEL_DIR of it with "
            '`perl_jax import --format=peft`'
        )
    adapter, about = read_adapter(path, 'policy', phase='sft', flag='INITIAL_CHECKPOINT_PATH')
    if adapter.params is not None:
        return adapter.params
    return lora.merge(named(config.network, about['base'], partitioner).params, adapter)


def read_adapter(model_dir: str, role: str, *, phase: str, flag: str) -> tuple[lora.Adapter, dict[str, Any]]:
    """One role of `read_adapters`.

    Raises:
      UserError: naming `flag`; also where the run has several adapters in that role's place (an ensemble).
    """
    adapters, about = read_adapters(model_dir, phase=phase, flag=flag)
    if role not in adapters:
        raise UserError(
            f"{flag}: '{model_dir}' holds {', '.join(adapters)}, where one '{role}' is needed; "
            'make one of an ensemble with perl_jax average'
        )
    return adapters[role], about


def read_adapters(model_dir: str, *, phase: str, flag: str) -> tuple[dict[str, lora.Adapter], dict[str, Any]]:
    """The best (or latest) adapters of a run by role, as host arrays, and what their checkpoint says of itself.

    Raises:
      UserError: naming `flag`, if `model_dir` holds no checkpoint of a run of `phase`.
    """
    if not epath.Path(model_dir, 'checkpoints').is_dir():
        raise UserError(f"{flag}: '{model_dir}' is not the MODEL_DIR of a run: it has no checkpoints/")
    checkpoints = Checkpoints(model_dir, read_only=True)
    if (step := checkpoints.best()) is None:
        raise UserError(f"{flag}: '{model_dir}' has no checkpoint yet; let that run finish first")
    about = checkpoints.about(step)
    if about['phase'] != phase:
        raise UserError(f"{flag}: '{model_dir}' is a run of {about['phase']}; name one of {phase}")
    adapters = checkpoints.restore_adapters(step)
    checkpoints.close()
    return adapters, about


def _check(path: str, shapes: PyTree, params: PyTree) -> None:
    want, have = (traverse_util.flatten_dict(tree, sep='/') for tree in (shapes, params))
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
