"""What goes with a model's weights in a Hugging Face folder: tokenizer, chat template, special ids, lengths."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from perl_jax.interop import gguf, hf, hf_config, paths
from perl_jax.tokenizers import token_ids, tokenizer_files
from perl_jax.tokenizers.tokenizer_files import CONFIG, GENERATION, TEMPLATE

_TOKENIZER = (
    'tokenizer.json', CONFIG, tokenizer_files.SPECIAL, 'added_tokens.json', 'tokenizer.model', 'spiece.model',
    'vocab.json', 'merges.txt', TEMPLATE,
)  # fmt: skip
_LENGTHS = ('max_position_embeddings', 'n_positions')
_IDS = ('bos_token_id', 'eos_token_id', 'pad_token_id', 'decoder_start_token_id')
_OF_TOKENIZER = ('bos_token_id', 'eos_token_id', 'pad_token_id')
_FILLERS = ('pad', 'unused', 'reserved', 'fill')  # in the names of tokens that no text has
_RARE = ('<0x00>', 'Ā')  # the byte 0, as tokenizers write it: no text has it, and few have what it is written as


@dataclasses.dataclass(frozen=True)
class Companions:
    """Small files by name, and keys of config.json; `tokens` are the tokenizer's special ones by kind."""

    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokens: dict[str, str] = dataclasses.field(default_factory=dict)

    def write(self, folder: pathlib.Path) -> None:
        """Write the files, and put the keys into a config.json that is there."""
        for name, content in self.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        if (path := folder / 'config.json').is_file():
            path.write_text(json.dumps(json.loads(path.read_text()) | self.config, indent=2) + '\n')


def collect(weights: str, tokenizer: str | None, ends: Sequence[int] = ()) -> Companions:
    """Gather what a model was published with.

    Args:
      weights: where its weights came from at first (lineage.origin).
      tokenizer: the name of the vocabulary that a run read with (a path); None is what the weights bring.
      ends: the ids that end an answer, for which `generate` is to stop too; none are those of the files.
    """
    config = _config(weights)
    path = weights if tokenizer is None else tokenizer
    found = _files(path)
    files, tokens = found.files, found.tokens
    if not _is_own(weights, path):  # what these ids are in the weights' vocabulary is something else here
        config = {key: value for key, value in config.items() if key not in _OF_TOKENIZER}
    ids, _ = token_ids.read(files)
    named = {f'{kind}_token_id': ids[tokens[kind]] for kind in ('bos', 'pad') if tokens.get(kind) in ids}
    config = named | config | {key: value for key, value in found.config.items() if key not in _LENGTHS}
    generation = json.loads(files.get(GENERATION) or '{}')
    if ends:
        config['eos_token_id'] = generation['eos_token_id'] = list(ends) if len(ends) > 1 else ends[0]
    generation = {key: config[key] for key in _IDS if config.get(key) is not None} | generation
    if generation:
        files[GENERATION] = _json(generation)
    return Companions(files, config, tokens)


def for_rewards(given: Companions, ends: Sequence[int]) -> Companions:
    """The same with a token for padding that ends no text: a classifier reads its score before the padding."""
    files = {name: content for name, content in given.files.items() if name != GENERATION}
    every, special = token_ids.read(files)
    stops = {*ends, *_listed(given.config.get('eos_token_id'))}
    if not every:
        pad = given.config.get('pad_token_id')
        pad = pad if pad is not None and pad not in stops else next(i for i in range(len(stops) + 1) if i not in stops)
        return dataclasses.replace(given, files=files, config=given.config | {'pad_token_id': pad})
    stops |= {every[given.tokens['eos']]} if given.tokens.get('eos') in every else set()
    fillers = [token for token in special if any(word in token.lower() for word in _FILLERS) and token.startswith('<')]
    named = [given.tokens.get(kind) for kind in ('unk', 'bos')]
    wanted = [given.tokens.get('pad'), *fillers, *named, *(reversed(special) if special != every else ())]
    wanted += [*_RARE, *reversed(every)]
    pad = next(token for token in wanted if token in every and every[token] not in stops)
    said = json.loads(files.get(CONFIG) or '{}') | {'pad_token': pad}
    files[CONFIG] = _json(said)
    if tokenizer_files.SPECIAL in files:
        files[tokenizer_files.SPECIAL] = _json(json.loads(files[tokenizer_files.SPECIAL]) | {'pad_token': pad})
    return Companions(files, given.config | {'pad_token_id': every[pad]}, given.tokens | {'pad': pad})


