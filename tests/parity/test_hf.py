"""The decoder against transformers, family by family, by way of the checkpoints that both read and write."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip('torch', reason='needs torch, transformers and peft, which the tests do not install')
transformers = pytest.importorskip('transformers', reason='needs transformers')
peft = pytest.importorskip('peft', reason='needs peft')

import safetensors.numpy as safetensors_numpy  # noqa: E402

from perl_jax.interop import hf, hf_config, safetensors  # noqa: E402
from perl_jax.interop import peft as our_peft  # noqa: E402
from perl_jax.models import lora  # noqa: E402
from perl_jax.models.logprobs import response_logprobs  # noqa: E402
from perl_jax.parallel import leaves, partitioning  # noqa: E402
from perl_jax.rl.sampling import SamplingConfig, sample  # noqa: E402
from perl_jax.types import Prompts, Responses  # noqa: E402

V, EOS = 61, 1
SIZES = {
    'vocab_size': V, 'hidden_size': 32, 'num_hidden_layers': 3, 'num_attention_heads': 4, 'num_key_value_heads': 2,
    'intermediate_size': 48, 'max_position_embeddings': 64, 'pad_token_id': 0, 'eos_token_id': EOS, 'bos_token_id': 2,
    'initializer_range': 0.3, 'attn_implementation': 'eager',
}  # fmt: skip
LLAMA3 = {
    'rope_type': 'llama3', 'rope_theta': 5e5, 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
    'original_max_position_embeddings': 16,
}  # fmt: skip
GEMMA = {'head_dim': 12, 'tie_word_embeddings': True, 'query_pre_attn_scalar': 20, 'sliding_window': 5}
FAMILIES = {
    'llama2': ('Llama', {'tie_word_embeddings': False}),
    'llama3': ('Llama', {'tie_word_embeddings': True, 'rope_parameters': LLAMA3}),
    'mistral': ('Mistral', {'tie_word_embeddings': False, 'sliding_window': None}),
    'mistral_sliding': ('Mistral', {'tie_word_embeddings': False, 'sliding_window': 5}),  # in every layer
    'qwen2': ('Qwen2', {'tie_word_embeddings': False}),
    'qwen3': ('Qwen3', {'head_dim': 12, 'tie_word_embeddings': True}),
    'gemma': ('Gemma', {'head_dim': 12}),
    'gemma2': ('Gemma2', GEMMA | {'attn_logit_softcapping': 5.0, 'final_logit_softcapping': 4.0}),
    'gemma3': ('Gemma3', GEMMA | {
        'num_hidden_layers': 7, 'sliding_window': 4,
        'rope_parameters': {
            'sliding_attention': {'rope_type': 'default', 'rope_theta': 100.0},
            'full_attention': {'rope_type': 'linear', 'rope_theta': 1e4, 'factor': 4.0},
        },
    }),
}  # fmt: skip
families = pytest.mark.parametrize('family', FAMILIES)
TOKENS = np.random.default_rng(0).integers(3, V, (3, 20))
PROMPT = 8


def config_of(family):
    name, settings = FAMILIES[family]
    return getattr(transformers, f'{name}TextConfig' if name == 'Gemma3' else f'{name}Config')(**SIZES | settings)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """The folder of a random model of a family, whose norms and biases are not 1 and 0; and the model."""
    made = {}

    def get(family):
        if family not in made:
            torch.manual_seed(0)
            model = getattr(transformers, f'{FAMILIES[family][0]}ForCausalLM')(config_of(family)).eval()
            with torch.no_grad():
                for name, x in model.named_parameters():
                    if 'norm' in name or 'bias' in name:
                        x.add_(0.2 * torch.randn_like(x))
            folder = tmp_path_factory.mktemp(family)
            model.save_pretrained(folder)
            made[family] = folder, model
        return made[family]

    return get


def loaded(folder):
    network = hf.network(str(folder))
    shapes, _ = partitioning.abstract_params(network)
    return network, jax.tree.map(jnp.asarray, leaves.to_host(hf.leaves(str(folder), network, shapes), 'float32'))


def batch():
    inputs, targets = TOKENS[:, :PROMPT].astype(np.int32), TOKENS[:, None, PROMPT:].astype(np.int32)
    return Responses(inputs, np.ones_like(inputs, bool), targets, np.ones_like(targets, bool))


@functools.partial(jax.jit, static_argnums=0)
def hidden_states(network, variables):
    """Behind the prompt, [3, 1, 13, D]."""
    b = batch()
    return network.apply(variables, b.inputs, b.inputs_mask, b.targets)


@functools.partial(jax.jit, static_argnums=0)
def ours(network, variables):
    """Logits behind the prompt, [3, 13, V]."""
    return network.apply(variables, hidden_states(network, variables), method='logits')[:, 0]


def theirs(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()[:, PROMPT - 1 :]


@families
def test_logits(saved, family):
    folder, model = saved(family)
    network, base = loaded(folder)
    want = theirs(model)
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(ours(network, {'params': base}), want, atol=1e-4)


@families
def test_greedy_tokens_through_the_cache(saved, family):
    folder, model = saved(family)
    network, base = loaded(folder)
    greedy = SamplingConfig(num_samples=2, max_decode_length=12, temperature=0)
    prompts = Prompts(batch().inputs, batch().inputs_mask)
    run = jax.jit(lambda base: sample(network, {'params': base}, prompts, jax.random.key(0), EOS, greedy))
    got = run(base)
    with torch.no_grad():
        want = model.generate(
            torch.tensor(TOKENS[:, :PROMPT]), max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=EOS
        )[:, PROMPT:].numpy()
    for b in range(3):
        for k in range(2):
            np.testing.assert_array_equal(np.asarray(got.targets[b, k])[: want.shape[1]], want[b])


@families
def test_what_is_exported_is_the_model(saved, family, tmp_path):
    folder, model = saved(family)
    network, base = loaded(folder)
    hf.save(tmp_path, network, base, 'float32')
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation='eager').eval()
    # Without a window Mistral computes what Llama does, and is written as one.
    assert type(again) is (transformers.LlamaForCausalLM if family == 'mistral' else type(model))
    np.testing.assert_array_equal(theirs(again), theirs(model))
    assert hf.network(str(tmp_path)) == network


@families
def test_a_config_is_written_as_it_was_read(family, tmp_path):
    config = json.loads(config_of(family).to_json_string())
    config = config if family != 'gemma3' else config | {'model_type': 'gemma3_text'}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    network = hf.network(str(tmp_path))
    (tmp_path / 'config.json').write_text(json.dumps(hf_config.write(network)))
    assert hf.network(str(tmp_path)) == network


@families
def test_20_steps_of_lora_on_both_sides(saved, family, tmp_path):
    """The same pairs of matrices, the same data, the same optimizer: the same logits in the end."""
    folder, _ = saved(family)
    network, base = loaded(folder)
    spec = lora.LoraSpec(rank=4, alpha=8.0, targets=lora.ALL_LINEAR)
    adapter = spec.init(jax.random.key(0), base)
    our_peft.save(tmp_path, network, adapter, str(folder))
    again = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation='eager')
    model = peft.PeftModel.from_pretrained(again, tmp_path, is_trainable=True).eval()
    rate = 3e-3  # at ten times that both train as well, but round-off grows a thousandfold on the way

    tx, b = optax.sgd(rate, momentum=0.9), batch()

    @jax.jit
    def step(base, adapter, state):
        loss = lambda a: -response_logprobs(network, lora.bind(base, a), b).mean()  # noqa: E731
        value, grads = jax.value_and_grad(loss)(adapter)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(adapter, updates), state, value

    state, losses = tx.init(adapter), []
    for _ in range(20):
        adapter, state, value = step(base, adapter, state)
        losses.append(float(value))

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], rate, momentum=0.9)
    tokens, want_losses = torch.tensor(TOKENS), []
    for _ in range(20):
        logits = model(tokens).logits[:, PROMPT - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, V), tokens[:, PROMPT:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        want_losses.append(loss.item())
    assert want_losses[-1] < 0.9 * want_losses[0]
    np.testing.assert_allclose(losses, want_losses, atol=1e-3)
    np.testing.assert_allclose(ours(network, lora.bind(base, adapter)), theirs(model), atol=1e-3)


@families
def test_adapters_go_to_peft_and_back(saved, family, tmp_path):
    folder, _ = saved(family)
    network, base = loaded(folder)
    spec = lora.LoraSpec(rank=4, alpha=6.0, dropout=0.1, targets=lora.ATTENTION)
    adapter = spec.init(jax.random.key(0), base)
    noise = iter(jax.random.split(jax.random.key(1), 100))
    adapter = adapter.replace(lora=jax.tree.map(lambda x: 0.1 * jax.random.normal(next(noise), x.shape), adapter.lora))
    our_peft.save(tmp_path, network, adapter, str(folder))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation='eager')
    before = theirs(model.eval())
    model = peft.PeftModel.from_pretrained(model, tmp_path).eval()
    want = theirs(model)
    assert np.abs(want - before).max() > 0.1
    np.testing.assert_allclose(ours(network, lora.bind(base, adapter)), want, atol=1e-4)

    model.save_pretrained(tmp_path / 'theirs')  # what peft itself writes
    shapes, _ = partitioning.abstract_params(network)
    back = our_peft.load(tmp_path / 'theirs', network, shapes)
    assert (back.scale, back.dropout) == (adapter.scale, adapter.dropout)
    jax.tree.map(np.testing.assert_array_equal, back.lora, adapter.lora)


@families
def test_rewards_go_to_peft_with_their_head(saved, family, tmp_path):
    folder, _ = saved(family)
    network, base = loaded(folder)
    adapter = lora.LoraSpec(rank=2).init(jax.random.key(0), base)
    adapter = adapter.replace(lora=jax.tree.map(lambda x: x + 0.1, adapter.lora))
    adapter = lora.with_head(adapter, jax.random.key(1), 32, 1.0)
    our_peft.save(tmp_path, network, adapter, str(folder))
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, attn_implementation='eager', pad_token_id=0
    )
    model = peft.PeftModel.from_pretrained(classifier, tmp_path).eval()
    with torch.no_grad():
        want = model(torch.tensor(TOKENS)).logits.numpy()[:, 0]
    variables = lora.bind(base, adapter)
    hidden = hidden_states(network, variables)
    assert np.abs(want).max() > 0.5
    np.testing.assert_allclose(lora.readout(variables, hidden[:, 0, -1]), want, atol=1e-4)
    shapes, _ = partitioning.abstract_params(network)
    back = our_peft.load(tmp_path, network, shapes)
    np.testing.assert_array_equal(back.head['kernel'], adapter.head['kernel'])


@families
@pytest.mark.parametrize('prefix', ['', 'model.language_model.'])
def test_classifiers_that_transformers_made_come_in_as_rewards(family, prefix, tmp_path):
    """Gemma 3's may lie inside a model that sees: its text part has a prefix then."""
    kind = f'{FAMILIES[family][0]}{"Text" if family == "gemma3" else ""}ForSequenceClassification'
    config = config_of(family)
    config.num_labels = 1
    torch.manual_seed(1)
    model = getattr(transformers, kind)(config).eval()
    model.save_pretrained(tmp_path)
    if prefix:
        file = tmp_path / 'model.safetensors'
        tensors = {name.replace('model.', prefix): x for name, x in safetensors_numpy.load_file(file).items()}
        safetensors_numpy.save_file(tensors, file, {'format': 'pt'})
    network = hf.network(str(tmp_path))
    assert hf.is_classifier(str(tmp_path))
    shapes, _ = partitioning.abstract_params(network)
    base = leaves.to_host(hf.leaves(str(tmp_path), network, shapes, classifier=True), 'float32')
    hidden = hidden_states(network, {'params': jax.tree.map(jnp.asarray, base)})
    with torch.no_grad():
        want = model(torch.tensor(TOKENS)).logits.numpy()[:, 0]
    assert np.abs(want).max() > 0.5
    np.testing.assert_allclose(hidden[:, 0, -1] @ hf.score(str(tmp_path), 32), want, atol=1e-4)


def test_bfloat16_survives_the_way_there_and_back(saved, tmp_path):
    folder, _ = saved('llama3')
    network, base = loaded(folder)
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    hf.save(tmp_path, network, low, 'bfloat16')
    shapes, _ = partitioning.abstract_params(network)
    again = leaves.to_host(hf.leaves(str(tmp_path), network, shapes), 'bfloat16')
    assert {entry.dtype for entry in safetensors.entries(tmp_path).values()} == {'BF16'}
    jax.tree.map(np.testing.assert_array_equal, again, jax.device_get(low))
    assert dataclasses.asdict(network.config)['vocab_size'] == V
