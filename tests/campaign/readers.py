"""What reads files from outside: for each reader the right files, made once, and the function that reads a folder."""

import functools
import json
import pathlib
import tempfile
import types

import jax
import numpy as np
import row_readers
import test_t5x
import tiny_gguf
from reader import Reader, written
from test_tokenizers import write_json
from test_vocabularies import LLAMA, write_model

from perl_jax.evals.judging.endpoint import Endpoint
from perl_jax.interop import gguf, hf, hf_config, peft, t5x
from perl_jax.interop.hf_families import ABSENT, FAMILIES
from perl_jax.models import lora
from perl_jax.models.decoder import Decoder, DecoderConfig
from perl_jax.models.t5 import T5, T5Config
from perl_jax.parallel import leaves, partitioning
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.runs import base as bases
from perl_jax.runs import finished, lineage, logs, rundir
from perl_jax.runs.checkpoints import Checkpoints
from perl_jax.tokenizers import vocabularies
from perl_jax.tokenizers.chat.template import Template
from perl_jax.tools import companions

SIZES = {'vocab_size': 40, 'emb_dim': 8, 'num_heads': 2, 'head_dim': 4, 'mlp_dim': 12}
NETWORK = Decoder(DecoderConfig(**SIZES, num_layers=2, num_kv_heads=1, norm_epsilon=1e-6))
SHARD = 'model-00001-of-00001.safetensors'
T5_NETWORK = T5(T5Config(**SIZES, num_encoder_layers=1, num_decoder_layers=1))
BASE = {'path': 'random:0', 'fingerprint': 'abcd', 'dtype': 'float32'}


def _params(network, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), _shapes(network))


@functools.cache
def _shapes(network):
    return partitioning.abstract_params(network)[0]


# Hugging Face's configs, weights and adapters.


def _write_config(kind, folder):
    network = T5(T5Config(**SIZES, num_encoder_layers=2, num_decoder_layers=2)) if 't5' in kind else NETWORK
    config = {'model_type': kind, 'architectures': ['X'], 'torch_dtype': 'bfloat16', 'eos_token_id': [1, 2]}
    family = FAMILIES.get(kind)
    if family is not None:
        config |= {key: value for key, value in family.defaults.items() if value is not ABSENT}
    sizes = {k: v for k, v in hf_config.write(network).items() if k not in ('model_type', 'hidden_act')}
    config |= {key: value for key, value in sizes.items() if family is None or key in family.defaults}
    config |= {'rope_scaling': {'rope_type': 'linear', 'factor': 2.0}} if 't5' not in kind else {}
    if kind == 'llama':
        scaling = {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0}
        config['rope_scaling'] = scaling | {'original_max_position_embeddings': 8192}
    if kind == 'gemma3':
        config = {'model_type': kind, 'text_config': config | {'model_type': 'gemma3_text'}, 'vision_config': {}}
    (folder / 'config.json').write_text(json.dumps(config))
    (folder / 'generation_config.json').write_text('{"decoder_start_token_id": 0, "eos_token_id": 1}')


def _read_config(folder):
    network = hf.network(str(folder))
    hf.agree(str(folder), network)
    hf.is_classifier(str(folder))
    companions._config(str(folder))


def _write_weights(folder):
    hf.save(folder, NETWORK, _params(NETWORK), 'float32')
    (folder / 'model.safetensors').rename(folder / SHARD)
    names = [name for name in json.loads(_header(folder / SHARD)) if name != '__metadata__']
    index = {'metadata': {'total_size': 1}, 'weight_map': dict.fromkeys(names, SHARD)}
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index))


def _header(file):
    content = file.read_bytes()
    return content[8 : 8 + int.from_bytes(content[:8], 'little')]


def _read_weights(folder):
    leaves.to_host(hf.leaves(str(folder), NETWORK, _shapes(NETWORK)), np.float32)


def _write_classifier(folder):
    hf.save(folder, NETWORK, _params(NETWORK), 'float32', head=np.ones(SIZES['emb_dim'], np.float32))


def _read_classifier(folder):
    hf.is_classifier(str(folder))
    hf.leaves(str(folder), NETWORK, _shapes(NETWORK), classifier=True)
    hf.score(str(folder), SIZES['emb_dim'])


