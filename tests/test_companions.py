"""The small files that go with exported weights: tokenizers, templates, special ids."""

import json

import pytest
import tokenizers

from perl_jax.tools import companions

pytest.importorskip('gguf')
import tiny_gguf  # noqa: E402


def folder(path, special, **config):
    """A model's small files, whose tokenizer has these special tokens first."""
    path.mkdir()
    model = tokenizers.models.WordLevel({token: i for i, token in enumerate([*special, 'a', 'b'])}, unk_token='a')
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(path / 'tokenizer.json'))
    (path / 'tokenizer_config.json').write_text(json.dumps(config))
    (path / 'config.json').write_text(json.dumps({'model_type': 'llama', 'eos_token_id': 1, 'bos_token_id': 0,
                                                  'max_position_embeddings': 77, 'hidden_size': 8}))  # fmt: skip
    return str(path)


def read(given, name):
    return json.loads(given.files[name])


def test_a_folder_gives_its_files_ids_and_lengths(tmp_path):
    path = folder(tmp_path / 'm', ['<s>', '</s>'], eos_token='</s>', bos_token='<s>')
    (tmp_path / 'm/chat_template.jinja').write_text('{{ messages }}')
    (tmp_path / 'm/generation_config.json').write_text('{"eos_token_id": 1, "top_k": 20}')
    given = companions.collect(path, None, (1, 3))
    assert given.config == {'eos_token_id': [1, 3], 'bos_token_id': 0, 'max_position_embeddings': 77}
    assert read(given, 'generation_config.json') == {'eos_token_id': [1, 3], 'bos_token_id': 0, 'top_k': 20}
    assert given.files['chat_template.jinja'] == b'{{ messages }}'
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out/config.json').write_text('{"hidden_size": 8}')
    given.write(tmp_path / 'out')
    assert json.loads((tmp_path / 'out/config.json').read_text()) == {'hidden_size': 8} | given.config


def test_another_tokenizer_than_the_weights_own_goes_along(tmp_path):
    weights = folder(tmp_path / 'm', ['<s>', '</s>'], eos_token='</s>')
    other = folder(tmp_path / 'o', ['<x>', '<y>', '<z>'], eos_token='<z>')
    for name in other, f'{other}/tokenizer.json':
        given = companions.collect(weights, name, (2,))
        assert '<z>' in given.files['tokenizer.json'].decode() and given.config['eos_token_id'] == 2
        assert given.config['max_position_embeddings'] == 77
        assert 'bos_token_id' not in given.config  # the weights' is of another token here


def test_ids_are_those_of_the_tokenizer_that_goes_along(tmp_path):
    """A BOS in the tokenizer, none in config.json: transformers had both to choose from."""
    weights = folder(tmp_path / 'm', ['<s>', '</s>'], eos_token='</s>')
    other = folder(tmp_path / 'o', ['<x>', '<b>', '<p>', '<e>'], eos_token='<e>', bos_token='<b>', pad_token='<p>')
    given = companions.collect(weights, other, (3,))
    assert {key: given.config[key] for key in ('bos_token_id', 'pad_token_id', 'eos_token_id')} == {
        'bos_token_id': 1, 'pad_token_id': 2, 'eos_token_id': 3
    }  # fmt: skip
    assert read(given, 'generation_config.json')['bos_token_id'] == 1
    own = folder(tmp_path / 'n', ['<s>', '</s>', '<p>'], eos_token='</s>', pad_token='<p>')
    for name in None, own, f'{own}/tokenizer.json':
        assert companions.collect(own, name, (1,)).config['pad_token_id'] == 2
        assert companions.collect(own, name, (1,)).config['bos_token_id'] == 0  # as config.json has it


def test_weights_without_files_have_none(tmp_path):
    given = companions.collect('random:0', None)
    assert (given.files, given.config) == ({}, {})
    assert companions.for_rewards(given, (0, 1)).config == {'pad_token_id': 2}


