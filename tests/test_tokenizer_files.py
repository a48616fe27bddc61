"""What stands beside a tokenizer, or in a GGUF file, is understood or named in one line."""

import json
import logging

import pytest

pytest.importorskip('tokenizers')
pytest.importorskip('gguf')
import tiny_gguf
from test_tokenizers import refused, write_json
from tokenizers import Tokenizer, processors

from perl_jax.errors import UserError
from perl_jax.tokenizers.chat.controls import mark
from perl_jax.tokenizers.chat.template import Template
from perl_jax.tokenizers.tokenizers import TokenizersVocabulary


@pytest.mark.parametrize(('name', 'config', 'said'), [
    ('tokenizer_config.json', {'eos_token': 3}, 'eos_token = 3'),
    ('tokenizer_config.json', {'add_bos_token': 'yes'}, "add_bos_token = 'yes'"),
    ('tokenizer_config.json', {'add_prefix_space': 'yes'}, "add_prefix_space = 'yes'"),
    ('tokenizer_config.json', {'chat_template': {'a': 1}}, 'chat_template'),
    ('tokenizer_config.json', {'chat_template': [{'name': 'default'}]}, 'needs a name and a template'),
    ('tokenizer_config.json', {'word_dropout': 0.1}, 'word_dropout = 0.1'),
    ('tokenizer_config.json', [1], 'not an object'),
    ('tokenizer_config.json', {'additional_special_tokens': 'a'}, "additional_special_tokens = 'a'"),
    ('tokenizer_config.json', {'extra_special_tokens': [3]}, 'extra_special_tokens = 3'),
    ('tokenizer_config.json', {'chat_control_tokens': 'a'}, "chat_control_tokens = 'a'"),
    ('tokenizer_config.json', {'added_tokens_decoder': {'x': {}}}, 'added_tokens_decoder'),
    ('added_tokens.json', {'<zz>': '7'}, "'<zz>' = '7'"),
    ('added_tokens.json', {'<zz>': 999}, "added_tokens.json: 999 for '<zz>'"),
    ('special_tokens_map.json', {'eos_token': ['a']}, 'eos_token'),
    ('generation_config.json', {'eos_token_id': [2, 99_999]}, 'n_config.json: eos_token_id = 99999: .* 268 tok'),
    ('config.json', {'eos_token_id': 99_999}, 'config.json: eos_token_id = 99999'),
    ('config.json', {'text_config': {'eos_token_id': 268}}, 'config.json: eos_token_id = 268'),
    ('generation_config.json', {'eos_token_id': 'x'}, "eos_token_id = 'x'"),
    ('generation_config.json', {'eos_token_id': [-1]}, r'eos_token_id = \[-1\]'),
])  # fmt: skip
def test_what_stands_beside_a_tokenizer_is_understood_or_named(tmp_path, name, config, said):
    path = write_json(tmp_path)
    (tmp_path / name).write_text(json.dumps(config))
    with pytest.raises(UserError, match=said):
        TokenizersVocabulary(path).eos_id  # noqa: B018
    (tmp_path / name).write_text('{')
    with pytest.raises(UserError, match=f'{name}: not JSON'):
        TokenizersVocabulary(path, eos='<|im_end|>').eos_id  # noqa: B018


@pytest.mark.parametrize('name', ['chat_template.jinja', 'additional_chat_templates/rag.jinja'])
def test_a_template_that_is_no_text_is_named(tmp_path, name):
    path = write_json(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b'\xff\xfe\x00')
    for read in TokenizersVocabulary(path).encode, Template(str(tmp_path)):
        with pytest.raises(UserError, match=f'{name}: not text in UTF-8'):
            read('hello')


@pytest.mark.parametrize('key', ['bos', 'eos', 'eot', 'eom', 'unknown'])
def test_ids_that_a_gguf_file_does_not_have_are_named(tmp_path, key):
    settings = {f'tokenizer__ggml__{key}_token_id': 9999, 'tokenizer__ggml__add_bos_token': True}
    path = tiny_gguf.write(tmp_path / 'a.gguf', **settings)
    refused(TokenizersVocabulary(path), f'tokenizer.ggml.{key}_token_id = 9999', '268 tokens')


