"""The files and settings beside a model's weights in a Hugging Face folder: tokenizer, chat template, ids, lengths."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from perl_jax import json_files
from perl_jax.interop import gguf, hf, hf_config, paths
from perl_jax.tokenizers import token_ids, tokenizer_files
from perl_jax.tokenizers.tokenizer_files import CONFIG, GENERATION, TEMPLATE

_TOKENIZER = (
    'tokenizer.json', CONFIG, tokenizer_files.SPECIAL, 'added_tokens.json', 'tokenizer.model', 'spiece.model',
    'vocab.json', 'merges.txt', TEMPLATE,
)  # fmt: skip
_LENGTHS = ('max_position_embeddings', 'n_positions')
_IDS = ('bos_token_id', 'eos_token_id', 'pad_token_id', 'decoder_start_token_id')
_TOKENIZER_IDS = ('bos_token_id', 'eos_token_id', 'pad_token_id')
_FILLERS = ('pad', 'unused', 'reserved', 'fill')  # parts of the names of special tokens that never occur in texts
_RARE = ('<0x00>', 'Ā')  # the byte 0 in byte-fallback and byte-level tokenizers: practically never in a text


@dataclasses.dataclass(frozen=True)
class Companions:
    """The files of a Hugging Face folder except the weights.

    Attributes:
      files: contents by file name.
      config: entries of config.json.
      tokens: the tokenizer's special tokens by kind (bos, eos, pad, unk).
    """

    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokens: dict[str, str] = dataclasses.field(default_factory=dict)

    def write(self, folder: pathlib.Path) -> None:
        """Write the files into a folder and add the entries to its config.json, if there is one."""
        for name, content in self.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        if (path := folder / 'config.json').is_file():
            path.write_text(json.dumps(json_files.read(path) | self.config, indent=2) + '\n')


def collect(weights: str, tokenizer: str | None, ends: Sequence[int] = ()) -> Companions:
    """Collect the files and settings that a model was published with.

    Args:
      weights: the path of the original weights (lineage.origin).
      tokenizer: the path of the run's vocabulary; None is the tokenizer of the weights.
      ends: the ids of all EOS tokens, at which `generate` stops; empty keeps those of the files.
    """
    config = _config(weights)
    path = weights if tokenizer is None else tokenizer
    tokenizer_companions = _tokenizer_companions(path)
    files, tokens = tokenizer_companions.files, tokenizer_companions.tokens
    if not _belongs_to_weights(weights, path):  # ids of the weights' vocabulary are wrong for another tokenizer
        config = {key: value for key, value in config.items() if key not in _TOKENIZER_IDS}
    token_to_id, _ = token_ids.read(files)
    special_ids = {
        f'{kind}_token_id': token_to_id[tokens[kind]] for kind in ('bos', 'pad') if tokens.get(kind) in token_to_id
    }
    config = (
        special_ids | config | {key: value for key, value in tokenizer_companions.config.items() if key not in _LENGTHS}
    )
    generation = json_files.parse(files.get(GENERATION) or '{}', GENERATION, tokenizer_files.FIELDS[GENERATION])
    if ends:
        config['eos_token_id'] = generation['eos_token_id'] = list(ends) if len(ends) > 1 else ends[0]
    generation = {key: config[key] for key in _IDS if config.get(key) is not None} | generation
    if generation:
        files[GENERATION] = _json(generation)
    return Companions(files, config, tokens)


def for_rewards(policy_companions: Companions, ends: Sequence[int]) -> Companions:
    """Choose a padding token that is no EOS token.

    transformers' classifiers read the score at the last token that is not padding. If the padding token were an EOS
    token, they would skip the EOS of a response too and read the score one token early.
    """
    files = {name: content for name, content in policy_companions.files.items() if name != GENERATION}
    token_to_id, special_tokens = token_ids.read(files)
    stop_ids = {*ends, *_as_list(policy_companions.config.get('eos_token_id'))}
    if not token_to_id:
        pad = policy_companions.config.get('pad_token_id')
        pad = (
            pad
            if pad is not None and pad not in stop_ids
            else next(token_id for token_id in range(len(stop_ids) + 1) if token_id not in stop_ids)
        )
        return dataclasses.replace(
            policy_companions, files=files, config=policy_companions.config | {'pad_token_id': pad}
        )
    stop_ids |= (
        {token_to_id[policy_companions.tokens['eos']]} if policy_companions.tokens.get('eos') in token_to_id else set()
    )
    fillers = [
        token
        for token in special_tokens
        if any(filler in token.lower() for filler in _FILLERS) and token.startswith('<')
    ]
    named_tokens = [policy_companions.tokens.get(kind) for kind in ('unk', 'bos')]
    candidates = [
        policy_companions.tokens.get('pad'),
        *fillers,
        *named_tokens,
        *(reversed(special_tokens) if special_tokens != token_to_id else ()),
    ]
    candidates += [*_RARE, *reversed(token_to_id)]
    pad = next(token for token in candidates if token in token_to_id and token_to_id[token] not in stop_ids)
    tokenizer_config = json_files.parse(files.get(CONFIG) or '{}', CONFIG) | {'pad_token': pad}
    files[CONFIG] = _json(tokenizer_config)
    if tokenizer_files.SPECIAL in files:
        files[tokenizer_files.SPECIAL] = _json(
            json_files.parse(files[tokenizer_files.SPECIAL], tokenizer_files.SPECIAL) | {'pad_token': pad}
        )
    return Companions(
        files, policy_companions.config | {'pad_token_id': token_to_id[pad]}, policy_companions.tokens | {'pad': pad}
    )


def _config(weights: str) -> dict[str, Any]:
    """Read the maximum length and the special ids that the weights were published with."""
    if weights.endswith('.gguf'):
        fields = gguf.metadata(weights)
        length = fields.get(f'{fields.get("general.architecture")}.context_length')
        return {} if length is None else {'max_position_embeddings': length}
    if not hf.is_checkpoint(weights):
        return {}
    folder = hf.resolve(weights, weights=False)
    config = json_files.read(folder / 'config.json', tokenizer_files.FIELDS['config.json']) | hf_config.read(folder)
    return {key: config[key] for key in (*_IDS, *_LENGTHS) if config.get(key) is not None}


def _belongs_to_weights(weights: str, path: str) -> bool:
    """Tell whether a tokenizer's path is the path of the weights or in their folder."""
    tokenizer_path = pathlib.Path(path).expanduser().absolute()
    return path == weights or pathlib.Path(weights).expanduser().absolute() in (tokenizer_path, tokenizer_path.parent)


