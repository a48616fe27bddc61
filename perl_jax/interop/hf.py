"""Checkpoints in Hugging Face's form, read by slices, written leaf by leaf: a folder, or hf://OWNER/NAME of the hub."""

from __future__ import annotations

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jaxtyping import PyTree

from perl_jax.errors import UserError
from perl_jax.interop import hf_config, hf_names, safetensors
from perl_jax.leaves import Leaf, Stacked, Transposed
from perl_jax.networks.t5 import T5

HUB = 'hf://'
_FILES = ('*.safetensors', '*.json', 'tokenizer.model', 'spiece.model', '*.jinja')
_WEIGHTS = ('*.safetensors', '*.safetensors.index.json')


def is_checkpoint(path: str) -> bool:
    """Whether a path means a checkpoint in this form: hf://..., or a folder with a config.json."""
    return path.startswith(HUB) or os.path.isfile(os.path.join(path, 'config.json'))


def resolve(path: str, weights: bool = True) -> pathlib.Path:
    """The local folder of a checkpoint; one on the hub is downloaded into its cache, or found there.

    Args:
      weights: False leaves those on the hub, where only a tokenizer is wanted.

    Raises:
      UserError: no such folder, or the hub cannot be reached or does not have it.
    """
    if not path.startswith(HUB):
        folder = pathlib.Path(path).expanduser()
        if not folder.is_dir():
            raise UserError(f"'{path}': there is no such folder; a model of the hub is named {HUB}OWNER/NAME")
        return folder
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(f"{path}: needs the huggingface_hub package; pip install 'perl_jax[hf]'") from error
    name, _, revision = path.removeprefix(HUB).partition('@')
    wanted = {'repo_id': name, 'revision': revision or None, 'allow_patterns': list(_FILES)}
    wanted |= {} if weights else {'ignore_patterns': list(_WEIGHTS)}
    try:
        return pathlib.Path(snapshot_download(**wanted, etag_timeout=5))
    except Exception as error:  # its errors have no base class of their own
        try:
            return pathlib.Path(snapshot_download(**wanted, local_files_only=True))
        except Exception:
            said = ' '.join(str(error).split())[:200]
            raise UserError(f'{path}: cannot be had from the hub and is not in its cache ({said})') from error


def network(path: str) -> nn.Module:
    """The network that a checkpoint is of, in float32."""
    return hf_config.network(resolve(path))


def leaves(path: str, network: nn.Module, shapes: PyTree) -> PyTree:
    """Find a checkpoint's tensors in the tree of `network`; only headers are read.

    Args:
      shapes: the tree's leaves as shapes (partitioning.abstract).

    Returns:
      A tree of leaves.Leaf, [in, out] and stacked as the network has them.

    Raises:
      UserError: a tensor is missing, extra, or of another shape; a config.json that says otherwise than `network`.
    """
    folder = resolve(path)
    _agree(folder, hf_config.network(folder), network)
    found = {_plain(name): entry for name, entry in safetensors.entries(folder).items()}
    if isinstance(network, T5) and 'shared.weight' in found:  # an output matrix that is a copy may be left out there
        found.setdefault('lm_head.weight', found['shared.weight'])
    flat = traverse_util.flatten_dict(shapes, sep='/')
    names = {leaf: hf_names.theirs(network, leaf) for leaf in flat}
    wanted = {name for each in names.values() for name in each}
    if missing := wanted - found.keys():
        raise UserError(f'{path}: lacks tensor {min(missing)} ({len(missing)} in all); is it a whole checkpoint?')
    tied = {'lm_head.weight'} if network.config.logits_via_embedding else set()
    extra = {name for name in found.keys() - wanted - tied if not hf_names.IGNORED.fullmatch(name)}
    if extra:
        raise UserError(f'{path}: tensor {min(extra)} ({len(extra)} in all) has no place in this model')
    for leaf, each in names.items():  # all of them before the first is read
        for name in each:
            shape = _shape(flat[leaf].shape, leaf, stacked=len(each) > 1 or '/layers/' in leaf)
            if found[name].shape != shape:
                raise UserError(
                    f'{path}: {name} has shape {list(found[name].shape)}, the model wants {list(shape)}'
                )
            found[name].numpy_dtype()
    tree = {leaf: _leaf([found[name] for name in each], leaf) for leaf, each in names.items()}
    return traverse_util.unflatten_dict(tree, sep='/')


