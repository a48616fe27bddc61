"""Checkpoints in Hugging Face's form, read by slices, written leaf by leaf: a folder, or hf://OWNER/NAME of the hub."""

from __future__ import annotations

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import PyTree

from perl_jax import trees
from perl_jax.errors import UserError
from perl_jax.interop import hf_config, hf_names, safetensors
from perl_jax.models.description import describe, difference
from perl_jax.models.t5 import T5
from perl_jax.parallel.leaves import InMemory, Leaf, Stacked, Transposed

HUB = 'hf://'
_SCORE, _OUTPUT = 'score.weight', 'decoder/logits_dense/kernel'
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


def is_classifier(path: str) -> bool:
    """Whether a checkpoint is one of transformers' classifiers, as rewards are."""
    names = hf_config.read(resolve(path)).get('architectures') or ['']
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f'{path}/config.json: architectures = {names!r}: it must be a list of names')
    return names[0].endswith('ForSequenceClassification')


def agree(path: str, network: nn.Module) -> None:
    """Check that config.json of a checkpoint is of `network`; no tensor is read.

    Raises:
      UserError: it is not, naming what differs.
    """
    folder = resolve(path)
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
    found = {_plain(name): entry for name, entry in safetensors.entries(resolve(path)).items()}
    flat, zeros = trees.flatten(shapes), {}
    if classifier and found.pop(_SCORE, None) is not None and _OUTPUT in flat and 'lm_head.weight' not in found:
        zeros[_OUTPUT] = InMemory(np.broadcast_to(np.float32(0), flat.pop(_OUTPUT).shape))
    _check_copies(path, network, found)
    names = {leaf: hf_names.theirs(network, leaf) for leaf in flat}
    wanted = {name for each in names.values() for name in each}
    if _SCORE in found:
        names = hf_config.read(resolve(path)).get('architectures')
        raise UserError(
            f"'{path}': {_SCORE} is a classifier's head, and architectures = {names!r} in config.json names no "
            '..ForSequenceClassification; correct it there'
        )
    if missing := wanted - found.keys():
        raise UserError(f'{path}: lacks tensor {min(missing)} ({len(missing)} in all); is it a whole checkpoint?')
    extra = {name for name in found.keys() - wanted if not hf_names.IGNORED.fullmatch(name)}
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
    return trees.unflatten(tree | zeros)


def score(path: str, width: int) -> np.ndarray:
    """The head [D] of a classifier with one label, float32.

    Args:
      width: D of the network.

    Raises:
      UserError: several labels, or a head that is more than a matrix.
    """
    folder = resolve(path)
    config, found = hf_config.read(folder), safetensors.entries(folder)
    if (given := config.get('num_labels', 1)) != 1:
        raise UserError(f'{folder}/config.json: num_labels = {given!r}: a reward has 1')
    if (problem := config.get('problem_type')) not in (None, 'regression'):
        raise UserError(f'{folder}/config.json: problem_type = {problem!r}: a reward is one number, a regression')
    if _SCORE not in found or f'{_SCORE.removesuffix("weight")}bias' in found:
        raise UserError(f'{folder}: a classifier whose head is not {_SCORE} alone cannot be read')
    named = config.get('id2label') or {'0': ''}
    if not isinstance(named, dict):
        raise UserError(f'{folder}/config.json: id2label = {named!r}: it must be an object of JSON')
    if (shape := found[_SCORE].shape) != (1, width) or len(named) != 1:
        raise UserError(
            f'{folder}: a reward has num_labels 1: {_SCORE} has shape {list(shape)}, where [1, {width}] is wanted, and '
            f'id2label in config.json has {len(named)} entries'
        )
    head = found[_SCORE].read().astype(np.float32)[0]
    if not np.isfinite(head).all():
        raise UserError(f'{folder}: {_SCORE} has numbers that are not finite')
    return head


def _check_copies(path: str, network: nn.Module, found: dict[str, safetensors.Entry]) -> None:
    """Tensors that repeat another one are dropped, once they are seen to; one of the copies alone will do too.

    Raises:
      UserError: they differ, so that what is dropped would matter.
    """
    if isinstance(network, T5):
        copies, source = ['encoder.embed_tokens.weight', 'decoder.embed_tokens.weight'], 'shared.weight'
        if there := [name for name in copies if name in found]:  # madlad400 has no other
            found.setdefault(source, found[there[0]])
    else:
        copies, source = [], 'model.embed_tokens.weight'
    copies += ['lm_head.weight'] if network.config.logits_via_embedding else []
    for name in copies:
        if (copy := found.pop(name, None)) is not None and source in found and not copy.equals(found[source]):
            way_out = 'if they should be two, say tie_word_embeddings = false there'
            if name != 'lm_head.weight':
                way_out = 'a model with an embedding table for each side cannot be read'
            raise UserError(f'{path}: {name} differs from {source}, and by config.json they are one; {way_out}')
    if isinstance(network, T5) and source in found:  # an output matrix that is a copy may be left out there
        found.setdefault('lm_head.weight', found[source])
        if network.config.logits_via_embedding:
            del found['lm_head.weight']


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
    where = {name: (leaf, i) for leaf in flat for i, name in enumerate(hf_names.theirs(network, leaf))}
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


def _shape(shape: tuple[int, ...], leaf: str, stacked: bool) -> tuple[int, ...]:
    shape = shape[1:] if stacked else shape
    return shape[::-1] if hf_names.is_transposed(leaf) else shape


def _leaf(entries: list[safetensors.Entry], leaf: str) -> Leaf:
    each = [Transposed(entry) for entry in entries] if hf_names.is_transposed(leaf) else entries
    return Stacked(each) if '/layers/' in leaf else each[0]


def _agree(folder: pathlib.Path, theirs: nn.Module, ours: nn.Module) -> None:
    """What changes the result must be the same in config.json and in the run's gin file."""
    want, have = describe(theirs), describe(ours)
    if want['class'] != have['class']:
        raise UserError(f"{folder}: is for {want['class']}, the run's gin file says {have['class']}")
    if key := difference(want, have):
        raise UserError(f"{folder}/config.json: {key} is {want[key]!r}, the model's gin file says {have[key]!r}")
