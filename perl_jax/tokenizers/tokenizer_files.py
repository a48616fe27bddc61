"""The metadata files beside a tokenizer: which tokens are special, which end an answer, the chat template."""

from __future__ import annotations

import dataclasses
import fnmatch
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from perl_jax import json_files
from perl_jax.errors import UserError
from perl_jax.interop import gguf
from perl_jax.settings import Natural
from perl_jax.tokenizers import added_tokens

CONFIG, SPECIAL, GENERATION = 'tokenizer_config.json', 'special_tokens_map.json', 'generation_config.json'
TEMPLATE, ADDED = 'chat_template.jinja', 'added_tokens.json'
_IDS = Natural | Sequence[Natural] | None
FIELDS: Mapping[str, Mapping[str, Any]] = {
    CONFIG: {'add_bos_token': bool | None, 'chat_control_tokens': Sequence[str] | None, 'tokenizer_class': str | None},
    GENERATION: {'eos_token_id': _IDS},
    'config.json': {'eos_token_id': _IDS, 'text_config.eos_token_id': _IDS},
}
_CONTROL = 3  # a value of GGUF's tokenizer.ggml.token_type
_GGUF_ENDS = ('eot', 'eom')  # end of turn, end of message

_UNDERSTOOD = (
    '*_token', 'chat_template', 'add_bos_token', 'tokenizer_class', 'added_tokens_decoder', 'chat_control_tokens',
    'add_prefix_space',
    'additional_special_tokens', 'extra_special_tokens', 'model_specific_special_tokens',
)  # fmt: skip
_HARMLESS = {  # patterns of keys of tokenizer_config.json: why they change nothing here
    'add_eos_token': 'EOS is added to training targets and to no prompt, whatever the value',
    'add_special_tokens': 'a run adds BOS and EOS itself',
    'split_special_tokens': 'plain text never becomes a control token, as if this were true',
    'legacy': 'tokenizer.json contains its effect: whether a prefix goes before each piece or the first',
    'from_slow': 'likewise',
    'use_fast': 'tokenizer.json is read',
    'sp_model_kwargs': 'sampling of pieces, for training only',
    'clean_up_tokenization_spaces': 'text is shown as decoded',
    'spaces_between_special_tokens': 'likewise',
    'decode_with_prefix_space': 'likewise',
    'errors': 'how bytes that are not UTF-8 are decoded; here as a replacement character',
    'model_max_length': 'TASK_FEATURE_LENGTHS defines it',
    'max_length': 'likewise',
    'max_len': 'likewise',
    'stride': 'likewise',
    'truncation*': 'likewise',
    'pad_to_multiple_of': 'batches are padded here',
    'padding*': 'likewise',
    'pad_token_type_id': 'no token types are read',
    'extra_ids': "T5's sentinels are among the tokens",
    'offset': 'likewise, for Pegasus',
    'keep_accents': "tokenizer.json's normalizer defines it",
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
    'tokenizer_type': 'tokenizer.json defines it',
    'slow_tokenizer_class': 'tokenizer.json is read',
    'added_tokens_encoder': 'the same as added_tokens_decoder',
    'processor_class': 'no images or sounds are read',
    'image*': 'likewise',
    'video*': 'likewise',
    'audio*': 'likewise',
    'vision*': 'likewise',
    'mm_*': 'likewise',
    'use_default_system_prompt': 'the template defines it',
    'default_system_prompt': 'likewise',
    'response_schema': 'how tools read an answer',
    'response_template': 'likewise',
    'model_input_names': 'a run feeds tokens and masks',
    'return_token_type_ids': 'likewise',
    'fix_mistral_regex': "tokenizer.json's own expression is kept",
    'language*': 'translation models write it into the text',
    '*_lang*': 'likewise',
    'task': 'likewise',
    'predict_timestamps': 'likewise',
}


# Classes of transformers for byte-level BPE that set add_prefix_space, by default false, in spite of tokenizer.json.
_PREFIX_SPACE_CLASSES = ('GPT2Tokenizer', 'GPTNeoXTokenizer', 'Qwen2Tokenizer', 'RobertaTokenizer')


@dataclasses.dataclass(frozen=True)
class TokenizerMetadata:
    """What metadata files specify about a tokenizer.

    Attributes:
      tokens: named special tokens, {'bos': '<s>', 'eos': '</s>', ...}.
      ends: further ids that end an answer, each with the file and key that specify it.
      templates: the texts of chat templates by name.
      where: the file with the templates.
      add_bos: whether prompts begin with BOS; None leaves it to the tokenizer.
      add_prefix_space: whether the first word gets a space in front; None leaves it to the tokenizer.
      control: tokens that plain text never becomes, whatever the tokenizer specifies.
      added: settings of added tokens by id.
      added_in: the file that specifies `added`.
      special: special tokens, which are appended in this order where the tokenizer lacks them.
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
    add_prefix_space: bool | None = None

    def check_ends(self, size: int, path: str) -> None:
        """Refuse ids that a vocabulary does not have.

        Raises:
          UserError: naming the id, and the file that specifies it.
        """
        for i, source in self.ends.items():
            if i >= size:
                raise UserError(
                    f'{source} = {i}: the tokenizer {path} has only {size:,} tokens; correct the id or remove it'
                )


def read_metadata(file: pathlib.Path) -> TokenizerMetadata:
    """Read the files beside a tokenizer.json or sentencepiece model, or the metadata of a GGUF file.

    Raises:
      UserError: a file that is not JSON, or an unknown key, naming both.
    """
    return _of_gguf(file) if file.suffix == '.gguf' else _of_folder(file.parent)


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the contents of tokenizer_config.json, {} without one."""
    return _json(folder / CONFIG)


