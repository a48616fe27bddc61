"""The encoder-decoder against transformers' T5 and mT5: the same weights, the same logits, the same greedy tokens."""

import functools

import jax
import numpy as np
import pytest
import tiny

from perl_jax import types
from perl_jax.models.t5 import T5, T5Config
from perl_jax.parallel import partitioning
from perl_jax.rl.sampling import SamplingConfig, sample

torch = pytest.importorskip('torch', reason='needs torch and transformers, which the tests do not install')
transformers = pytest.importorskip('transformers', reason='needs torch and transformers')

# Longer than max_distance, so that every bucket is used.
B, P, R, V, EOS = 3, 24, 20, 56, 1
SIZES = dict(vocab_size=V, emb_dim=32, num_heads=4, head_dim=6, mlp_dim=48, num_encoder_layers=2, num_decoder_layers=3)
BUCKETS = dict(relative_attention_num_buckets=12, relative_attention_max_distance=18)
FAMILIES = {
    '1.0': (T5Config(**SIZES, **BUCKETS, activation='relu', gated=False, logits_via_embedding=True), 'relu', 'T5'),
    '1.1': (T5Config(**SIZES, **BUCKETS), 'gated-gelu', 'T5'),
    'mT5': (T5Config(**SIZES, **BUCKETS), 'gated-gelu', 'MT5'),
}
families = pytest.mark.parametrize('family', FAMILIES)
# transformers' names of the parts of a block, by side and place; ours of their projections
PARTS = {
    'encoder': [('attention', 'SelfAttention', 'attention'), ('mlp', 'DenseReluDense', 'mlp')],
    'decoder': [
        ('self_attention', 'SelfAttention', 'self_attention'),
        ('encoder_decoder_attention', 'EncDecAttention', 'cross_attention'),
        ('mlp', 'DenseReluDense', 'mlp'),
    ],
}
LEAVES = {'q': 'query', 'k': 'key', 'v': 'value', 'o': 'out', 'wi': 'wi', 'wi_0': 'wi_0', 'wi_1': 'wi_1', 'wo': 'wo'}


@functools.cache
def pair(family):
    """Our network, its variables, and transformers' model of the same random weights."""
    c, feed_forward, kind = FAMILIES[family]
    config = getattr(transformers, f'{kind}Config')(
        vocab_size=V,
        d_model=c.emb_dim,
        d_kv=c.head_dim,
        d_ff=c.mlp_dim,
        num_layers=c.num_encoder_layers,
        num_decoder_layers=c.num_decoder_layers,
        num_heads=c.num_heads,
        feed_forward_proj=feed_forward,
        tie_word_embeddings=c.logits_via_embedding,
        **BUCKETS,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=EOS,
    )
    reference = getattr(transformers, f'{kind}ForConditionalGeneration')(config).eval()
    params = tiny.base(T5(c))
    weights = {name: torch.tensor(np.array(x)) for name, x in theirs(c, params).items()}
    if not c.logits_via_embedding:  # transformers ties them whatever the config says, and then only does not scale
        reference.lm_head.weight = torch.nn.Parameter(weights.pop('lm_head.weight'))
    missing, extra = reference.load_state_dict(weights, strict=False)
    assert not extra and all('embed_tokens' in name or name == 'lm_head.weight' for name in missing)
    return T5(c), {'params': params}, reference


def theirs(c, params):
    """Yields our parameters under transformers' names, its matrices [out, in]."""
    flat, weights = tiny.apart(params), {}
    weights['shared.weight'] = flat.pop('token_embedder/embedding')
    if not c.logits_via_embedding:
        weights['lm_head.weight'] = flat.pop('decoder/logits_dense/kernel').T
    for side, count in ('encoder', c.num_encoder_layers), ('decoder', c.num_decoder_layers):
        first = f'{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight'
        weights[first] = flat.pop(f'{side}/relpos_bias/rel_embedding').T
        weights[f'{side}.final_layer_norm.weight'] = flat.pop(f'{side}/{side}_norm/scale')
        for i in range(count):
            for j, (part, name, norm) in enumerate(PARTS[side]):
                block = f'{side}.block.{i}.layer.{j}'
                weights[f'{block}.layer_norm.weight'] = flat.pop(f'{side}/layers_{i}/pre_{norm}_layer_norm/scale')
                for leaf, ours in LEAVES.items():
                    path = f'{side}/layers_{i}/{part}/{ours}/kernel'
                    if path in flat:
                        weights[f'{block}.{name}.{leaf}.weight'] = flat.pop(path).T
    assert not flat, flat.keys()
    return weights


@functools.cache
def batch():
    rng = np.random.default_rng(0)
    inputs, mask = tiny.ragged(rng, [P, 5, 17], P)
    return inputs, mask, rng.integers(2, V, (B, R))


def test_every_parameter_is_compared():
    for c, _, _ in FAMILIES.values():
        shapes, _ = partitioning.abstract_params(T5(c))
        count = lambda leaves: sum(x.size for x in leaves)  # noqa: E731
        assert count(theirs(c, tiny.base(T5(c))).values()) == count(jax.tree.leaves(shapes))


@families
def test_logits(family):
    (net, variables, reference), (inputs, mask, targets) = pair(family), batch()
    shifted = np.pad(targets, ((0, 0), (1, 0)))
    with torch.no_grad():
        want = reference(
            input_ids=torch.tensor(inputs), attention_mask=torch.tensor(mask), decoder_input_ids=torch.tensor(shifted)
        ).logits.numpy()
    hidden = jax.jit(net.apply)(variables, inputs, mask, targets[:, None])
    got = net.apply(variables, hidden, method='logits')[:, 0]
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(got, want, atol=1e-4)


@families
def test_greedy_tokens_through_the_cache(family):
    (net, variables, reference), (inputs, mask, _) = pair(family), batch()
    config = SamplingConfig(num_samples=2, max_decode_length=R, temperature=0.0)
    prompts = types.Prompts(inputs, mask)
    rollout = jax.jit(lambda v: sample(net, v, prompts, jax.random.key(0), EOS, config))(variables)
    with torch.no_grad():
        want = reference.generate(
            torch.tensor(inputs), attention_mask=torch.tensor(mask), max_new_tokens=R, do_sample=False, use_cache=False
        ).numpy()[:, 1:]
    want = np.pad(want, ((0, 0), (0, R - want.shape[1])))
    for k in range(2):
        np.testing.assert_array_equal(rollout.targets[:, k], want)
    assert len(np.unique(want)) > 2
