"""The README.md of an exported adapter: the line that loads it right.

PEFT makes the model of the base's folder alone, and so gets from there what is not in an adapter's: how many labels a
classifier has (two, where nothing is said), which token it takes for padding (it reads its score at the last one that is
another: one too early where that is the end of the text), and where `generate` stops. What the base says otherwise than
the run, from_pretrained has to be told. It hands keywords that config.json has on to the base.
"""  # noqa: E501

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

from perl_jax.interop import hf, hf_config
from perl_jax.tokenizers import token_ids
from perl_jax.tokenizers.tokenizer_files import CONFIG, GENERATION
from perl_jax.tools.companions import Companions

FILE = 'README.md'
_CLASSES = {
    'CAUSAL_LM': 'AutoPeftModelForCausalLM',
    'SEQ_2_SEQ_LM': 'AutoPeftModelForSeq2SeqLM',
    'SEQ_CLS': 'AutoPeftModelForSequenceClassification',
}


def arguments(base: str, task: str, given: Companions) -> dict[str, str]:
    """What from_pretrained has to be told, as Python has it.

    Args:
      base: the weights that the adapter is for, in Hugging Face's form.
      task: PEFT's task_type.
      given: what goes along with the adapter.
    """
    folder = hf.resolve(base, weights=False)
    config = json.loads((folder / 'config.json').read_text())
    if task == 'SEQ_CLS':
        labels = config.get('id2label')
        found = {
            'num_labels': config.get('num_labels', 2) if labels is None else len(labels),
            'pad_token_id': hf_config.read(folder).get('pad_token_id'),
        }
        wanted = {'num_labels': 1, 'pad_token_id': given.config['pad_token_id']}
        return {key: str(value) for key, value in wanted.items() if found[key] != value}
    if set(_listed(given.config.get('eos_token_id'))) == set(_ends(folder)):
        return {}
    return {'generation_config': 'GenerationConfig.from_pretrained({folder})'}


def call(task: str, folder: str, needed: dict[str, str]) -> str:
    """The line that loads an adapter; `folder` is where it lies, as Python has it."""
    keywords = ''.join(f', {name}={value.format(folder=folder)}' for name, value in needed.items())
    return f'{_CLASSES[task]}.from_pretrained({folder}{keywords})'


def write(folder: str | os.PathLike, name: str, task: str, given: Companions, needed: dict[str, str]) -> None:
    """Write the file, and what goes along with an adapter.

    Args:
      name: base_model_name_or_path.
      needed: see `arguments`.
    """
    folder = pathlib.Path(folder)
    skipped = () if 'generation_config' in needed else (GENERATION,)  # the base's own, from where PEFT takes it
    Companions({key: text for key, text in given.files.items() if key not in skipped}).write(folder)
    (folder / FILE).write_text(_text(name, task, given, needed))


def _text(name: str, task: str, given: Companions, needed: dict[str, str]) -> str:
    is_reward, has_tokenizer = task == 'SEQ_CLS', CONFIG in given.files or 'tokenizer.json' in given.files
    classes = ['AutoTokenizer'] * has_tokenizer + ['GenerationConfig'] * ('generation_config' in needed)
    lines = [f'from peft import {_CLASSES[task]}']
    lines += [f'from transformers import {", ".join(classes)}'] if classes else []
    lines += ['', "folder = '.'  # where this file lies", f'model = {call(task, "folder", needed)}.eval()']
    lines += ['tokenizer = AutoTokenizer.from_pretrained(folder)'] if has_tokenizer else []
    if is_reward and has_tokenizer:
        lines += [
            '',
            f'texts = [prompt + answer + {_end(given)}, ...]',
            "scores = model(**tokenizer(texts, padding=True, return_tensors='pt')).logits[:, 0]",
        ]
    why = [_WHY[key] for key in needed]
    if is_reward and needed:
        why += [
            'A base that says so itself needs no more: save what `AutoModelForSequenceClassification.from_pretrained('
            f"'{name}', num_labels=1, pad_token_id={needed.get('pad_token_id', 'PAD')})` gives with `save_pretrained`, "
            'and export with `--base=` that folder.'
        ]
    parts = [
        '\n'.join(['---', f'base_model: {json.dumps(name)}', 'library_name: peft', '---']),
        f'# {"A reward" if is_reward else "A policy"}, as an adapter for {name}',
        'Written by `perl_jax export --format=peft`. It is loaded with',
        '\n'.join(['```python', *lines, '```']),
        *why,
    ]
    return '\n\n'.join(parts) + '\n'


_WHY = {
    'num_labels': '`num_labels=1`: a reward is one number. transformers makes a head of two where nothing is said.',
    'pad_token_id': "`pad_token_id`: a classifier reads its score at a text's last token that is no padding. The "
    "tokenizer here pads with a token that ends no text. Without the argument the model goes by the base's own: it "
    'takes no batches if there is none, and gives wrong scores, in silence, if that is the end of a text.',
    'generation_config': '`generation_config`: answers end with other tokens than those at which the base has '
    '`generate` stop.',
}


def _end(given: Companions) -> str:
    """What an answer ends with, as Python has it."""
    first, (every, _) = _listed(given.config.get('eos_token_id'))[:1], token_ids.read(given.files)
    return next((repr(token) for token, i in every.items() if [i] == first), 'tokenizer.eos_token')


def _ends(folder: pathlib.Path) -> list[int]:
    """The ids at which transformers stops with a model of this folder."""
    if (path := folder / GENERATION).is_file():
        return _listed(json.loads(path.read_text()).get('eos_token_id'))
    return _listed(hf_config.read(folder).get('eos_token_id'))


def _listed(value: Any) -> list[int]:
    return [] if value is None else value if isinstance(value, list) else [value]
