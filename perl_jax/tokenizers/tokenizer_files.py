"""What the small files beside a tokenizer say: which tokens are special, what ends an answer, the chat template."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from perl_jax.errors import UserError
from perl_jax.interop import gguf
from perl_jax.tokenizers import tokens_beside

CONFIG, SPECIAL, GENERATION = 'tokenizer_config.json', 'special_tokens_map.json', 'generation_config.json'
TEMPLATE, ADDED = 'chat_template.jinja', 'added_tokens.json'
_CONTROL = 3  # a value of GGUF's tokenizer.ggml.token_type
_GGUF_ENDS = ('eot', 'eom')  # end of turn, end of message

_UNDERSTOOD = (
    '*_token', 'chat_template', 'add_bos_token', 'tokenizer_class', 'added_tokens_decoder', 'chat_control_tokens',
    'additional_special_tokens', 'extra_special_tokens', 'model_specific_special_tokens',
)  # fmt: skip
_HARMLESS = {  # patterns of keys of tokenizer_config.json: why they change nothing here
    'add_eos_token': 'EOS ends what is learned to answer, and no prompt, whatever this says',
    'add_special_tokens': 'BOS and EOS are put in place by a run',
    'split_special_tokens': 'plain text never becomes a control token, as if this were true',
    'legacy': 'tokenizer.json has its outcome: whether a prefix goes before each piece or the first',
    'from_slow': 'likewise',
    'use_fast': 'tokenizer.json is read',
    'sp_model_kwargs': 'sampling of pieces, which is for training',
    'clean_up_tokenization_spaces': 'text is shown as it was decoded',
    'spaces_between_special_tokens': 'likewise',
    'decode_with_prefix_space': 'likewise',
    'errors': 'what decoding does with bytes that are no text; here a replacement character',
    'model_max_length': "TASK_FEATURE_LENGTHS says it",
    'max_length': 'likewise',
    'max_len': 'likewise',
    'stride': 'likewise',
    'truncation*': 'likewise',
    'pad_to_multiple_of': 'batches are padded here',
    'padding*': 'likewise',
    'pad_token_type_id': 'no token types are read',
    'extra_ids': "T5's sentinels are among the tokens",
    'offset': 'likewise, for Pegasus',
    'keep_accents': "tokenizer.json's normalizer says it",
    'do_*': 'likewise',
    'strip_accents': 'likewise',
    'tokenize_chinese_chars': 'likewise',
    'remove_space': 'likewise',
    'trim_offsets': 'offsets are not read',
    'vocab_size': "tokenizer.json's tokens are counted",
    'vocab_type': 'likewise',
    '*_file': 'names of files, which are found by their own names',
    '*_file_class': 'likewise',
    'name_or_path': 'where it was saved',
    'special_tokens_map_file': 'likewise',
    'backend': 'which of its packages transformers reads it with',
    'is_local': 'likewise',
    'local_files_only': 'likewise',
    'auto_map': 'code that is not run',
    'transformers_version': 'who wrote it',
    'tokenizer_type': 'tokenizer.json says it',
    'slow_tokenizer_class': 'tokenizer.json is read',
    'added_tokens_encoder': 'the same as added_tokens_decoder',
    'processor_class': 'no images or sounds are read',
    'image*': 'likewise',
    'video*': 'likewise',
    'audio*': 'likewise',
    'vision*': 'likewise',
    'mm_*': 'likewise',
    'use_default_system_prompt': 'the template says it',
    'default_system_prompt': 'likewise',
    'response_schema': 'how tools read an answer',
    'response_template': 'likewise',
    'model_input_names': 'a run feeds tokens and masks',
    'return_token_type_ids': 'likewise',
    'fix_mistral_regex': "tokenizer.json's own expression is kept",
    'language*': 'translation models put it into the text',
    '*_lang*': 'likewise',
    'task': 'likewise',
    'predict_timestamps': 'likewise',
    'add_prefix_space': 'tokenizer.json says it',
}


@dataclasses.dataclass(frozen=True)
class Beside:
    """What is said of a tokenizer outside of it.

    tokens: {'bos': '<s>', 'eos': '</s>', ...} for those that are named.
    ends: further ids that end an answer, and what says so of each.
    templates: the chat templates' texts by name; `where` is the file that they are in.
    add_bos: whether prompts begin with BOS; None leaves it to the tokenizer.
    control: tokens that are no text, whatever the tokenizer says of them.
    added: tokens that are added, by id, and in `added_in`, the file that says so.
    special: tokens that are special, and added behind those where the tokenizer has them not, in this order.
    """

    tokens: Mapping[str, str]
    ends: Mapping[int, str] = dataclasses.field(default_factory=dict)
    templates: Mapping[str, str] = dataclasses.field(default_factory=dict)
    where: pathlib.Path | None = None
    add_bos: bool | None = None
    control: tuple[str, ...] = ()
    added: Mapping[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
    added_in: pathlib.Path | None = None
    special: tuple[dict[str, Any], ...] = ()

    def check_ends(self, size: int, path: str) -> None:
        """Refuse ids that a vocabulary does not have.

        Raises:
          UserError: naming the id, and the file that says it.
        """
        for i, where in self.ends.items():
            if i >= size:
                raise UserError(f'{where} = {i}: the tokenizer {path} has only {size:,} tokens; mend it or take it out')


def beside(file: pathlib.Path) -> Beside:
    """Read what stands beside a tokenizer.json or sentencepiece model, or in a GGUF file.

    Raises:
      UserError: a file that is no JSON, or a key that is not understood, naming both.
    """
    return _of_gguf(file) if file.suffix == '.gguf' else _of_folder(file.parent)


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """tokenizer_config.json; empty where there is none."""
    return _json(folder / CONFIG)


def _of_folder(folder: pathlib.Path) -> Beside:
    config, special = _json(folder / CONFIG), _json(folder / SPECIAL)
    for key, value in config.items():
        known = any(fnmatch.fnmatchcase(key, pattern) for pattern in (*_UNDERSTOOD, *_HARMLESS))
        if not known and value not in (None, False, 0, '', [], {}):
            raise UserError(f'{folder / CONFIG}: {key} = {value!r} is not understood; delete it if it changes no text')
    config_path, special_path = folder / CONFIG, folder / SPECIAL
    by_map, by_config = tokens_beside.named(special_path, special), tokens_beside.named(config_path, config)
    given, unnamed = by_map | by_config, tokens_beside.listed(config_path, config)  # the config counts more
    added, added_in = tokens_beside.by_id(config_path, config.get('added_tokens_decoder') or {}), config_path
    adds = tokens_beside.in_order(by_config if 'added_tokens_decoder' in config else given)
    if 'added_tokens_decoder' not in config:  # written by older versions, which need the older files
        unnamed, added_in = unnamed or tokens_beside.listed(special_path, special), folder / ADDED
        texts = {token['content'] for token in [*adds, *unnamed]}
        added = tokens_beside.by_text(added_in, _json(added_in), texts)
    ends: dict[int, str] = {}
    for path in folder / GENERATION, folder / 'config.json':
        said = _json(path)
        parts = [said, said.get('text_config')]
        ids = [i for part in parts if isinstance(part, dict) for i in _ids(path, part.get('eos_token_id'))]
        ends |= {i: f'{path}: eos_token_id' for i in ids if i not in ends}
    templates, where = _templates(folder, config)
    add_bos, control = config.get('add_bos_token'), config.get('chat_control_tokens') or []
    if not isinstance(add_bos, bool | None):
        raise UserError(f'{config_path}: add_bos_token = {add_bos!r}: it must be true or false')
    if not isinstance(control, list) or not all(isinstance(token, str) for token in control):
        raise UserError(f'{config_path}: chat_control_tokens = {control!r}: it must be a list of tokens')
    return Beside(
        {kind: token['content'] for kind, token in given.items()}, ends, templates, where, add_bos, tuple(control),
        added, added_in, (*adds, *unnamed),
    )  # fmt: skip


def _templates(folder: pathlib.Path, config: Mapping[str, Any]) -> tuple[dict[str, str], pathlib.Path | None]:
    """Chat templates by name: files of their own count more than the config."""
    given, path = config.get('chat_template'), folder / CONFIG
    if isinstance(given, list):
        try:
            given = {each['name']: each['template'] for each in given}
        except (TypeError, KeyError) as error:
            raise UserError(f'{path}: chat_template: each of a list needs a name and a template') from error
    given = {'default': given} if isinstance(given, str) else given or {}
    if not isinstance(given, dict) or not all(isinstance(text, str) for text in given.values()):
        raise UserError(f'{path}: chat_template = {str(given)[:60]!r}: it must be the text of a template')
    for file in sorted(folder.glob('additional_chat_templates/*.jinja')):
        given |= {file.stem: _text(file)}
    if (folder / TEMPLATE).is_file():
        given, path = given | {'default': _text(folder / TEMPLATE)}, folder / TEMPLATE
    return given, path if given else None


def _text(file: pathlib.Path) -> str:
    try:
        return file.read_text('utf-8')
    except UnicodeDecodeError as error:
        raise UserError(f'{file}: not text in UTF-8 ({error}); download it again') from error


def _of_gguf(file: pathlib.Path) -> Beside:
    fields = gguf.metadata(file)
    words = fields.get('tokenizer.ggml.tokens', [])
    types = fields.get('tokenizer.ggml.token_type', [])
    ids = {kind: fields.get(f'tokenizer.ggml.{kind}_token_id') for kind in ('bos', 'eos', 'unknown', 'padding')}
    tokens = {kind: words[i] for kind, i in ids.items() if i is not None and 0 <= i < len(words)}
    renamed = {'unknown': 'unk', 'padding': 'pad'}
    ends = {fields.get(key): f'{file}: {key}' for key in (f'tokenizer.ggml.{kind}_token_id' for kind in _GGUF_ENDS)}
    prefix = 'tokenizer.chat_template.'
    templates = {key.removeprefix(prefix): text for key, text in fields.items() if key.startswith(prefix)}
    if 'tokenizer.chat_template' in fields:
        templates['default'] = fields['tokenizer.chat_template']
    return Beside(
        {renamed.get(kind, kind): token for kind, token in tokens.items()},
        {i: where for i, where in ends.items() if i is not None},
        templates,
        file,
        fields.get('tokenizer.ggml.add_bos_token'),
        control=tuple(word for word, kind in zip(words, types) if kind == _CONTROL),
    )


def _json(path: pathlib.Path) -> dict[str, Any]:
    """An object of JSON; empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text('utf-8'))
    except ValueError as error:
        raise UserError(f'{path}: not JSON ({error}); download it again') from error
    if not isinstance(value, dict):
        raise UserError(f'{path}: not an object of JSON; download it again')
    return value


def _ids(path: pathlib.Path, value: Any) -> list[int]:
    values = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in values):
        raise UserError(f'{path}: eos_token_id = {value!r}: it must be a token id, or a list of them')
    return values
