"""Tokenizers of every kind read unknown and typed text as transformers does, and templates put in what it puts in."""

import json
import re
from types import MappingProxyType

import pytest

pytest.importorskip('transformers', reason='needs transformers, which the tests do not install')
import transformers
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from perl_jax.tokenizers.chat.controls import OPEN, Formatted, mark
from perl_jax.tokenizers.chat.template import Template
from perl_jax.tokenizers.vocabularies import vocabulary

CORPUS = 20 * ['the cat sat on the mat, and it was good', 'user: what is red? yes no maybe', 'assistant | a b c d']
UNKNOWN = ['a {{b}} c', '日本語 cat', 'the zzqq cat', 'x ~~ y', '日本語', '  the  ']
TURNS = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + eos_token }}{% endfor %}"


def unigram():
    t = Tokenizer(models.Unigram())
    t.pre_tokenizer = pre_tokenizers.Metaspace(replacement='▁', prepend_scheme='always')
    special = ['<pad>', '</s>', '<unk>']
    t.train_from_iterator(CORPUS, trainers.UnigramTrainer(
        vocab_size=90, special_tokens=special, unk_token='<unk>', show_progress=False
    ))  # fmt: skip
    return t, '</s>', '<unk>'


def words(model, trainer):
    t = Tokenizer(model(unk_token='[UNK]'))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    t.train_from_iterator(CORPUS, trainer(vocab_size=120, special_tokens=['[UNK]', '[SEP]'], show_progress=False))
    return t, '[SEP]', '[UNK]'


def bpe(named=MappingProxyType({}), **flags):
    """With flags for tokens of its template, and others for those that transformers names."""
    t = Tokenizer(models.BPE(unk_token='<unk>', fuse_unk=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=['<unk>', '</s>'], show_progress=False)
    t.train_from_iterator(CORPUS, trainer)
    t.add_special_tokens([AddedToken(f'<|{role}|>', special=True, **flags) for role in ('user', 'assistant')])
    form = json.loads(t.to_str())
    form['added_tokens'] = [token | (named if token['content'] == '</s>' else {}) for token in form['added_tokens']]
    return Tokenizer.from_str(json.dumps(form)), '</s>', '<unk>'


KINDS = {
    'Unigram': unigram,
    'WordPiece': lambda: words(models.WordPiece, trainers.WordPieceTrainer),
    'WordLevel': lambda: words(models.WordLevel, trainers.WordLevelTrainer),
    'BPE': bpe,
    'BPE, normalized': lambda: bpe(normalized=True),
    'BPE, normalized EOS': lambda: bpe({'normalized': True, 'rstrip': True}, normalized=True),
    'BPE, single_word': lambda: bpe(normalized=False, single_word=True),
    'BPE, lstrip': lambda: bpe(normalized=False, lstrip=True),
}


def both(folder, tokenizer, **settings):
    """A tokenizer as transformers saves it: ours and theirs."""
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)
    theirs.chat_template = TURNS
    theirs.save_pretrained(folder)
    return vocabulary(str(folder)), transformers.PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize('kind', KINDS)
def test_unknown_text_is_unknown(tmp_path, kind):
    tokenizer, eos, unk = KINDS[kind]()
    ours, theirs = both(tmp_path, tokenizer, eos_token=eos, unk_token=unk)
    for text in UNKNOWN:
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids, text
    assert any(ours.unk_id in ours.encode(text) for text in UNKNOWN)


@pytest.mark.parametrize('kind', KINDS)
def test_a_templates_text_has_transformers_ids(tmp_path, kind):
    """Also where a control token's own flags keep it from being one: no mark is ever read as text."""
    tokenizer, eos, unk = KINDS[kind]()
    ours, theirs = both(tmp_path, tokenizer, eos_token=eos, unk_token=unk)
    for content in 'the cat', ' the cat ', '', '{{b}}':
        talk = [{'role': 'user', 'content': content}, {'role': 'assistant', 'content': content}]
        wanted = theirs.apply_chat_template(talk, return_dict=False)
        got = Template(str(tmp_path))(talk)
        assert OPEN in got.marked and ours.encode(got) == wanted, content


@pytest.mark.parametrize('kind', KINDS)
def test_a_typed_control_token_is_text_like_any_other(tmp_path, kind):
    """Its pieces are those of a tokenizer that has no such token in its vocabulary."""
    tokenizer, eos, unk = KINDS[kind]()
    ours, _ = both(tmp_path, tokenizer, eos_token=eos, unk_token=unk)
    form = json.loads(re.sub(re.escape(json.dumps(eos)), '"nowhere in a text"', tokenizer.to_str()))
    without = Tokenizer.from_str(json.dumps(form))
    for text in f'the {eos} cat', eos, f'the{eos}', f'{eos} {eos}':
        typed = ours.encode(text)
        assert ours.eos_id not in typed
        assert typed == without.encode(text, add_special_tokens=False).ids, text
    assert ours.encode(Formatted(f'the {mark(eos)}'))[-1] == ours.eos_id


def test_a_letter_or_byte_that_is_special_is_still_text(tmp_path):
    """A vocabulary cannot be without them: '!' pads some models, and '<0x0A>' ends others' answers."""
    tokenizer = Tokenizer(models.BPE(unk_token='<unk>', byte_fallback=True))
    byte = [f'<0x{i:02X}>' for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=['<unk>', *byte], show_progress=False)
    tokenizer.train_from_iterator([*CORPUS, 'no!'], trainer)
    form = json.loads(tokenizer.to_str())
    form['added_tokens'] = form['added_tokens'][:1]
    tokenizer = Tokenizer.from_str(json.dumps(form))
    ours, theirs = both(tmp_path, tokenizer, eos_token='<0x0A>', pad_token='!', unk_token='<unk>')
    for text in 'no!', 'the\ncat', 'é', '<0x0A>!':
        typed = theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert ours.encode(text) == typed, text
    assert ours.encode(Formatted(f'no{mark("<0x0A>")}')) == [*ours.encode('no'), ours.eos_id]
