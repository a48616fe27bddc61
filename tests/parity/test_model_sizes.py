"""gin/models against transformers: the same sizes make as many parameters there. On the meta device, without memory."""

import pytest
from test_models import COUNTS, network

torch = pytest.importorskip('torch', reason='needs torch and transformers, which the tests do not install')
transformers = pytest.importorskip('transformers', reason='needs torch and transformers')

KINDS = {
    'llama': 'Llama', 'smollm': 'Llama', 'qwen2': 'Qwen2', 'qwen3': 'Qwen3', 'gemma2': 'Gemma2', 'gemma3': 'Gemma3Text',
}  # fmt: skip
WITH_IMAGES = {'gemma3_4b': 4_300_079_472, 'gemma3_12b': 12_187_325_040, 'gemma3_27b': 27_432_406_640}


def count(model, config):
    with torch.device('meta'):
        return getattr(transformers, model)(config).num_parameters()


def decoder(name):
    c = network(name).config
    kind = next(kind for start, kind in KINDS.items() if name.startswith(start))
    return kind, getattr(transformers, f'{kind}Config')(
        vocab_size=c.vocab_size,
        hidden_size=c.emb_dim,
        intermediate_size=c.mlp_dim,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        tie_word_embeddings=c.logits_via_embedding,
    )


@pytest.mark.parametrize('name', [name for name in COUNTS if 't5' not in name])
def test_decoder(name):
    kind, config = decoder(name)
    assert count(f'{kind.removesuffix("Text")}ForCausalLM', config) == COUNTS[name]


@pytest.mark.parametrize('name', WITH_IMAGES)
def test_gemma3_with_its_vision_tower_is_what_the_model_page_shows(name):
    vision = {
        'hidden_size': 1152, 'intermediate_size': 4304, 'num_hidden_layers': 27, 'num_attention_heads': 16,
        'image_size': 896, 'patch_size': 14, 'vision_use_head': False,
    }  # fmt: skip
    config = transformers.Gemma3Config(text_config=decoder(name)[1], vision_config=vision)
    assert count('Gemma3ForConditionalGeneration', config) == WITH_IMAGES[name]


@pytest.mark.parametrize('name', [name for name in COUNTS if 't5' in name])
def test_t5(name):
    c = network(name).config
    config = transformers.T5Config(
        vocab_size=c.vocab_size,
        d_model=c.emb_dim,
        d_kv=c.head_dim,
        d_ff=c.mlp_dim,
        num_layers=c.num_encoder_layers,
        num_decoder_layers=c.num_decoder_layers,
        num_heads=c.num_heads,
        feed_forward_proj='gated-gelu' if c.gated else 'relu',
    )
    output = 0 if c.logits_via_embedding else c.vocab_size * c.emb_dim  # which transformers 5 ties whatever one says
    assert count('T5ForConditionalGeneration', config) + output == COUNTS[name]