def _of_folder(folder: pathlib.Path) -> TokenizerMetadata:
    config, special_map = _json(folder / CONFIG), _json(folder / SPECIAL)
    for key, value in config.items():
        is_known = any(fnmatch.fnmatchcase(key, pattern) for pattern in (*_UNDERSTOOD, *_HARMLESS))
        if not is_known and value not in (None, False, 0, '', [], {}):
            raise UserError(f'{folder / CONFIG}: {key} = {value!r} is not understood; delete it if it changes no text')
    config_path, special_path = folder / CONFIG, folder / SPECIAL
    map_tokens, config_tokens = added_tokens.named(special_path, special_map), added_tokens.named(config_path, config)
    named_tokens = map_tokens | config_tokens  # the config takes precedence
    listed_tokens = added_tokens.listed(config_path, config)
    tokens_by_id, added_in = added_tokens.by_id(config_path, config.get('added_tokens_decoder') or {}), config_path
    ordered_tokens = added_tokens.in_order(config_tokens if 'added_tokens_decoder' in config else named_tokens)
    if 'added_tokens_decoder' not in config:  # written by older versions, which need the older files
        listed_tokens, added_in = listed_tokens or added_tokens.listed(special_path, special_map), folder / ADDED
        texts = {token['content'] for token in [*ordered_tokens, *listed_tokens]}
        tokens_by_id = added_tokens.by_text(added_in, _json(added_in), texts)
    eos_sources: dict[int, str] = {}
    for path in folder / GENERATION, folder / 'config.json':
        contents = _json(path)
        objects = [x for x in (contents, contents.get('text_config')) if isinstance(x, dict)]
        ids = [i for x in objects for i in _as_list(x.get('eos_token_id'))]
        eos_sources |= {i: f'{path}: eos_token_id' for i in ids if i not in eos_sources}
    templates, template_path = _templates(folder, config)
    add_bos, control = config.get('add_bos_token'), config.get('chat_control_tokens') or []
    return TokenizerMetadata(
        {kind: token['content'] for kind, token in named_tokens.items()}, eos_sources, templates, template_path,
        add_bos, tuple(control), tokens_by_id, added_in, (*ordered_tokens, *listed_tokens),
        _prefix_space(config_path, config),
    )  # fmt: skip


def _prefix_space(path: pathlib.Path, config: Mapping[str, Any]) -> bool | None:
    value, class_name = config.get('add_prefix_space'), str(config.get('tokenizer_class')).removesuffix('Fast')
    if not isinstance(value, bool | None):
        raise UserError(f'{path}: add_prefix_space = {value!r}: it must be true or false')
    return bool(value) if class_name in _PREFIX_SPACE_CLASSES else None


def _templates(folder: pathlib.Path, config: Mapping[str, Any]) -> tuple[dict[str, str], pathlib.Path | None]:
    """Returns chat templates by name, and their file; separate files take precedence over the config."""
    templates, path = config.get('chat_template'), folder / CONFIG
    if isinstance(templates, list):
        try:
            templates = {entry['name']: entry['template'] for entry in templates}
        except (TypeError, KeyError) as error:
            raise UserError(f'{path}: chat_template: each of a list needs a name and a template') from error
    templates = {'default': templates} if isinstance(templates, str) else templates or {}
    if not isinstance(templates, dict) or not all(isinstance(text, str) for text in templates.values()):
        raise UserError(f'{path}: chat_template = {str(templates)[:60]!r}: it must be the text of a template')
    for file in sorted(folder.glob('additional_chat_templates/*.jinja')):
        templates |= {file.stem: _text(file)}
    if (folder / TEMPLATE).is_file():
        templates, path = templates | {'default': _text(folder / TEMPLATE)}, folder / TEMPLATE
    return templates, path if templates else None


def _text(file: pathlib.Path) -> str:
    try:
        return file.read_text('utf-8')
    except UnicodeDecodeError as error:
        raise UserError(f'{file}: not text in UTF-8 ({error}); download it again') from error


def _of_gguf(file: pathlib.Path) -> TokenizerMetadata:
    fields = gguf.metadata(file)
    token_texts = fields.get('tokenizer.ggml.tokens', [])
    types = fields.get('tokenizer.ggml.token_type', [])
    ids = {kind: fields.get(f'tokenizer.ggml.{kind}_token_id') for kind in ('bos', 'eos', 'unknown', 'padding')}
    tokens = {kind: token_texts[i] for kind, i in ids.items() if i is not None and 0 <= i < len(token_texts)}
    kind_names = {'unknown': 'unk', 'padding': 'pad'}
    keys = [f'tokenizer.ggml.{kind}_token_id' for kind in _GGUF_ENDS]
    eos_sources = {fields.get(key): f'{file}: {key}' for key in keys}
    prefix = 'tokenizer.chat_template.'
    templates = {key.removeprefix(prefix): text for key, text in fields.items() if key.startswith(prefix)}
    if 'tokenizer.chat_template' in fields:
        templates['default'] = fields['tokenizer.chat_template']
    return TokenizerMetadata(
        {kind_names.get(kind, kind): token for kind, token in tokens.items()},
        {i: source for i, source in eos_sources.items() if i is not None},
        templates,
        file,
        fields.get('tokenizer.ggml.add_bos_token'),
        control=tuple(text for text, kind in zip(token_texts, types) if kind == _CONTROL),
    )


def _json(path: pathlib.Path) -> dict[str, Any]:
    """Returns an object from a JSON file; {} without the file."""
    if not path.is_file():
        return {}
    return json_files.read(path, FIELDS.get(path.name, {}))


def _as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else value if isinstance(value, list) else [value]
