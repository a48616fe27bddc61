"""The README.md of an exported adapter, with the code that loads it correctly.

PEFT builds the model from the base's folder, so settings that an adapter's folder cannot hold come from there: a
classifier's number of labels (default: two), its padding token (the score is read at the last token that is not
padding, which is one too early if EOS pads), and the tokens at which `generate` stops. Where the base's settings differ
from the run's, they must be passed to from_pretrained, which forwards keywords of config.json to the base.
"""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

from perl_jax import json_files
from perl_jax.interop import hf, hf_config
from perl_jax.tokenizers import token_ids
from perl_jax.tokenizers.tokenizer_files import CONFIG, FIELDS, GENERATION
from perl_jax.tools.companions import Companions

FILE = 'README.md'
_CLASSES = {
    'CAUSAL_LM': 'AutoPeftModelForCausalLM',
    'SEQ_2_SEQ_LM': 'AutoPeftModelForSeq2SeqLM',
    'SEQ_CLS': 'AutoPeftModelForSequenceClassification',
}


def required_arguments(base: str, task: str, model_files: Companions) -> dict[str, str]:
    """Return the keyword arguments that from_pretrained needs, as Python source.

    Args:
      base: the weights that the adapter applies to, in Hugging Face's format.
      task: PEFT's task_type.
      model_files: the files and settings written beside the adapter.
    """
    folder = hf.resolve(base, weights=False)
    config = json_files.read(folder / 'config.json', hf_config.FIELDS)
    if task == 'SEQ_CLS':
        labels = config.get('id2label')
        base_values = {
            'num_labels': config.get('num_labels', 2) if labels is None else len(labels),
            'pad_token_id': hf_config.read(folder).get('pad_token_id'),
        }
        required_values = {'num_labels': 1, 'pad_token_id': model_files.config['pad_token_id']}
        return {key: str(value) for key, value in required_values.items() if base_values[key] != value}
    if set(_as_list(model_files.config.get('eos_token_id'))) == set(_eos_ids(folder)):
        return {}
    return {'generation_config': 'GenerationConfig.from_pretrained({folder})'}


def load_call(task: str, folder: str, load_arguments: dict[str, str]) -> str:
    """Return the Python expression that loads an adapter; `folder` is an expression for its path."""
    keywords = ''.join(f', {name}={value.format(folder=folder)}' for name, value in load_arguments.items())
    return f'{_CLASSES[task]}.from_pretrained({folder}{keywords})'


def write(
    folder: str | os.PathLike, name: str, task: str, model_files: Companions, load_arguments: dict[str, str]
) -> None:
    """Write README.md and the companion files into an adapter's folder.

    Args:
      folder: the adapter's folder.
      name: the adapter's base_model_name_or_path.
      task: PEFT's task_type.
      model_files: the files to write.
      load_arguments: the result of `required_arguments`.
    """
    folder = pathlib.Path(folder)
    skipped = () if 'generation_config' in load_arguments else (GENERATION,)  # PEFT uses the base's file
    Companions({key: text for key, text in model_files.files.items() if key not in skipped}).write(folder)
    (folder / FILE).write_text(_text(name, task, model_files, load_arguments))


def _text(name: str, task: str, model_files: Companions, load_arguments: dict[str, str]) -> str:
    is_reward, has_tokenizer = task == 'SEQ_CLS', CONFIG in model_files.files or 'tokenizer.json' in model_files.files
    classes = ['AutoTokenizer'] * has_tokenizer + ['GenerationConfig'] * ('generation_config' in load_arguments)
    lines = [f'from peft import {_CLASSES[task]}']
    lines += [f'from transformers import {", ".join(classes)}'] if classes else []
    lines += [
        '',
        "folder = '.'  # the folder of this file",
        f'model = {load_call(task, "folder", load_arguments)}.eval()',
    ]
    lines += ['tokenizer = AutoTokenizer.from_pretrained(folder)'] if has_tokenizer else []
    if is_reward and has_tokenizer:
        lines += [
            '',
            f'texts = [prompt + answer + {_eos_text(model_files)}, ...]',
            "scores = model(**tokenizer(texts, padding=True, return_tensors='pt')).logits[:, 0]",
        ]
    reasons = [_REASONS[key] for key in load_arguments]
    if is_reward and load_arguments:
        reasons += [
            'A base with these settings needs no arguments: save the result of '
            '`AutoModelForSequenceClassification.from_pretrained('
            f"'{name}', num_labels=1, pad_token_id={load_arguments.get('pad_token_id', 'PAD')})` with "
            '`save_pretrained`, and export with `--base=` that folder.'
        ]
    sections = [
        '\n'.join(['---', f'base_model: {json.dumps(name)}', 'library_name: peft', '---']),
        f'# {"A reward" if is_reward else "A policy"}, as an adapter for {name}',
        'Written by `perl_jax export --format=peft`. Load it with',
        '\n'.join(['```python', *lines, '```']),
        *reasons,
    ]
    return '\n\n'.join(sections) + '\n'


_REASONS = {
    'num_labels': '`num_labels=1`: a reward is one number. By default transformers makes a head of two.',
    'pad_token_id': "`pad_token_id`: a classifier reads its score at a text's last token that is not padding. The "
    "tokenizer here pads with a token that is no EOS token. Without the argument the base's padding token is used: if "
    'it has none, batches are an error; if it is an EOS token, scores are silently wrong.',
    'generation_config': "`generation_config`: answers end with other EOS tokens than the base's `generate` stops at.",
}


def _eos_text(model_files: Companions) -> str:
    """Return the EOS token of answers, as Python source."""
    first_eos, (token_to_id, _) = (
        _as_list(model_files.config.get('eos_token_id'))[:1],
        token_ids.read(model_files.files),
    )
    return next((repr(token) for token, i in token_to_id.items() if [i] == first_eos), 'tokenizer.eos_token')


def _eos_ids(folder: pathlib.Path) -> list[int]:
    """Return the ids at which transformers stops generating with a model of this folder."""
    if (path := folder / GENERATION).is_file():
        return _as_list(json_files.read(path, FIELDS[GENERATION]).get('eos_token_id'))
    return _as_list(hf_config.read(folder).get('eos_token_id'))


def _as_list(value: Any) -> list[int]:
    return [] if value is None else value if isinstance(value, list) else [value]
