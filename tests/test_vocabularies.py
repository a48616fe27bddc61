"""A vocabulary by its path: which file makes which, and what is said of one that makes none."""

import copy
import io
import pickle

import gin
import numpy as np
import pytest
import seqio

pytest.importorskip('tokenizers')
import sentencepiece
import tiny_gguf
from test_tokenizers import write_json

from perl_jax.cli import configure
from perl_jax.data import datasets, lexicon
from perl_jax.data.batches.dataset import Dataset
from perl_jax.errors import UserError
from perl_jax.tasks import toy  # noqa: F401
from perl_jax.tokenizers.tokenizers import TokenizersVocabulary
from perl_jax.tokenizers.vocabularies import of_base, vocabulary

TEXT = ['the quick brown fox jumps over the lazy dog', 'Pack my box with five dozen liquor jugs?', 'one 2 three, 45!']
T5 = {'pad_id': 0, 'eos_id': 1, 'unk_id': 2, 'bos_id': -1}
LLAMA = {'pad_id': -1, 'unk_id': 0, 'bos_id': 1, 'eos_id': 2, 'model_type': 'bpe', 'byte_fallback': True}


def write_model(path, vocab_size=45, **options):
    """Trains a sentencepiece model; `options` are the trainer's."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=model, vocab_size=vocab_size, minloglevel=2, **options
    )
    path.write_bytes(model.getvalue())
    return str(path)


def test_t5s_model_gets_its_sentinels(tmp_path):
    v = vocabulary(write_model(tmp_path / 'spiece.model', **T5))
    assert (v.vocab_size, v.bos_id, v.eos_id, v.unk_id) == (145, -1, 1, 2)
    assert v.encode('<extra_id_0>')[-1] == 144 and v.encode('<extra_id_99>')[-1] == 45
    assert v.decode([*v.encode('quick fox'), 1, *v.encode('dog')]) == 'quick fox'


def test_a_model_that_has_sentinels_or_is_not_t5s_stays_as_it_is(tmp_path):
    sentinels = [f'▁<extra_id_{i}>' for i in reversed(range(10))]
    v = vocabulary(write_model(tmp_path / 'a.model', 50, user_defined_symbols=sentinels, **T5))
    assert v.vocab_size == 50 and v.encode('<extra_id_0>') == [v.tokenizer.piece_to_id(sentinels[-1])]
    v = vocabulary(write_model(tmp_path / 'b.model', 310, **LLAMA))
    assert (v.vocab_size, v.bos_id, v.eos_id) == (310, 1, 2)
    assert v.decode(v.encode('日本 fox')) == '日本 fox'


def test_byt5_is_bytes():
    assert vocabulary('byt5').encode('hé') == [107, 198, 172]


def test_files_of_tokenizers(tmp_path):
    tiny_gguf.write(tmp_path / 'tiny.gguf')
    write_json(tmp_path)
    for name in ('tiny.gguf', 'tokenizer.json'):
        assert vocabulary(str(tmp_path / name)) == TokenizersVocabulary(tmp_path / name)
        assert vocabulary(str(tmp_path / name)).encode('hello')


def test_a_folder_is_the_tokenizer_in_it(tmp_path):
    tiny_gguf.write(tmp_path / 'tiny.gguf')
    assert vocabulary(str(tmp_path)).path == str(tmp_path / 'tiny.gguf')
    write_model(tmp_path / 'spiece.model', **T5)
    assert vocabulary(str(tmp_path)).sentencepiece_model_file == str(tmp_path / 'spiece.model')
    write_json(tmp_path)
    assert vocabulary(str(tmp_path)).path == str(tmp_path / 'tokenizer.json')


def test_of_several_models_in_a_folder_the_tokenizers_own_name_counts(tmp_path):
    write_model(tmp_path / 'a.model', **T5)
    assert vocabulary(str(tmp_path)).sentencepiece_model_file == str(tmp_path / 'a.model')
    write_model(tmp_path / 'b.model', **T5)
    refused(tmp_path, 'which of a.model, b.model is the tokenizer')
    write_model(tmp_path / 'spiece.model', **T5)
    assert vocabulary(str(tmp_path)).sentencepiece_model_file == str(tmp_path / 'spiece.model')
    (tmp_path / 'gguf').mkdir()
    for name in 'a.gguf', 'b.gguf':
        tiny_gguf.write(tmp_path / 'gguf' / name)
    refused(tmp_path / 'gguf', 'which of a.gguf, b.gguf is the tokenizer')


def test_a_task_is_read_by_the_vocabulary_its_run_names(tmp_path):
    path = write_model(tmp_path / 'spiece.model', **T5, byte_fallback=True, vocab_size=300)
    lengths = {'inputs': 100, 'targets': 100}
    dataset = datasets.load(datasets.DatasetConfig('toy_sft', lengths, 2, vocabulary=path, limit=3), 'sft')
    (batch, examples, _), *_ = dataset.batches(3)
    assert dataset.eos_id == 1
    for row, mask, example in zip(batch.inputs, batch.inputs_mask, examples):
        assert row[mask].tolist() == vocabulary(path).encode(example['inputs_pretokenized'])
    assert datasets.decode(dataset.vocabulary, batch) == [[example['targets_pretokenized']] for example in examples]


def test_a_gin_file_may_choose_the_end(tmp_path):
    bindings = [
        'data.DatasetConfig.vocabulary = @tokenizers.TokenizersVocabulary()',
        f"tokenizers.TokenizersVocabulary.path = '{write_json(tmp_path)}'",
        "tokenizers.TokenizersVocabulary.eos = '<|im_start|>'",
    ]
    configure.configured('train_sft.train', ['models/toy.gin'], bindings, [])
    v = gin.get_configurable('data.DatasetConfig')('toy_sft', {}, 1).vocabulary
    assert (v.path, v.eos, v.eos_id) == (str(tmp_path / 'tokenizer.json'), '<|im_start|>', 1)
    assert v == copy.deepcopy(v) == pickle.loads(pickle.dumps(v)) == TokenizersVocabulary(v.path, v.eos)


def refused(path, *words):
    with pytest.raises(UserError) as e:
        vocabulary(str(path)).encode('hello')
    assert '\n' not in str(e.value) and all(word in str(e.value) for word in (str(path), *words)), e.value


def test_what_is_no_tokenizer(tmp_path):
    refused(tmp_path, 'no tokenizer in this folder', 'name its file')
    refused(tmp_path / 'none.model', 'no such file')
    refused(tmp_path / 'nowhere', 'no such file')
    whole = tmp_path / 'whole.model'
    write_model(whole, **T5)
    for content in (b'', b'hello\n', whole.read_bytes()[:-100]):
        (tmp_path / 'broken.model').write_bytes(content)
        refused(tmp_path / 'broken.model', 'not a sentencepiece model')
    (tmp_path / 'text.txt').write_text('hello')
    refused(tmp_path / 'text.txt', 'not a tokenizer')


def test_a_vocabulary_larger_than_the_embedding(tmp_path):
    v = vocabulary(write_model(tmp_path / 'spiece.model', **T5))
    lexicon.check_vocabulary(v, 145)  # rows to spare are common: T5 has 32,100 tokens and 32,128 rows
    with pytest.raises(UserError, match='the vocabulary has 145 tokens and the model only vocab_size = 144; set VOCAB'):
        lexicon.check_vocabulary(v, 144)


def test_a_row_with_a_token_that_the_model_lacks(tmp_path):
    """A chat format puts in control tokens that no text becomes; beyond the embedding their states are NaN."""
    v = seqio.ByteVocabulary()
    rows = lambda *ids: Dataset({'inputs': np.int32([ids])}, [{}], v, (1,))  # noqa: E731
    assert rows(3, 258, 4).largest_id == 258
    lexicon.check_vocabulary(v, 300, [rows(3, 299, 4), None])
    with pytest.raises(UserError, match='a row has the token id 300 and the model only vocab_size = 300; set VOCAB'):
        lexicon.check_vocabulary(v, 300, [rows(3, 258), rows(3, 300, 4)])


def model_folder(path, **files):
    path.mkdir()
    (path / 'config.json').write_text('{}')
    for name, text in files.items():
        (path / name.replace('__', '.')).write_text(text)
    return str(path)


def test_what_tokenizer_a_base_brings(tmp_path):
    none = model_folder(tmp_path / 'none')
    assert of_base(none) is None and of_base(str(tmp_path)) is None
    assert (of_base('hf://o/n'), of_base('a/b.gguf')) == ('hf://o/n', 'a/b.gguf')
    byt5 = model_folder(tmp_path / 'byt5', tokenizer_config__json='{"tokenizer_class": "ByT5Tokenizer"}')
    assert of_base(byt5) == byt5 and vocabulary(byt5).encode('hé') == [107, 198, 172]
    for form in 'vocab.json', 'tekken.json', 'qwen.tiktoken':
        folder = model_folder(tmp_path / form, **{form.replace('.', '__'): '{}'})
        with pytest.raises(UserError, match=f'{form}: a tokenizer of this form cannot be read'):
            of_base(folder)


def test_a_tokenizer_of_the_hub_is_downloaded_without_its_weights(tmp_path, monkeypatch):
    import huggingface_hub

    write_json(tmp_path)
    asked = {}
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda **wanted: asked.update(wanted) or str(tmp_path))
    words = TokenizersVocabulary(tmp_path / 'tokenizer.json')
    assert vocabulary('hf://owner/name@main').encode('hello') == words.encode('hello')
    assert (asked['repo_id'], asked['revision']) == ('owner/name', 'main')
    assert '*.safetensors' in asked['ignore_patterns'] and {'*.jinja', '*.json'} <= set(asked['allow_patterns'])