def _write_adapter(folder):
    adapter = lora.LoraSpec(rank=2, alpha=3.0).init(jax.random.key(0), _params(NETWORK))
    adapter = adapter.replace(lora=jax.tree.map(lambda x: x + 1, adapter.lora))
    peft.save(folder, NETWORK, adapter, 'base')
    path = folder / 'adapter_config.json'
    more = {'use_rslora': False, 'revision': 'main', 'layers_to_transform': [0, 1], 'alpha_pattern': {'q_proj': 3}}
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def _read_adapter(folder):
    peft.base_of(folder)
    peft.load(folder, NETWORK, _shapes(NETWORK))


def _read_numbers(folder):
    """Weights with bytes that were changed: 0xff eight times is NaN."""
    partitioner = Partitioner()
    with partitioner.scope():
        bases.load(bases.BaseConfig(NETWORK, str(folder)), partitioner, 0)


# Tokenizers and GGUF.


def _write_tokenizer(folder):
    write_json(folder, bos=True)
    end = {'content': '<|im_end|>', 'lstrip': False, 'normalized': False, 'special': True}
    config = {
        'bos_token': '<|im_start|>', 'eos_token': end, 'unk_token': '<|endoftext|>', 'add_bos_token': True,
        'added_tokens_decoder': {'2': end}, 'additional_special_tokens': ['<|im_end|>'], 'chat_control_tokens': [],
        'chat_template': "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}",
        'tokenizer_class': 'X', 'model_max_length': 2048,
    }  # fmt: skip
    (folder / 'tokenizer_config.json').write_text(json.dumps(config))
    (folder / 'special_tokens_map.json').write_text(json.dumps({'eos_token': '<|im_end|>', 'pad_token': end}))
    (folder / 'generation_config.json').write_text(json.dumps({'eos_token_id': [2], 'pad_token_id': 0}))
    (folder / 'config.json').write_text(json.dumps({'eos_token_id': 2, 'text_config': {'eos_token_id': [2]}}))


def _write_older_tokenizer(folder):
    """With added_tokens.json, and templates in a list."""
    _write_tokenizer(folder)
    config = json.loads((folder / 'tokenizer_config.json').read_text())
    del config['added_tokens_decoder']
    config['chat_template'] = [{'name': 'default', 'template': config['chat_template']}]
    (folder / 'tokenizer_config.json').write_text(json.dumps(config))
    (folder / 'added_tokens.json').write_text(json.dumps({'<|im_end|>': 2}))


def _read_tokenizer(folder):
    vocabulary = vocabularies.vocabulary(str(folder))
    _use(vocabulary)
    _ask(Template(str(folder)))
    companions.collect('random:0', str(folder), vocabulary.eos_ids)


def _use(vocabulary):
    assert vocabulary.decode(vocabulary.encode('hello wo 12')) is not None
    assert vocabulary.vocab_size >= vocabulary.reachable_size
    assert vocabulary.bos_id != -7 and vocabulary.unk_id != -7


def _ask(template):
    template([{'role': 'user', 'content': 'hello'}])


def _write_sentencepiece(folder):
    write_model(folder / 'tokenizer.model', 310, **LLAMA)
    config = {'bos_token': '<s>', 'eos_token': '</s>', 'unk_token': '<unk>', 'added_tokens_decoder': {}}
    (folder / 'tokenizer_config.json').write_text(json.dumps(config))
    (folder / 'generation_config.json').write_text(json.dumps({'eos_token_id': [2]}))


def _read_sentencepiece(folder):
    vocabulary = vocabularies.vocabulary(str(folder))
    _use(vocabulary)
    companions.collect('random:0', str(folder), vocabulary.eos_ids)


def _read_gguf(folder):
    path = folder / 'model.gguf'
    _use(vocabularies.vocabulary(str(path)))
    companions._config(str(path))
    companions._tokenizer_companions(str(path))
    for leaf in jax.tree.leaves(gguf.load(path)):
        assert leaf.dtype == np.float32


# A run's own files.