def test_keys_of_a_gguf_file_that_are_not_understood_are_named(tmp_path):
    path = tiny_gguf.write(tmp_path / 'a.gguf', tokenizer__ggml__normalizer='nfkc')
    refused(TokenizersVocabulary(path), "tokenizer.ggml.normalizer = 'nfkc' is not understood")
    settings = {'tokenizer__ggml__add_space_prefix': True, 'tokenizer__ggml__fim_pre_token_id': 1}
    assert TokenizersVocabulary(tiny_gguf.write(tmp_path / 'b.gguf', **settings)).encode('hello')


def test_templates_of_a_gguf_file_have_names(tmp_path):
    rag = 'RAG {{ messages[0].content }}'
    settings = {'tokenizer__chat_template': '<|im_start|>', 'tokenizer__chat_template__rag': rag}
    path = tiny_gguf.write(tmp_path / 'a.gguf', **settings)
    assert Template(str(path), 'rag')('x') == 'RAG x' and Template(str(path))('x').marked == mark('<|im_start|>')


def changed(path, **settings):
    """tokenizer_config.json with further settings."""
    config = path.parent / 'tokenizer_config.json'
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    return TokenizersVocabulary(path)


@pytest.mark.parametrize('name', ['GPT2TokenizerFast', 'Qwen2Tokenizer'])
@pytest.mark.parametrize('in_json', [False, True])
def test_a_prefix_space_that_transformers_takes_from_the_config_has_to_be_the_tokenizers(tmp_path, name, in_json):
    (tmp_path / 'other').mkdir()
    path, other_path = write_json(tmp_path), write_json(tmp_path / 'other')
    contents = json.loads(path.read_text())
    contents['pre_tokenizer']['pretokenizers'][1]['add_prefix_space'] = in_json
    for file in path, other_path:
        file.write_text(json.dumps(contents))
    ids = changed(path, add_prefix_space=in_json, tokenizer_class=name).encode('world')
    other = changed(other_path, add_prefix_space=not in_json, tokenizer_class=name)
    sides = f'add_prefix_space = {json.dumps(not in_json)} .* and {json.dumps(in_json)} in the pre_tokenizer'
    with pytest.raises(UserError, match=sides):
        other.encode('world')
    other = changed(other_path, tokenizer_class='LlamaTokenizerFast')  # which leaves it to tokenizer.json
    assert other.encode('world') == ids


def test_add_bos_token_and_the_post_processor_have_to_agree(tmp_path, caplog):
    """Versions of transformers differ in which of them wins."""
    logging.getLogger('perl_jax').propagate = True
    for name, in_json, add_bos, bos_id in ('a', True, True, 1), ('b', False, False, None):
        (tmp_path / name).mkdir()
        assert changed(write_json(tmp_path / name, bos=in_json), add_bos_token=add_bos).bos_id == bos_id
    assert not caplog.records
    assert changed(write_json(tmp_path), add_bos_token=True).bos_id == 1
    assert 'the post_processor of tokenizer.json adds none; BOS is added' in caplog.text
    (tmp_path / 'c').mkdir()
    differs = changed(write_json(tmp_path / 'c', bos=True), add_bos_token=False)
    with pytest.raises(UserError, match='add_bos_token = false .* adds <.im_start.>; make them agree: set'):
        differs.encode('hello')


def test_what_the_post_processor_puts_behind_a_text_is_no_bos(tmp_path):
    path = write_json(tmp_path)
    tokenizer = Tokenizer.from_file(str(path))
    last = '<|endoftext|>'
    tokenizer.post_processor = processors.TemplateProcessing(single=f'$A {last}', special_tokens=[(last, 0)])
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(path))
    assert TokenizersVocabulary(path).bos_id is None


def test_dropout_of_merges_is_switched_off(tmp_path):
    """It is for training, and would give the same text other ids at each call."""
    path = write_json(tmp_path)
    (tmp_path / 'other').mkdir()
    other = write_json(tmp_path / 'other')
    contents = json.loads(other.read_text())
    contents['model']['dropout'] = 0.9
    other.write_text(json.dumps(contents))
    text = 'hello world ' * 20
    assert TokenizersVocabulary(other).encode(text) == TokenizersVocabulary(path).encode(text)