def save(
    folder: str | os.PathLike,
    network: nn.Module,
    params: PyTree,
    dtype: str,
    head: jax.Array | None = None,
) -> None:
    """Write plain parameters (base, or base and adapter merged) as transformers loads them.

    Args:
      dtype: 'float32', 'bfloat16' or 'float16'.
      head: a reward's [D]; the model becomes a classifier with one label, which reads it at the last token.

    Raises:
      UserError: no model of transformers computes what this network does.
    """
    config = hf_config.write(network)
    if head is not None and config['model_type'] == 't5':
        raise UserError("transformers' T5 classifier has another head than a reward; it cannot be exported there")
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flat = traverse_util.flatten_dict(params, sep='/')
    where = {name: (leaf, i) for leaf in flat for i, name in enumerate(hf_names.theirs(network, leaf))}
    if head is not None:
        where.pop('lm_head.weight', None)
        where['score.weight'] = ('score', 0)
        flat['score'] = head[None]
    kind = jnp.dtype(dtype)

    def read(name: str) -> np.ndarray:
        leaf, i = where[name]
        x = flat[leaf][i] if '/layers/' in leaf else flat[leaf]
        x = np.asarray(jax.device_get(x)).astype(kind)
        return x.swapaxes(-1, -2) if hf_names.is_transposed(leaf) else x

    layers = {leaf: flat[leaf].shape[0] if '/layers/' in leaf else 1 for leaf in flat}
    sizes = {name: flat[leaf].size // layers[leaf] * kind.itemsize for name, (leaf, _) in where.items()}
    safetensors.save(folder, sizes, read)
    config |= {'architectures': [architecture(config['model_type'], head is not None)], 'dtype': dtype}
    if head is not None:
        config |= {'num_labels': 1, 'id2label': {'0': 'reward'}, 'label2id': {'reward': 0}}
    (folder / 'config.json').write_text(json.dumps(config, indent=2) + '\n')


_PREFIXES = {
    'llama': 'Llama', 'mistral': 'Mistral', 'qwen2': 'Qwen2',
    'qwen3': 'Qwen3', 'gemma': 'Gemma', 'gemma2': 'Gemma2', 'gemma3_text': 'Gemma3',
}  # fmt: skip


def architecture(model_type: str, is_reward: bool) -> str:
    """transformers' class, such as LlamaForCausalLM."""
    if model_type == 't5':
        return 'T5ForConditionalGeneration'
    if is_reward and model_type == 'gemma3_text':
        return 'Gemma3TextForSequenceClassification'
    return _PREFIXES[model_type] + ('ForSequenceClassification' if is_reward else 'ForCausalLM')


def _plain(name: str) -> str:
    """Without what the text part of a larger model is wrapped in (Gemma 3's)."""
    return name.replace('model.language_model.', 'model.').removeprefix('language_model.')


def _shape(shape: tuple[int, ...], leaf: str, stacked: bool) -> tuple[int, ...]:
    shape = shape[1:] if stacked else shape
    return shape[::-1] if hf_names.is_transposed(leaf) else shape


def _leaf(entries: list[safetensors.Entry], leaf: str) -> Leaf:
    each = [Transposed(entry) for entry in entries] if hf_names.is_transposed(leaf) else entries
    return Stacked(each) if '/layers/' in leaf else each[0]


def _agree(folder: pathlib.Path, theirs: nn.Module, ours: nn.Module) -> None:
    """What changes the result must be the same in config.json and in the run's gin file."""
    if type(theirs) is not type(ours):
        raise UserError(f"{folder}: is for {type(theirs).__name__}, the run's gin file says {type(ours).__name__}")
    for key in ours.config.__dataclass_fields__:
        have, want = getattr(ours.config, key), getattr(theirs.config, key)
        if key not in ('dtype', 'flash', 'remat', 'scan_layers') and have != want:
            raise UserError(f"{folder}/config.json: {key} is {want!r}, the model's gin file says {have!r}")
