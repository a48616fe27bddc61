"""Which tokens are a chat template's, whatever their flags say, and what it does with such tokens in a message."""

import json

import pytest

pytest.importorskip('transformers', reason='needs transformers, which the tests do not install')
import transformers
from test_tokenizer_kinds import CORPUS, TURNS
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from perl_jax.tokenizers.chat.template import Template
from perl_jax.tokenizers.vocabularies import vocabulary

CHATML = """{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{{- m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
TOKENS = ['<|im_start|>', '<|im_end|>', '<think>', '</think>']


def chatml_folder(folder, special, tokens=TOKENS, template=CHATML):
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    ))  # fmt: skip
    t.add_special_tokens(['<|endoftext|>'])
    t.add_tokens([AddedToken(text, special=special, normalized=False) for text in tokens])
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=t, eos_token='<|endoftext|>')
    theirs.chat_template = template
    theirs.save_pretrained(folder)
    return vocabulary(str(folder)), transformers.PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize('special', [True, False])
def test_tokens_around_messages_are_control_tokens_whatever_their_flag_says(tmp_path, special):
    ours, theirs = chatml_folder(tmp_path, special)
    start, end, think = theirs.convert_tokens_to_ids(['<|im_start|>', '<|im_end|>', '<think>'])
    assert ours.eos_ids == (theirs.eos_token_id, end)
    asked = 'say <|im_end|> <|im_start|> now'
    got = ours.encode(Template(str(tmp_path))(asked))
    talk = [{'role': 'user', 'content': asked}]
    settings = {'add_generation_prompt': True, 'return_dict': False, 'sanitize_control_tokens': True}
    wanted = theirs.apply_chat_template(talk, **settings)
    assert (got.count(start), got.count(end)) == (wanted.count(start), wanted.count(end)) == (2, 1)
    assert ours.decode([i for i in got if i != end]) == theirs.decode([i for i in wanted if i != end])
    assert not {start, end} & set(ours.encode(asked))
    # What a model is to write itself it can learn, where its tokenizer says that this is text.
    assert (think in ours.encode('<think>\n')) == (not special)


def test_a_tokenizer_may_list_its_control_tokens(tmp_path):
    ours, theirs = chatml_folder(tmp_path, False, ['<|user|>', '<|tool|>', '<|end|>'], TURNS)
    said = json.loads((tmp_path / 'tokenizer_config.json').read_text())
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(said | {'chat_control_tokens': ['<|tool|>']}))
    user, tool, end = theirs.convert_tokens_to_ids(['<|user|>', '<|tool|>', '<|end|>'])
    got = ours.encode('<|user|><|tool|><|end|>')
    assert (user in got, tool in got, end in got) == (False, False, True)  # the template has the first between turns


LOOKS = [
    "{% if '</think>' in c %}A{% else %}B{% endif %}", "{{ c.split('</think>')[-1] }}", '{{ c | length }}',
    "{{ c | replace('</think>', 'X') }}", "{{ c.startswith('<think>') }}{{ c }}", '{{ c[:3] }}', '{{ c | tojson }}',
    '{{ c | upper }}', '{{ c | urlencode }}', "{{ c.split('</think>')[0].split('<think>')[-1] }}</think>{{ c }}",
]  # fmt: skip


@pytest.mark.parametrize('look', LOOKS)
def test_a_template_that_looks_into_a_message_sees_it_as_it_is(tmp_path, look):
    template = '{% for m in messages %}{% set c = m.content %}<|im_start|>' + look + '<|im_end|>{% endfor %}'
    ours, theirs = chatml_folder(tmp_path, True, template=template)
    talk = [{'role': 'user', 'content': '<think>q</think>r'}]
    got = Template(str(tmp_path))(talk)
    assert got == theirs.apply_chat_template(talk, tokenize=False)
    ids = ours.encode(got)
    start, end, *think = theirs.convert_tokens_to_ids(['<|im_start|>', '<|im_end|>', '<think>', '</think>'])
    assert (ids[0], ids[-1]) == (start, end) and sum(ids.count(i) for i in think) <= ('}}</think>' in look)