def test_a_gguf_file_gives_what_it_says_of_itself(tmp_path):
    tiny_gguf.write(tmp_path / 'm.gguf', tokenizer__ggml__add_bos_token=True, tokenizer__chat_template='{{ x }}')
    given = companions.collect(str(tmp_path / 'm.gguf'), None, (2,))
    said = read(given, 'tokenizer_config.json')
    assert (said['bos_token'], said['eos_token'], said['model_max_length']) == ('<|im_start|>', '<|im_end|>', 128)
    assert given.config['max_position_embeddings'] == 128 and given.files['chat_template.jinja'] == b'{{ x }}'
    again = tokenizers.Tokenizer.from_str(given.files['tokenizer.json'].decode())
    assert again.encode('hello').ids[0] == 1  # its BOS, as the run puts it there
    assert read(given, 'generation_config.json')['eos_token_id'] == 2


PADS = {
    'its own': (['<s>', '</s>', '<pad>'], {'eos_token': '</s>', 'pad_token': '<pad>'}, '<pad>'),
    'a filler': (['<s>', '</s>', '<|reserved_0|>'], {'eos_token': '</s>', 'pad_token': '</s>'}, '<|reserved_0|>'),
    'the unknown': (['<unk>', '</s>', '<s>'], {'eos_token': '</s>', 'unk_token': '<unk>', 'bos_token': '<s>'}, '<unk>'),
    'the first': (['<s>', '</s>'], {'eos_token': '</s>', 'bos_token': '<s>', 'pad_token': '</s>'}, '<s>'),
    'no other token': (['</s>'], {'eos_token': '</s>'}, 'b'),
    'not the second end': (['<x>', '</s>', '<|pad|>'], {'eos_token': '</s>', 'pad_token': '<|pad|>'}, '<x>'),
}


@pytest.mark.parametrize('name', PADS)
def test_a_rewards_padding_ends_no_text(tmp_path, name):
    special, config, pad = PADS[name]
    ends = {'not the second end': (1, 2), 'no other token': (0,)}.get(name, (1,))
    given = companions.for_rewards(companions.collect(folder(tmp_path / 'm', special, **config), None, ends), ends)
    assert given.config['pad_token_id'] == [*special, 'a', 'b'].index(pad) and given.tokens['pad'] == pad
    assert read(given, 'tokenizer_config.json')['pad_token'] == pad
    assert 'generation_config.json' not in given.files


def test_bytes_have_a_class_that_transformers_knows():
    said = read(companions.collect('random:0', 'byt5', (1,)), 'tokenizer_config.json')
    assert said == {'tokenizer_class': 'ByT5Tokenizer'}


SENTENCEPIECES = {
    'T5Tokenizer': {'bos_id': -1, 'pad_id': 0, 'eos_id': 1, 'unk_id': 2},
    'LlamaTokenizer': {'bos_id': 1, 'eos_id': 2, 'unk_id': 0, 'pad_id': -1},
}


@pytest.mark.parametrize('kind', SENTENCEPIECES)
def test_a_sentencepiece_model_alone_has_a_class_that_transformers_reads(tmp_path, kind):
    import sentencepiece

    ids = SENTENCEPIECES[kind]
    (tmp_path / 'text').write_text('\n'.join(f'the cat number {i} sat' for i in range(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / 'text'), model_prefix=str(tmp_path / 'x'), vocab_size=40, minloglevel=2,
        model_type='unigram' if kind == 'T5Tokenizer' else 'bpe', **ids,
    )  # fmt: skip
    given = companions.collect('random:0', str(tmp_path / 'x.model'), (ids['eos_id'],))
    said = read(given, 'tokenizer_config.json')
    assert (said['tokenizer_class'], said['eos_token']) == (kind, '</s>')
    assert ('bos_token' in said) == (kind == 'LlamaTokenizer')
    transformers = pytest.importorskip('transformers', reason='the rest needs transformers')
    (tmp_path / 'out').mkdir()
    given.write(tmp_path / 'out')
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
    want = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / 'x.model')).encode('the cat sat')
    assert tokenizer('the cat sat', add_special_tokens=False)['input_ids'] == want
    assert tokenizer.eos_token_id == ids['eos_id']
    reward = companions.for_rewards(given, (ids['eos_id'],))  # its padding is the tokenizer's too, and ends no text
    reward.write(tmp_path / 'out')
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
    assert tokenizer.pad_token_id == reward.config['pad_token_id'] != ids['eos_id']
    assert tokenizer('the cat sat', add_special_tokens=False)['input_ids'] == want
