"""Prompt formats, word for word. tests/parity/test_chat_templates.py compares them with the models' own templates."""

import pytest

from perl_jax.errors import UserError
from perl_jax.tasks.chat import chatml, gemma, llama3

SYSTEM = {'role': 'system', 'content': 'Be kind.'}
HI = {'role': 'user', 'content': ' Hi\n'}
HELLO = {'role': 'assistant', 'content': 'Hello!'}
TALK = [SYSTEM, HI, HELLO, {'role': 'user', 'content': 'Bye'}]


def test_chatml():
    assert chatml('Hi') == '<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n'
    assert chatml(TALK) == (
        '<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n Hi\n<|im_end|>\n'
        '<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n'
    )


def test_llama3():
    assert llama3(TALK) == (
        '<|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>'
        '<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>'
        '<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>'
        '<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>'
        '<|start_header_id|>assistant<|end_header_id|>\n\n'
    )


def test_gemma():
    assert gemma(TALK) == (
        '<start_of_turn>user\nBe kind.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n'
        '<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n'
    )


@pytest.mark.parametrize('template', [chatml, llama3, gemma])
@pytest.mark.parametrize(
    'messages, reason',
    [
        ([], 'no messages'),
        ([HI, {'role': 'agent', 'content': 'x'}], "message 2 .* is by 'agent'; use system, user, assistant"),
        ([{'user': 'Hi'}], 'message 1 .* has user; it needs role and content'),
        ([HI, SYSTEM], 'message 2 .* by system, which only the first can be'),
    ],
)
def test_what_is_no_conversation(template, messages, reason):
    with pytest.raises(UserError, match=reason):
        template(messages)


@pytest.mark.parametrize('messages, turn', [([HI, HI], 'turn 2 is by user'), ([SYSTEM, HELLO], 'turn 1 is by assist')])
def test_gemma_takes_turns(messages, turn):
    with pytest.raises(UserError, match=turn):
        gemma(messages)
    assert chatml(messages) and llama3(messages)