def _config(weights: str) -> dict[str, Any]:
    """Lengths and ids that the weights were published with."""
    if weights.endswith('.gguf'):
        fields = gguf.metadata(weights)
        length = fields.get(f'{fields.get("general.architecture")}.context_length')
        return {} if length is None else {'max_position_embeddings': length}
    if not hf.is_checkpoint(weights):
        return {}
    folder = hf.resolve(weights, weights=False)
    whole = json.loads((folder / 'config.json').read_text())
    said = whole | hf_config.read(folder)
    return {key: said[key] for key in (*_IDS, *_LENGTHS) if said.get(key) is not None}


def _is_own(weights: str, path: str) -> bool:
    """Whether a tokenizer's path is in the folder of the weights, or means the same."""
    here = pathlib.Path(path).expanduser().absolute()
    return path == weights or pathlib.Path(weights).expanduser().absolute() in (here, here.parent)


def _files(path: str) -> Companions:
    """The tokenizer at a path, as transformers reads it; nothing where there is none."""
    if path == 'byt5':
        return Companions({CONFIG: _json({'tokenizer_class': 'ByT5Tokenizer'})}, {'pad_token_id': 0})
    if path.endswith('.gguf'):
        return _of_gguf(path)
    if path.endswith('.model'):
        return _of_sentencepiece(paths.resolve(path))
    if path.endswith('.json'):
        return _of_folder(paths.resolve(path).parent)
    if hf.is_checkpoint(path) or pathlib.Path(path).expanduser().is_dir():
        return _of_folder(hf.resolve(path, weights=False))
    return Companions()


def _of_folder(folder: pathlib.Path) -> Companions:
    names = [*_TOKENIZER, GENERATION]
    names += [f'{file.parent.name}/{file.name}' for file in folder.glob('additional_chat_templates/*.jinja')]
    files = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    return Companions(files, {}, dict(tokenizer_files.beside(folder / 'tokenizer.json').tokens))


def _of_gguf(path: str) -> Companions:
    from tokenizers import processors

    from perl_jax.tokenizers.tokenizers import TokenizersVocabulary

    file = paths.resolve(path)
    fields, said = gguf.metadata(file), tokenizer_files.beside(file)
    vocabulary = TokenizersVocabulary(path)
    tokenizer, tokens = vocabulary.tokenizer, dict(said.tokens)
    text = json.loads(tokenizer.to_str())
    if (bos := vocabulary.bos_id) is not None:
        name = tokenizer.id_to_token(bos)
        opening = processors.TemplateProcessing(single=f'{name} $A', special_tokens=[(name, bos)])
        text['post_processor'] = json.loads(opening.__getstate__())
    config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False}
    config |= {f'{kind}_token': token for kind, token in tokens.items()} | {'add_bos_token': bos is not None}
    if (length := fields.get(f'{fields.get("general.architecture")}.context_length')) is not None:
        config['model_max_length'] = length
    files = {'tokenizer.json': json.dumps(text, ensure_ascii=False).encode(), CONFIG: _json(config)}
    if 'default' in said.templates:
        files[TEMPLATE] = said.templates['default'].encode()
    ids = {f'{kind}_token_id': tokenizer.token_to_id(tokens[kind]) for kind in ('bos', 'pad') if kind in tokens}
    return Companions(files, ids | {'eos_token_id': vocabulary.eos_id}, tokens)


def _of_sentencepiece(file: pathlib.Path) -> Companions:
    """A model alone gets what transformers needs to read it: T5's kind is a unigram model, Llama's BPE."""
    import sentencepiece

    beside = _of_folder(file.parent)
    if CONFIG in beside.files:
        return beside
    model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    ids = {kind: getattr(model, f'{kind}_id')() for kind in ('bos', 'eos', 'pad', 'unk')}
    ids = {kind: i for kind, i in ids.items() if i >= 0}
    spec = token_ids.model_proto(file.read_bytes()).trainer_spec
    is_t5 = spec.model_type == spec.UNIGRAM
    tokens = {kind: model.id_to_piece(i) for kind, i in ids.items()}
    config = {'tokenizer_class': 'T5Tokenizer' if is_t5 else 'LlamaTokenizer'}
    config |= {f'{kind}_token': token for kind, token in tokens.items()}
    files = {'spiece.model' if is_t5 else 'tokenizer.model': file.read_bytes(), CONFIG: _json(config)}
    keys = {f'{kind}_token_id': i for kind, i in ids.items() if kind != 'unk'}
    return Companions(files | beside.files, keys, tokens)


def _listed(value: Any) -> list[int]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + '\n').encode()
