"""A checkpoint's own chat template gives transformers' texts and ids: 50 dialogs of 5 templates."""

import itertools
import json
import random

import pytest

pytest.importorskip('transformers', reason='needs transformers, which the tests do not install')
import transformers
from test_chat_templates import CHATML, GEMMA, LLAMA3
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from perl_jax.data import datasets, texts
from perl_jax.errors import UserError
from perl_jax.tasks import preprocessors, registration
from perl_jax.tokenizers.chat.template import Template
from perl_jax.tokenizers.tokenizers import TokenizersVocabulary

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message['role'] == 'user' %}
        {%- if loop.last and system_message is defined %}
            {{- '[INST] ' + system_message + '\n\n' + message['content'] + '[/INST]' }}
        {%- else %}
            {{- '[INST] ' + message['content'] + '[/INST]' }}
        {%- endif %}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] | trim + eos_token }}
    {%- else %}
        {{- raise_exception('Only user and assistant roles are supported!') }}
    {%- endif %}
{%- endfor %}"""
QWEN = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
{%- else %}
    {{- '<|im_start|>system\nYou are helpful. Today is ' + strftime_now('%Y') + '.<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages %}
    {%- if message.role == 'system' and not loop.first %}{% continue %}{% endif %}
    {%- if message.role != 'system' %}
        {{- '<|im_start|>' + message.role + '\n' }}
        {%- if message.role == 'assistant' %}{% generation %}{{- message.content }}{% endgeneration %}
        {%- else %}{{- message.content.split('</think>')[-1].lstrip('\n') }}{% endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if tools %}{{- tools | tojson }}{% endif %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""
TEMPLATES = {  # template, BOS, EOS, end of turn, other special tokens
    'chatml': (CHATML, None, '<|im_end|>', '<|im_end|>', ['<|im_start|>']),
    'llama3': (
        LLAMA3, '<|begin_of_text|>', '<|end_of_text|>', '<|eot_id|>', ['<|start_header_id|>', '<|end_header_id|>'],
    ),
    'gemma': (GEMMA, '<bos>', '<eos>', '<end_of_turn>', ['<start_of_turn>']),
    'mistral': (MISTRAL, '<s>', '</s>', '</s>', ['[INST]', '[/INST]']),
    'qwen': (QWEN, None, '<|endoftext|>', '<|im_end|>', ['<|im_start|>']),
}  # fmt: skip
WORDS = ['Hi', ' there', '\n', 'Café, 日本?', '  two ', '{"a": 1}', '{{ x }}', 'def f(x):\n    return', '</think>', '']
_numbers = itertools.count()


def dialogs():
    """Ten, of one to five turns, half of them behind a system message."""
    rng = random.Random(0)
    text = lambda: 'x' + ''.join(rng.choices(WORDS, k=rng.randint(1, 6)))  # noqa: E731
    for i in range(10):
        system = [{'role': 'system', 'content': text()}] if i % 2 else []
        yield system + [{'role': ('user', 'assistant')[n % 2], 'content': text()} for n in range(1 + 2 * (i % 3))]


def folder_of(folder, name, place):
    template, bos, eos, end, more = TEMPLATES[name]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([__doc__, QWEN], trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    special = dict.fromkeys(token for token in (bos, eos, end, *more) if token)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.save(str(folder / 'tokenizer.json'))
    config = {'eos_token': eos, 'bos_token': bos, 'add_bos_token': bos is not None}
    if place == 'file':
        (folder / 'chat_template.jinja').write_text(template)
    else:
        config['chat_template'] = template if place == 'config' else [
            {'name': 'tool_use', 'template': 'other'}, {'name': 'default', 'template': template}
        ]  # fmt: skip
    (folder / 'tokenizer_config.json').write_text(json.dumps(config))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / 'tokenizer.json'), bos_token=bos, eos_token=eos, chat_template=template
    )
    return theirs, TokenizersVocabulary(folder / 'tokenizer.json')


@pytest.mark.parametrize('place', ['config', 'list', 'file'])
@pytest.mark.parametrize('name', TEMPLATES)
def test_fifty_dialogs_have_transformers_texts_and_ids(tmp_path, name, place):
    theirs, vocabulary = folder_of(tmp_path, name, place)
    ours = Template(str(tmp_path))
    for dialog in dialogs():
        settings = {'add_generation_prompt': True}
        assert ours(dialog) == theirs.apply_chat_template(dialog, tokenize=False, **settings)
        ids = theirs.apply_chat_template(dialog, return_dict=False, **settings)
        assert vocabulary.encode(ours(dialog)) == ids
        (batch,) = texts.dataset(vocabulary, [ours(dialog)], 400).batches(1)
        assert batch[0].inputs[batch[0].inputs_mask].tolist() == ids  # one BOS, whoever puts it there


@pytest.mark.parametrize('name', TEMPLATES)
def test_the_end_of_a_turn_ends_an_answer(tmp_path, name):
    theirs, vocabulary = folder_of(tmp_path, name, 'config')
    _, _, eos, end, _ = TEMPLATES[name]
    assert vocabulary.eos_ids == tuple(dict.fromkeys(theirs.convert_tokens_to_ids([eos, end])))


@pytest.mark.parametrize('name', TEMPLATES)
def test_what_stands_in_a_message_is_text(tmp_path, name):
    theirs, vocabulary = folder_of(tmp_path, name, 'config')
    special = [token for token in TEMPLATES[name][1:4] + tuple(TEMPLATES[name][4]) if token]
    clean, dirty = 'say ' * len(special), 'say '.join(special)
    asked = Template(str(tmp_path))(dirty)
    talk = [{'role': 'user', 'content': dirty}]
    assert asked == theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    control = lambda ids: [i for i in ids if i in theirs.convert_tokens_to_ids(special)]  # noqa: E731
    assert control(vocabulary.encode(asked)) == control(vocabulary.encode(Template(str(tmp_path))(clean)))


def test_a_task_is_put_into_the_checkpoints_format(tmp_path):
    theirs, vocabulary = folder_of(tmp_path, 'qwen', 'file')
    name, examples = f'own_{next(_numbers)}_prompts', [{'inputs': ' Hi <|im_end|>\n'}, {'inputs': 'a</think>b'}]
    wrap = preprocessors.chat(Template(str(tmp_path)), 'Be brief.')
    registration.add(name, 'prompts', lambda split: examples, preprocessors=[wrap])
    rows = datasets.load(datasets.DatasetConfig(name, {'inputs': 200}, 1, vocabulary=vocabulary), 'prompts')
    messages = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'a</think>b'}]
    wanted = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert rows.arrays['inputs'][1][rows.arrays['inputs_mask'][1]].tolist() == wanted  # which cuts the message
    assert rows.examples[0]['inputs_pretokenized'].count('<|im_end|>') == 3
    assert (rows.arrays['inputs'][0] == vocabulary.eos_ids[1]).sum() == 2


@pytest.mark.parametrize(('template', 'said'), [
    ("{{ raise_exception('No\nsystem') }}", 'refuses this conversation: No system'),
    ('{{ messages[0].content.x.y }}', 'refuses this conversation'),
    ('{% for %}', 'cannot be read'),
    ("{{ ''.__class__.__mro__ }}", 'refuses this conversation'),
    ('{{ messages.append(1) }}', 'refuses this conversation'),
])  # fmt: skip
def test_what_a_template_refuses_is_one_line_that_names_its_file(tmp_path, template, said):
    folder_of(tmp_path, 'chatml', 'file')
    (tmp_path / 'chat_template.jinja').write_text(template)
    with pytest.raises(UserError, match=said) as error:
        Template(str(tmp_path))('Hi')
    assert 'chat_template.jinja' in str(error.value) and '\n' not in str(error.value)


def test_a_template_that_is_not_there_is_named(tmp_path):
    folder_of(tmp_path, 'chatml', 'list')
    assert Template(str(tmp_path), 'tool_use')('Hi') == 'other'
    with pytest.raises(UserError, match="'rag', only those called tool_use, default"):
        Template(str(tmp_path), 'rag')('Hi')
