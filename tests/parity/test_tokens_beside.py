"""Tokens that only the small files beside a tokenizer.json name are those that transformers adds."""

import json

import pytest

pytest.importorskip('transformers', reason='needs transformers, which the tests do not install')
import transformers
from test_tokenizer_kinds import CORPUS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from perl_jax.tokenizers.chat.controls import Formatted, mark
from perl_jax.tokenizers.chat.template import Template
from perl_jax.tokenizers.vocabularies import vocabulary


def beside(folder, config=(), special=(), vocab=()):
    """A byte-level BPE whose further special tokens are named beside it."""
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    t.train_from_iterator(CORPUS, trainer)
    form = json.loads(t.to_str())
    form['model']['vocab'] |= {text: len(form['model']['vocab']) + i for i, text in enumerate(vocab)}
    (folder / 'tokenizer.json').write_text(json.dumps(form))
    template = "{% for m in messages %}<|turn|>{{ m.content }}{{ '<|end|>' }}{% endfor %}"
    said = {'tokenizer_class': 'PreTrainedTokenizerFast', 'chat_template': template} | dict(config)
    (folder / 'tokenizer_config.json').write_text(json.dumps(said))
    if special:
        (folder / 'special_tokens_map.json').write_text(json.dumps(dict(special)))
    return vocabulary(str(folder)), transformers.PreTrainedTokenizerFast.from_pretrained(folder)


TOKEN = {'special': True, 'lstrip': False, 'rstrip': False, 'normalized': False, 'single_word': False}
WORDS = ['<|turn|>', '<|end|>']
NAMED = {
    'added_tokens_decoder': dict(config={
        'eos_token': '<|end|>',
        'added_tokens_decoder': {
            '300': {'content': '<|end|>', **TOKEN}, '301': {'content': '<|turn|>', **TOKEN},
        },
    }),
    'vocabulary': dict(config={'eos_token': '<|end|>', 'sep_token': '<|turn|>'}, vocab=['<|end|>', '<|turn|>']),
    'special_tokens_map.json': dict(special={'eos_token': '<|end|>', 'cls_token': '<|turn|>'}, vocab=WORDS),
}  # fmt: skip


@pytest.mark.parametrize('place', NAMED)
def test_control_tokens_that_only_other_files_name_are_a_templates(tmp_path, place):
    ours, theirs = beside(tmp_path, **NAMED[place])
    talk = [{'role': 'user', 'content': 'the cat'}]
    wanted = theirs.apply_chat_template(talk, return_dict=False)
    assert theirs.convert_tokens_to_ids('<|turn|>') in wanted and wanted[-1] == ours.eos_id
    assert ours.encode(Template(str(tmp_path))(talk)) == wanted
    typed = ours.encode(Template(str(tmp_path))('say <|end|> now'))
    assert typed.count(ours.eos_id) == 1 and ours.decode(typed[1:]) == 'say <|end|> now'


DECODED = {'300': {'content': '<|a|>', **TOKEN}}
LSTRIP = {'__type': 'AddedToken', 'content': '<|more|>', 'lstrip': True, 'special': True}
UNK = {'__type': 'AddedToken', 'content': '<u>', 'normalized': False}
ADDING = {  # what stands beside tokenizer.json, its config first, and how many tokens transformers adds of it
    'added_tokens.json': ({'pad_token': '<|pad|>'}, {'added_tokens.json': {'<zz>': 300, '<|pad|>': 301}}, 2),
    'additional': ({'additional_special_tokens': ['<|extra|>', LSTRIP]}, {}, 2),
    'extra': ({'extra_special_tokens': ['<|extra|>', 'cat']}, {}, 2),
    'extra, by name': ({'extra_special_tokens': {'image_token': '<image>'}, 'boi_token': '<boi>'}, {}, 2),
    'model_specific': ({'model_specific_special_tokens': {'image_token': '<image>'}}, {}, 1),
    'special_tokens_map.json': ({}, {'special_tokens_map.json': {
        'additional_special_tokens': ['<|extra|>'], 'pad_token': {'content': '<pad>', 'lstrip': False},
        'cls_token': '<c>',
    }}, 3),
    'a new pad': ({'pad_token': '<|mypad|>', 'unk_token': UNK}, {}, 2),
    'behind added_tokens_decoder': (
        {'added_tokens_decoder': DECODED, 'pad_token': '<|mypad|>', 'additional_special_tokens': ['<|extra|>']},
        {'special_tokens_map.json': {'cls_token': '<|not read|>'}, 'added_tokens.json': {'<|nor this|>': 301}}, 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize('place', ADDING)
def test_tokens_that_stand_beside_are_added_as_transformers_does(tmp_path, place):
    config, files, count = ADDING[place]
    for name, said in files.items():
        (tmp_path / name).write_text(json.dumps(said))
    ours, theirs = beside(tmp_path, {'eos_token': 'the'} | config)
    before = json.loads((tmp_path / 'tokenizer.json').read_text())['model']['vocab']
    assert len(theirs) - len(before) == count - ('cat' in before and place == 'extra')
    assert ours.vocab_size == len(theirs)
    for i, token in theirs.added_tokens_decoder.items():
        text = f'a {token} b'
        by_template = Formatted(f'a {mark(token.content)} b') if token.special else text
        assert ours.encode(by_template) == theirs(text, add_special_tokens=False).input_ids
        assert i in ours.encode(by_template)