def _write_run(folder):
    about = {
        'started': '2026-01-01T00:00:00+00:00', 'phase': 'sft', 'tuning': 'full', 'base': BASE, 'vocabulary': 'byt5',
        'trainable_parameters': 8, 'base_parameters': 8, 'devices': 'cpu x 1', 'seconds': 3.5, 'step_seconds': 0.5,
        'memory': {'peak': 1}, 'finished': None, 'imported': 'the average of 2',
    }  # fmt: skip
    (folder / 'run.json').write_text(json.dumps(about))
    metrics = [{'step': step, 'phase': 'sft', 'nll': 1.5, 'throughput/examples_per_second': 2.0} for step in (1, 2, 3)]
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in metrics))
    samples = [{'step': 2, 'phase': 'sft', 'inputs': 'a', 'answer': 'b', 'truth': 1.0, 'tokens': 3}]
    (folder / 'samples.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in samples))
    (folder / 'config.gin').write_text('BATCH_SIZE = 4\n')


def _read_run(folder):
    from perl_jax.tools import report

    for name in 'metrics.jsonl', 'samples.jsonl':  # these never block a run
        copied = pathlib.Path(tempfile.mkdtemp(dir=folder.parent), name)
        copied.write_bytes((folder / name).read_bytes())
        logs.truncate(str(copied), 2)
    report.write([str(folder)], str(folder.parent / 'report.html'))
    about = rundir.require(str(folder))
    rundir.is_imported(about)
    rundir.check(str(folder), {'phase': 'sft', 'tuning': 'full', 'base': BASE, 'trainable_parameters': 8})
    lineage.chain(str(folder))


def _write_checkpoint(folder):
    adapter = lora.LoraSpec(rank=2).init(jax.random.key(0), _params(NETWORK))
    settings = {'reward': {'scale': 1.0, 'dropout': 0.0}}
    about = {'phase': 'reward', 'base': BASE, 'adapters': settings, 'window': []}
    run = Checkpoints(str(folder))
    run.save(3, {'reward': types.SimpleNamespace(adapter=adapter).__dict__}, about)
    run.close()


def _read_checkpoint(folder):
    run = finished.best(str(folder), phase='reward', flag='REWARD_MODEL_DIR', role='reward')
    run.on_host()
    assert run.about['base']['path'] is not None


# T5X's checkpoints.


def _write_t5x(format, folder):
    test_t5x.write(format, folder, _params(T5_NETWORK), 3)


def _read_t5x(folder):
    t5x.load(str(folder))


# The replies of a judge at an endpoint.

_REPLY = {
    'id': 'x', 'object': 'chat.completion', 'created': 1, 'model': 'm', 'usage': {'total_tokens': 3},
    'choices': [{'index': 0, 'finish_reason': 'stop', 'message': {'role': 'assistant', 'content': 'Answer: 1'}}],
}  # fmt: skip


def _write_reply(folder):
    (folder / 'reply.json').write_text(json.dumps(_REPLY))


def _read_reply(monkeypatch, folder):
    text = (folder / 'reply.json').read_bytes().decode(errors='replace')

    async def post(self, body):
        return 200, {}, text

    monkeypatch.setattr(Endpoint, '_post', post)
    judge = Endpoint('http://localhost/v1', model='m', cache='unused')
    assert isinstance(judge._post_with_retries(''), str)


def readers(monkeypatch):
    """All of them."""
    configs = [
        Reader(f'config_{kind}', written(functools.partial(_write_config, kind)), _read_config, weight=3)
        for kind in (*FAMILIES, 'gemma3')
    ]
    weights = written(_write_weights)
    gguf_files = written(lambda folder: tiny_gguf.write(folder / 'model.gguf'))
    return [
        *configs,
        Reader('weights', weights, _read_weights, weight=12),
        Reader('classifier', written(_write_classifier), _read_classifier, weight=4),
        Reader('numbers', weights, _read_numbers, (SHARD,), weight=3),
        Reader('adapter', written(_write_adapter), _read_adapter, weight=12),
        Reader('tokenizer', written(_write_tokenizer), _read_tokenizer, weight=12),
        Reader('older_tokenizer', written(_write_older_tokenizer), _read_tokenizer, weight=6),
        Reader('sentencepiece', written(_write_sentencepiece), _read_sentencepiece, weight=8),
        Reader('gguf', gguf_files, _read_gguf, weight=8),
        Reader('run', written(_write_run), _read_run, ('run.json', 'metrics.jsonl', 'samples.jsonl'), weight=12),
        Reader('checkpoint', written(_write_checkpoint), _read_checkpoint, weight=6),
        Reader('t5x', written(functools.partial(_write_t5x, 'orbax')), _read_t5x, weight=6),
        Reader('t5x_legacy', written(functools.partial(_write_t5x, 'legacy')), _read_t5x, weight=6),
        Reader('reply', written(_write_reply), functools.partial(_read_reply, monkeypatch), weight=6),
        *row_readers.readers(monkeypatch),
    ]
