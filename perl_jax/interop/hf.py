"""Checkpoints in Hugging Face's form, read by slices, written leaf by leaf: a folder, or hf://OWNER/NAME of the hub."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import PyTree

from perl_jax import json_files, trees
from perl_jax.errors import UserError
from perl_jax.interop import hf_config, hf_names, safetensors
from perl_jax.models.description import describe, difference
from perl_jax.models.t5 import T5
from perl_jax.parallel.leaves import InMemory, Leaf, Stacked, Transposed

HUB = 'hf://'
_SCORE, _OUTPUT = 'score.weight', 'decoder/logits_dense/kernel'
_FILES = ('*.safetensors', '*.json', 'tokenizer.model', 'spiece.model', '*.jinja')
_ADAPTER = 'adapter_config.json'
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
    download_options = {'repo_id': name, 'revision': revision or None, 'allow_patterns': list(_FILES)}
    download_options |= {} if weights else {'ignore_patterns': list(_WEIGHTS)}
    try:
        return pathlib.Path(snapshot_download(**download_options, etag_timeout=5))
    except Exception as error:  # its errors have no base class of their own
        try:
            return pathlib.Path(snapshot_download(**download_options, local_files_only=True))
        except Exception:
            reason = ' '.join(str(error).split())[:200]
            raise UserError(f'{path}: cannot be had from the hub and is not in its cache ({reason})') from error


def network(path: str) -> nn.Module:
    """The network that a checkpoint is of, in float32."""
    return hf_config.network(resolve(path))


def is_classifier(path: str) -> bool:
    """Whether a checkpoint is one of transformers' classifiers, as rewards are."""
    names = hf_config.read(resolve(path)).get('architectures') or ['']
    return names[0].endswith('ForSequenceClassification')


def agree(path: str, network: nn.Module) -> None:
    """Check that config.json of a checkpoint is of `network`; no tensor is read.

    Raises:
      UserError: it is not, naming what differs; or an adapter is in the same folder.
    """
    folder = resolve(path)
    if (folder / _ADAPTER).exists():  # transformers loads it over the weights
        raise UserError(
            f"{folder}: {_ADAPTER} beside the weights: move the adapter's files to a folder of their own and import "
            f'that with --format=peft, or remove {_ADAPTER} to take the weights alone'
        )
    _agree(folder, hf_config.network(folder), network)


def leaves(path: str, network: nn.Module, shapes: PyTree, classifier: bool = False) -> PyTree:
    """Find a checkpoint's tensors in the tree of `network`; only headers and copies are read.

    Args:
      shapes: the tree's leaves as shapes (partitioning.abstract).
      classifier: take one of transformers' classifiers too; its output matrix, which it has not and a reward does not
        use, is zeros. Its head is what `score` reads.

    Returns:
      A tree of leaves.Leaf, [in, out] and stacked as the network has them.

    Raises:
      UserError: a tensor is missing, extra, or of another shape; a config.json that says otherwise than `network`.
    """
    agree(path, network)
    if not classifier and is_classifier(path):
        raise UserError(
            f"'{path}' is a classifier (architectures in config.json): it gives scores and no answers; make a reward "
            'of it with `perl_jax import --format=hf`'
        )
    entries = _entries(resolve(path))
    flat, zeros = trees.flatten(shapes), {}
    if classifier and entries.pop(_SCORE, None) is not None and _OUTPUT in flat and 'lm_head.weight' not in entries:
        zeros[_OUTPUT] = InMemory(np.broadcast_to(np.float32(0), flat.pop(_OUTPUT).shape))
    _check_copies(path, network, entries)
    names = {leaf: hf_names.tensor_names(network, leaf) for leaf in flat}
    expected_names = {name for tensor_names in names.values() for name in tensor_names}
    if _SCORE in entries:
        names = hf_config.read(resolve(path)).get('architectures')
        raise UserError(
            f"'{path}': {_SCORE} is a classifier's head, and architectures = {names!r} in config.json names no "
            '..ForSequenceClassification; correct it there'
        )
    if missing := expected_names - entries.keys():
        raise UserError(f'{path}: lacks tensor {min(missing)} ({len(missing)} in all); is it a whole checkpoint?')
    extra = {name for name in entries.keys() - expected_names if not hf_names.IGNORED.fullmatch(name)}
    if extra:
        raise UserError(f'{path}: tensor {min(extra)} ({len(extra)} in all) has no place in this model')
    for leaf, tensor_names in names.items():  # all of them before the first is read
        for name in tensor_names:
            shape = _shape(flat[leaf].shape, leaf, stacked=len(tensor_names) > 1 or '/layers/' in leaf)
            if entries[name].shape != shape:
                raise UserError(
                    f'{path}: {name} has shape {list(entries[name].shape)}, the model wants {list(shape)}'
                )
            entries[name].numpy_dtype()
    tree = {leaf: _leaf([entries[name] for name in tensor_names], leaf) for leaf, tensor_names in names.items()}
    return trees.unflatten(tree | zeros)


