"""Write a small Llama, and a small byte-level BPE tokenizer, as llama.cpp's converter would."""

import gguf
import numpy as np

from perl_jax.models.decoder import DecoderConfig

CONFIG = DecoderConfig(
    vocab_size=280, num_layers=2, emb_dim=32, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=64, rope_theta=1e5
)
SPECIAL = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
MERGES = ['h e', 'l l', 'he ll', 'hell o', 'Ġ w', 'Ġw o', '1 2', '1 3', 'Ġ Ġ']
# The 256 characters that stand for bytes: printable ones for themselves, the others by what follows U+0100.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
ALPHABET = [chr(b) for b in _PRINTABLE] + [chr(256 + i) for i in range(256 - len(_PRINTABLE))]


def tokens():
    return SPECIAL + ALPHABET + [merge.replace(' ', '') for merge in MERGES]


def random_tensors(config=CONFIG, seed=0):
    """Tensors by GGUF's names, [out, in], q and k still in the order of Hugging Face: half-split."""
    c, rng = config, np.random.default_rng(seed)
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes = {'token_embd': (c.vocab_size, c.emb_dim), 'output_norm': (c.emb_dim,)}
    if not c.logits_via_embedding:
        shapes['output'] = (c.vocab_size, c.emb_dim)
    for i in range(c.num_layers):
        shapes |= {
            f'blk.{i}.attn_norm': (c.emb_dim,),
            f'blk.{i}.attn_q': (q, c.emb_dim),
            f'blk.{i}.attn_k': (kv, c.emb_dim),
            f'blk.{i}.attn_v': (kv, c.emb_dim),
            f'blk.{i}.attn_output': (c.emb_dim, q),
            f'blk.{i}.ffn_norm': (c.emb_dim,),
            f'blk.{i}.ffn_gate': (c.mlp_dim, c.emb_dim),
            f'blk.{i}.ffn_up': (c.mlp_dim, c.emb_dim),
            f'blk.{i}.ffn_down': (c.emb_dim, c.mlp_dim),
        }
    return {f'{name}.weight': rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def permute(kernel, heads):
    """Half-split rows to interleaved ones, as `LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    return kernel.reshape(heads, 2, -1, kernel.shape[1]).swapaxes(1, 2).reshape(kernel.shape)


def write(path, tensors=None, config=CONFIG, *, arch='llama', quantize=None, pre='smollm', **more):
    """Write the file. `more` holds further metadata, dots as double underscores."""
    tensors = random_tensors(config) if tensors is None else tensors
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(128)
    writer.add_embedding_length(config.emb_dim)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_tokenizer_model('gpt2')
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens())
    writer.add_token_types([gguf.TokenType.CONTROL] * len(SPECIAL) + [gguf.TokenType.NORMAL] * (len(tokens()) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for key, value in more.items():
        add = {bool: writer.add_bool, float: writer.add_float32, str: writer.add_string}.get(
            type(value), writer.add_uint32
        )
        add(key.replace('__', '.'), value)
    for name, value in tensors.items():
        if 'attn_q' in name or 'attn_k' in name:
            value = permute(value, config.num_heads if 'attn_q' in name else config.num_kv_heads)
        if quantize is not None and value.ndim == 2:
            writer.add_tensor(name, gguf.quantize(value, quantize), raw_dtype=quantize)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
