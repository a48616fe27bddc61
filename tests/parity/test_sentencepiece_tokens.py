"""A folder with nothing but a sentencepiece model is read with all that stands beside, as transformers reads it."""

import json

import pytest

pytest.importorskip('transformers', reason='needs transformers, which the tests do not install')
import tensorflow as tf
import transformers
from test_vocabularies import LLAMA, T5, write_model

from perl_jax.data import lexicon, texts
from perl_jax.data.vocabulary import RunVocabulary
from perl_jax.errors import UserError
from perl_jax.tasks import chat
from perl_jax.tokenizers.chat.controls import Formatted, mark
from perl_jax.tokenizers.chat.template import Template
from perl_jax.tokenizers.vocabularies import vocabulary

INST = """{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}
{%- else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"""
CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
TALK = [
    {'role': 'user', 'content': 'the quick fox'}, {'role': 'assistant', 'content': 'jumps'},
    {'role': 'user', 'content': 'over </s> it'},
]  # fmt: skip
NAMES = {'bos_token': '<s>', 'eos_token': '</s>', 'unk_token': '<unk>', 'tokenizer_class': 'LlamaTokenizer'}
SIZE = 310


def added(special, *tokens, flags=()):
    plain = dict.fromkeys(('lstrip', 'rstrip', 'single_word', 'normalized'), False) | dict(flags)
    return {str(SIZE + n): {'content': text, 'special': special, **plain} for n, text in enumerate(tokens)}


def folder(path, config=(), files=(), **model):
    """Llama 2's kind of model with what stands beside: ours, and transformers'."""
    options = {'normalization_rule_name': 'identity', 'remove_extra_whitespaces': False, 'split_digits': True}
    write_model(path / 'tokenizer.model', SIZE, **LLAMA | options | model)
    (path / 'tokenizer_config.json').write_text(json.dumps(NAMES | dict(config)))
    for name, said in dict(files).items():
        (path / name).write_text(json.dumps(said))
    return vocabulary(str(path)), transformers.LlamaTokenizer.from_pretrained(path)


END = '<|im_end|>'
TURNS = ('<|im_start|>', END)
KINDS = {
    'its own': ({'chat_template': INST}, {}),
    'added_tokens_decoder': ({'chat_template': CHATML, 'added_tokens_decoder': added(True, *TURNS)}, {}),
    'not special': ({'chat_template': CHATML, 'added_tokens_decoder': added(False, *TURNS)}, {}),
    'added_tokens.json': ({'chat_template': CHATML}, {'added_tokens.json': {t: SIZE + n for n, t in enumerate(TURNS)}}),
    'additional': ({'chat_template': CHATML, 'additional_special_tokens': list(TURNS)}, {}),
    'new eos': ({'chat_template': INST, 'eos_token': END, 'added_tokens_decoder': added(True, END)}, {}),
    'legacy': ({'chat_template': INST, 'legacy': True}, {}),
    'space': ({'chat_template': CHATML, 'added_tokens_decoder': added(True, *TURNS, flags={'rstrip': True})}, {}),
}  # fmt: skip


@pytest.mark.parametrize('kind', KINDS)
def test_its_template_has_transformers_ids(tmp_path, kind):
    ours, theirs = folder(tmp_path, *KINDS[kind])
    talk = TALK[:2] + [{'role': 'user', 'content': 'over it'}]
    wanted = theirs.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    asked = Template(str(tmp_path))(talk)
    assert ours.encode(asked) == wanted
    assert ours.encode_tf(tf.constant(asked.marked)).numpy().tolist() == wanted
    assert (ours.vocab_size, ours.eos_id) == (len(theirs), theirs.eos_token_id)
    (batch,) = texts.dataset(ours, [asked], 400).batches(1)
    got = batch[0].inputs[batch[0].inputs_mask].tolist()
    assert got == ([] if wanted[0] == ours.bos_id else [ours.bos_id]) + wanted  # one BOS, whoever puts it there
    assert ours.decode(ours.encode('the fox')) == 'the fox'


@pytest.mark.parametrize('kind', KINDS)
def test_what_stands_in_a_message_is_text(tmp_path, kind):
    ours, theirs = folder(tmp_path, *KINDS[kind])
    special = ['<s>', '</s>', *(TURNS if CHATML in KINDS[kind][0].values() else [])]
    control = set(theirs.convert_tokens_to_ids(special))
    count = lambda text: sum(i in control for i in ours.encode(Template(str(tmp_path))(text)))  # noqa: E731
    assert count('the ' + ' '.join(special)) == count('the fox')
    assert not control & set(ours.encode('a' + 'b'.join(special)))
    assert (TURNS[1] in special) <= (theirs.convert_tokens_to_ids(TURNS[1]) in ours.eos_ids)