def score(path: str, width: int) -> np.ndarray:
    """The head [D] of a classifier with one label, float32.

    Args:
      width: D of the network.

    Raises:
      UserError: several labels, or a head that is more than a matrix.
    """
    folder = resolve(path)
    config, entries = hf_config.read(folder), safetensors.entries(folder)
    if (num_labels := config.get('num_labels', 1)) != 1:
        raise UserError(f'{folder}/config.json: num_labels = {num_labels!r}: a reward has 1')
    if (problem := config.get('problem_type')) not in (None, 'regression'):
        raise UserError(f'{folder}/config.json: problem_type = {problem!r}: a reward is one number, a regression')
    if _SCORE not in entries or f'{_SCORE.removesuffix("weight")}bias' in entries:
        raise UserError(f'{folder}: a classifier whose head is not {_SCORE} alone cannot be read')
    named = config.get('id2label') or {'0': ''}
    if len(shape := entries[_SCORE].shape) == 2 and shape[0] != 1:
        raise UserError(
            f'{folder}: {_SCORE} has {shape[0]} rows, one for each label, and a reward needs 1; take a classifier with '
            'num_labels 1'
        )
    if shape != (1, width):
        raise UserError(f'{folder}: {_SCORE} has shape {list(shape)}, where [1, {width}] is wanted')
    if len(named) != 1:
        raise UserError(f'{folder}/config.json: a reward has num_labels 1, and id2label has {len(named)} entries')
    head = entries[_SCORE].read().astype(np.float32)[0]
    if not np.isfinite(head).all():
        raise UserError(f'{folder}: {_SCORE} has numbers that are not finite')
    return head


def _check_copies(path: str, network: nn.Module, entries: dict[str, safetensors.Entry]) -> None:
    """Drop duplicate tensors after checking that they are equal; a file with only one copy is accepted.

    Raises:
      UserError: they differ.
    """
    if isinstance(network, T5):
        copies, source = ['encoder.embed_tokens.weight', 'decoder.embed_tokens.weight'], 'shared.weight'
        if present_copies := [name for name in copies if name in entries]:  # madlad400 has no other
            entries.setdefault(source, entries[present_copies[0]])
    else:
        copies, source = [], 'model.embed_tokens.weight'
    copies += ['lm_head.weight'] if network.config.logits_via_embedding else []
    for name in copies:
        if (copy := entries.pop(name, None)) is not None and source in entries and not copy.equals(entries[source]):
            way_out = 'if they should be two, say tie_word_embeddings = false there'
            if name != 'lm_head.weight':
                way_out = 'a model with an embedding table for each side cannot be read'
            raise UserError(f'{path}: {name} differs from {source}, and by config.json they are one; {way_out}')
    if isinstance(network, T5) and source in entries:  # an output matrix that is a copy may be left out there
        entries.setdefault('lm_head.weight', entries[source])
        if network.config.logits_via_embedding:
            del entries['lm_head.weight']


def save(
    folder: str | os.PathLike,
    network: nn.Module,
    params: PyTree,
    dtype: str,
    head: jax.Array | None = None,
) -> None:
    """Write plain parameters as transformers loads them; a tokenizer does not go along.

    Args:
      folder: gets config.json and model.safetensors, of a large model several; it is made if it is not there.
      network: what the parameters are of.
      params: those of a base, or of base and adapter: `merge(base, adapter)`.
      dtype: of the file: 'float32', 'bfloat16' or 'float16'.
      head: a reward's [D]; the model becomes a classifier with one label, which reads it at the last token.

    Raises:
      UserError: no model of transformers computes what this network does.
    """
    config = hf_config.write(network)
    if head is not None and config['model_type'] == 't5':
        raise UserError("transformers' T5 classifier has another head than a reward; it cannot be exported there")
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flat = trees.flatten(params)
    where = {name: (leaf, i) for leaf in flat for i, name in enumerate(hf_names.tensor_names(network, leaf))}
    if head is not None:
        where.pop('lm_head.weight', None)
        where['score.weight'] = ('score', 0)
        flat['score'] = head[None]
    kind = jnp.dtype(dtype)

    def read(name: str) -> np.ndarray:
        leaf, i = where[name]
        x = flat[leaf][i] if '/layers/' in leaf else flat[leaf]
        x = np.asarray(jax.device_get(x))
        if kind == np.float16 and np.abs(x).max(initial=0) > np.finfo(kind).max:
            raise UserError(f'export: --dtype=float16: {name} has numbers beyond {np.finfo(kind).max}; take bfloat16')
        x = x.astype(kind)
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


def _entries(folder: pathlib.Path) -> dict[str, safetensors.Entry]:
    """The tensors of a checkpoint by their plain names."""
    originals: dict[str, str] = {}
    entries = safetensors.entries(folder)
    for name in entries:
        if (other := originals.setdefault(_plain(name), name)) != name:
            raise UserError(f'{folder}: the tensors {other} and {name} are the same one of the model; remove either')
    return {plain: entries[name] for plain, name in originals.items()}


def _shape(shape: tuple[int, ...], leaf: str, stacked: bool) -> tuple[int, ...]:
    shape = shape[1:] if stacked else shape
    return shape[::-1] if hf_names.is_transposed(leaf) else shape


def _leaf(entries: list[safetensors.Entry], leaf: str) -> Leaf:
    each = [Transposed(entry) for entry in entries] if hf_names.is_transposed(leaf) else entries
    return Stacked(each) if '/layers/' in leaf else each[0]


def _agree(folder: pathlib.Path, network_of_config: nn.Module, network: nn.Module) -> None:
    """What changes the result must be the same in config.json and in the run's gin file."""
    of_file, of_run = describe(network_of_config), describe(network)
    if of_file['class'] != of_run['class']:
        raise UserError(f"{folder}: is for {of_file['class']}, the run's gin file says {of_run['class']}")
    if isinstance(network, T5):
        _check_start(folder / 'generation_config.json')
    if key := difference(of_file, of_run):
        raise UserError(f"{folder}/config.json: {key} is {of_file[key]!r}, the model's gin file says {of_run[key]!r}")


def _check_start(path: pathlib.Path) -> None:
    """Refuse a T5 that generates from another token than 0, whatever config.json says: that file decides."""
    if path.is_file():
        json_files.read(path, {'decoder_start_token_id': Literal[0] | None})  # our decoder starts from 0
