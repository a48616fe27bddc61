"""A slow, obvious Llama in NumPy, one sequence at a time: what the fast one is held against."""

import numpy as np


def logits(params, config, tokens):
    """Next-token logits [T, V] in float64 of one sequence of tokens [T]."""
    c = config
    p = _to_float64(params)
    layers = p['decoder']['layers']
    x = p['token_embedder']['embedding'][tokens]
    for i in range(c.num_layers):
        attention, mlp = layers['self_attention'], layers['mlp']
        y = _norm(x, layers['pre_self_attention_layer_norm']['scale'][i], c.norm_epsilon)
        q, k, v = (y @ attention[name]['kernel'][i] for name in ('query', 'key', 'value'))
        heads = []
        for h in range(c.num_heads):
            n = h * c.num_kv_heads // c.num_heads  # the kv head that this head shares with its neighbours
            own, shared = _slice(h, c.head_dim), _slice(n, c.head_dim)
            scores = _rotate(q[:, own], c.rope_theta) @ _rotate(k[:, shared], c.rope_theta).T / np.sqrt(c.head_dim)
            scores[np.triu_indices(len(tokens), 1)] = -np.inf
            heads.append(_softmax(scores) @ v[:, shared])
        x = x + np.concatenate(heads, -1) @ attention['out']['kernel'][i]
        y = _norm(x, layers['pre_mlp_layer_norm']['scale'][i], c.norm_epsilon)
        gate, up = y @ mlp['wi_0']['kernel'][i], y @ mlp['wi_1']['kernel'][i]
        x = x + (gate / (1 + np.exp(-gate)) * up) @ mlp['wo']['kernel'][i]
    x = _norm(x, p['decoder']['decoder_norm']['scale'], c.norm_epsilon)
    if c.logits_via_embedding:
        return x @ p['token_embedder']['embedding'].T
    return x @ p['decoder']['logits_dense']['kernel']


def _to_float64(tree):
    if isinstance(tree, dict):
        return {k: _to_float64(v) for k, v in tree.items()}
    return np.asarray(tree, np.float64)


def _slice(head, size):
    return slice(head * size, (head + 1) * size)


def _norm(x, scale, epsilon):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + epsilon) * scale[None]


def _softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def _rotate(x, theta):
    """Turn dimension i against i + E/2 of x [T, E] by position * theta^(-2i / E)."""
    half = x.shape[1] // 2
    angle = np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half)[None]
    a, b = x[:, :half], x[:, half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)