def test_added_tokens_that_are_not_special_are_found_in_any_text(tmp_path):
    ours, theirs = folder(tmp_path, {'added_tokens_decoder': added(False, '<think>', '</think>')})
    for text in 'the <think> fox</think>jumps', '<think>', 'a<think>\nb </think> c':
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text) == ids and SIZE in ids
        assert ours.decode([*ids, ours.eos_id, *ids]) == text
    assert ours.encode_tf(tf.constant(['<think>', 'fox'])).to_list() == [ours.encode('<think>'), ours.encode('fox')]
    assert ours.continuing.encode('fox<think>') == [*ours.continuing.encode('fox'), SIZE]
    assert ours.piece(SIZE) == '<think>' and ours.piece(2) == '</s>'


def test_a_bos_is_put_in_front_only_where_the_config_wants_one(tmp_path):
    ours, _ = folder(tmp_path, {'add_bos_token': False})
    assert lexicon.bos_id(ours) is None and ours.continuing is not ours
    (tmp_path / 'with').mkdir()
    ours, _ = folder(tmp_path / 'with', {'add_bos_token': True})
    assert lexicon.bos_id(ours) == 1


def test_a_text_that_opens_with_bos_gets_no_second_one(tmp_path):
    ours = vocabulary(write_model(tmp_path / 'a.model', SIZE, **LLAMA))
    rows = texts.dataset(ours, ['<s>the fox', '<s>'], 30).arrays
    first, second = (row[mask].tolist() for row, mask in zip(rows['inputs'], rows['inputs_mask']))
    assert first == [1, *ours.continuing.encode('the fox')] and second == [1]
    assert ours.continuing.encode('<s>the')[0] != 1  # an answer begins no sequence


def test_eos_may_be_another_piece_which_no_typed_text_becomes(tmp_path):
    ours, theirs = folder(tmp_path, {'eos_token': 'quick'}, user_defined_symbols=['quick', '<|turn|>'])
    assert ours.eos_id == theirs.eos_token_id and ours.eos_id not in ours.encode('the quick fox, quick')
    assert ours.encode(Formatted(f'fox{mark("quick")}'))[-1] == ours.eos_id
    assert "EOS 'quick'" in str(RunVocabulary('a name', ours))
    assert theirs.convert_tokens_to_ids('<|turn|>') in ours.encode('a<|turn|>')  # which nobody calls special


def test_a_model_without_eos_ends_with_what_stands_beside_or_is_refused(tmp_path):
    path = write_model(tmp_path / 'tokenizer.model', SIZE, **LLAMA | {'eos_id': -1})
    with pytest.raises(UserError, match='tokenizer.model: the tokenizer specifies no token that ends a sequence'):
        vocabulary(path).eos_id  # noqa: B018
    (tmp_path / 'other').mkdir()
    ours, theirs = folder(tmp_path / 'other', eos_id=-1)
    assert ours.eos_ids == (theirs.eos_token_id,) == (SIZE,)
    assert "EOS '</s>'" in str(RunVocabulary('a name', ours))
    (tmp_path / 'ids').mkdir()
    path = write_model(tmp_path / 'ids/tokenizer.model', SIZE, **LLAMA | {'eos_id': -1})
    (tmp_path / 'ids/generation_config.json').write_text('{"eos_token_id": 7}')
    assert vocabulary(path).eos_ids == (7,)


@pytest.mark.parametrize(('name', 'said', 'message'), [
    ('generation_config.json', {'eos_token_id': [2, 9999]}, 'n_config.json: eos_token_id = 9999: .* 310 tokens'),
    ('added_tokens.json', {'<zz>': 999}, "added_tokens.json: 999 for '<zz>', which is 310"),
    ('tokenizer_config.json', {'odd': 3}, 'odd = 3 is not understood'),
])  # fmt: skip
def test_what_is_said_beside_is_understood_or_named(tmp_path, name, said, message):
    path = write_model(tmp_path / 'tokenizer.model', SIZE, **LLAMA)
    (tmp_path / name).write_text(json.dumps(said))
    with pytest.raises(UserError, match=message):
        vocabulary(path).eos_ids  # noqa: B018


def test_a_format_whose_tokens_the_model_has_not_is_refused(tmp_path):
    ours, _ = folder(tmp_path, {'chat_template': INST})
    with pytest.raises(UserError, match="tokenizer.model: a chat format adds '<|im_start|>'".replace('|', r'\|')):
        ours.encode(chat.chatml('hello'))


def test_t5s_sentinels_that_its_config_lists_are_not_added_again(tmp_path):
    path = write_model(tmp_path / 'spiece.model', **T5)
    sentinels = [f'<extra_id_{i}>' for i in range(100)]
    config = {'additional_special_tokens': sentinels, 'eos_token': '</s>', 'pad_token': '<pad>', 'extra_ids': 100}
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
    ours = vocabulary(path)
    assert (ours.vocab_size, ours.reachable_size, ours.eos_ids) == (145, 145, (1,))
    assert ours.encode('<extra_id_0>')[-1] == 144 and ours.continuing is ours
