"""Who wrote a control token in a chat template's text, whatever the template does with a message."""

import jinja2
import pytest

from perl_jax.tokenizers.chat import typed
from perl_jax.tokenizers.chat.controls import mark

OWN = '<|end|>'
CONTENT = {  # a template's expression of the message c, and what the text has of it
    'c': '{}',
    "c.split('</think>')[-1]": ' b',
    "c.split('<think>')[0]": '',
    "c.split('</think>')[-1].strip() + ' </think>'": 'b [</think>]',
    "'A' if '</think>' in c else 'B'": 'A',
    "('A' if '</think>' in c else 'B') + c": 'A{}',
    "c | replace('</think>', 'X')": '<think>aX b',
    "c.startswith('<think>')": 'True',
    "c.startswith('<think>') ~ c": 'True{}',
    "c.endswith('b')": 'True',
    'c | length': '18',
    'c[:9]': '<think>a<',
    'c[7:]': 'a</think> b',
    'c | upper': '<THINK>A</THINK> B',
    'c | urlencode': '%3Cthink%3Ea%3C/think%3E%20b',
    'c | tojson': r'"\u003cthink\u003ea\u003c/think\u003e b"',
    "'same' if c == '<think>a</think> b' else 'other'": 'same',
    "c ~ ('' if '</think>' in c else '</think>')": '{}',
}


@pytest.mark.parametrize('what', CONTENT)
def test_a_typed_token_is_text_and_the_templates_own_are_control_tokens(what):
    template = jinja2.Template(f'{{% set c = messages[0].c %}}{{{{ {what} }}}}<|end|>')
    talk = [{'c': '<think>a</think> b'}]
    render = lambda messages: template.render(messages=messages)  # noqa: E731
    got = typed.marked(render, talk, [OWN, '<think>', '</think>'])
    wanted = CONTENT[what].replace('{}', talk[0]['c']).replace('[</think>]', mark('</think>'))
    assert got == wanted + mark(OWN)


def test_messages_bring_no_marks():
    template = jinja2.Template('{{ messages[0].c }}')
    talk = [{'c': f'{mark("<a>")}\ufdd2<a>'}]
    assert typed.marked(lambda messages: template.render(messages=messages), talk, ['<a>']) == '<a><a>'