def _tokenizer_companions(path: str) -> Companions:
    """Read the tokenizer's files at a path in the form that transformers reads; empty if there are none."""
    if path == 'byt5':
        return Companions({CONFIG: _json({'tokenizer_class': 'ByT5Tokenizer'})}, {'pad_token_id': 0})
    if path.endswith('.gguf'):
        return _gguf_companions(path)
    if path.endswith('.model'):
        return _sentencepiece_companions(paths.resolve(path))
    if path.endswith('.json'):
        return _folder_companions(paths.resolve(path).parent)
    if hf.is_checkpoint(path) or pathlib.Path(path).expanduser().is_dir():
        return _folder_companions(hf.resolve(path, weights=False))
    return Companions()


def _folder_companions(folder: pathlib.Path) -> Companions:
    names = [*_TOKENIZER, GENERATION]
    names += [f'{file.parent.name}/{file.name}' for file in folder.glob('additional_chat_templates/*.jinja')]
    files = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    return Companions(files, {}, dict(tokenizer_files.read_metadata(folder / 'tokenizer.json').tokens))


def _gguf_companions(path: str) -> Companions:
    from tokenizers import processors

    from perl_jax.tokenizers.tokenizers import TokenizersVocabulary

    file = paths.resolve(path)
    fields, special_files = gguf.metadata(file), tokenizer_files.read_metadata(file)
    vocabulary = TokenizersVocabulary(path)
    tokenizer, tokens = vocabulary.tokenizer, dict(special_files.tokens)
    tokenizer_json = json.loads(tokenizer.to_str())
    if (bos := vocabulary.bos_id) is not None:
        name = tokenizer.id_to_token(bos)
        opening = processors.TemplateProcessing(single=f'{name} $A', special_tokens=[(name, bos)])
        tokenizer_json['post_processor'] = json.loads(opening.__getstate__())
    config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False}
    config |= {f'{kind}_token': token for kind, token in tokens.items()} | {'add_bos_token': bos is not None}
    if (length := fields.get(f'{fields.get("general.architecture")}.context_length')) is not None:
        config['model_max_length'] = length
    files = {'tokenizer.json': json.dumps(tokenizer_json, ensure_ascii=False).encode(), CONFIG: _json(config)}
    if 'default' in special_files.templates:
        files[TEMPLATE] = special_files.templates['default'].encode()
    ids = {f'{kind}_token_id': tokenizer.token_to_id(tokens[kind]) for kind in ('bos', 'pad') if kind in tokens}
    return Companions(files, ids | {'eos_token_id': vocabulary.eos_id}, tokens)


def _sentencepiece_companions(file: pathlib.Path) -> Companions:
    """Add the tokenizer_config.json that transformers needs for a bare sentencepiece model.

    A unigram model is read by T5Tokenizer, a BPE model by LlamaTokenizer.
    """
    import sentencepiece

    folder_companions = _folder_companions(file.parent)
    if CONFIG in folder_companions.files:
        return folder_companions
    model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    ids = {kind: getattr(model, f'{kind}_id')() for kind in ('bos', 'eos', 'pad', 'unk')}
    ids = {kind: token_id for kind, token_id in ids.items() if token_id >= 0}
    spec = token_ids.model_proto(file.read_bytes()).trainer_spec
    is_t5 = spec.model_type == spec.UNIGRAM
    tokens = {kind: model.id_to_piece(token_id) for kind, token_id in ids.items()}
    config = {'tokenizer_class': 'T5Tokenizer' if is_t5 else 'LlamaTokenizer'}
    config |= {f'{kind}_token': token for kind, token in tokens.items()}
    files = {'spiece.model' if is_t5 else 'tokenizer.model': file.read_bytes(), CONFIG: _json(config)}
    keys = {f'{kind}_token_id': token_id for kind, token_id in ids.items() if kind != 'unk'}
    return Companions(files | folder_companions.files, keys, tokens)


def _as_list(value: Any) -> list[int]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + '\n').encode()
