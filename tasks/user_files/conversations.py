r"""Conversations of data sets in their several forms, as lists of {'role', 'content'}.

    [{'role': 'user', 'content': 'Hi'}, ..]               OpenAI's, transformers' and TRL's messages
    [{'from': 'human', 'value': 'Hi'}, ..]                ShareGPT's
    '\n\nHuman: Hi\n\nAssistant: Hello'                   a transcript, as Anthropic's
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

Message = Mapping[str, str]
Messages = tuple[Message, ...]

HUMAN, ASSISTANT = '\n\nHuman:', '\n\nAssistant:'
_ROLES = {
    'system': 'system', 'developer': 'system', 'user': 'user', 'human': 'user', 'prompter': 'user',
    'assistant': 'assistant', 'gpt': 'assistant', 'bot': 'assistant', 'model': 'assistant', 'chatgpt': 'assistant',
    'ai': 'assistant',
}  # fmt: skip
_REFUSED = ('tool_calls', 'function_call', 'reasoning_content', 'thinking')
_KEYS = (('role', 'content'), ('from', 'value'))


def is_message(value: Any) -> bool:
    """Returns whether a value is one message, of whatever form."""
    return isinstance(value, Mapping) and any(keys <= value.keys() for keys in map(set, _KEYS))


def is_messages(value: Any) -> TypeGuard[Sequence[Mapping[str, Any]]]:
    """Returns whether a value is a list of messages, of whatever form."""
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(m, Mapping) for m in value)


def is_transcript(text: Any) -> bool:
    """Returns whether a text is a transcript that begins with a human's turn."""
    return isinstance(text, str) and text.lstrip().startswith(HUMAN.strip()) and ASSISTANT in text


def messages(value: Any) -> Messages:
    """Returns the messages of a list of messages or of a transcript.

    Raises:
      ValueError: there are none, or one has a role or content that is not understood.
    """
    if is_transcript(value):
        turns = re.split(f'({HUMAN}|{ASSISTANT})', f'\n\n{value.lstrip()}')[1:]
        roles = {HUMAN: 'user', ASSISTANT: 'assistant'}
        return tuple({'role': roles[turn], 'content': text.strip()} for turn, text in zip(turns[::2], turns[1::2]))
    if not is_messages(value) or not value:
        raise ValueError(f'neither messages nor a transcript (Human: .. Assistant: ..): {str(value)[:40]!r}')
    return tuple(_message(number, message) for number, message in enumerate(value, start=1))


def _message(number: int, message: Mapping[str, Any]) -> Message:
    role_key, content_key = next((keys for keys in _KEYS if keys[0] in message), _KEYS[0])
    role, content = message.get(role_key), message.get(content_key)
    role = role.lower() if isinstance(role, str) else role
    if role not in _ROLES:
        raise ValueError(f'message {number} is by {role!r}; known are {", ".join(_ROLES)}')
    if is_messages(content):  # parts, of which texts are understood
        content = _joined(content)
    if not isinstance(content, str):
        raise ValueError(f'message {number}: its {content_key} is no text')
    if more := [key for key in _REFUSED if message.get(key)]:
        raise ValueError(f'message {number} has {more[0]}, which no chat format here writes')
    if message.get('weight', 1) != 1 or message.get('train', True) is not True:
        raise ValueError(f'message {number} has a weight or train flag of its own, where each turn counts alike')
    return {'role': _ROLES[role], 'content': content}


def _joined(contents: Sequence[Mapping[str, Any]]) -> str | None:
    values = (content.get('text') for content in contents if content.get('type') == 'text')
    texts = [text for text in values if isinstance(text, str)]
    return ''.join(texts) if len(texts) == len(contents) else None


def continued(prompt: Messages, answer: Messages) -> Messages:
    """Returns the whole dialog of a prompt and an answer that continues it, or repeats it as data sets do.

    Raises:
      ValueError: the answer does neither.
    """
    if answer[0]['role'] == 'assistant':
        return prompt + answer
    start = len(answer) - len([m for m in answer if m['role'] != 'system']) if prompt[0]['role'] != 'system' else 0
    if answer[start : start + len(prompt)] == prompt and len(answer) > start + len(prompt):
        return answer
    raise ValueError('an answer neither continues the prompt nor repeats it')


def split_last(conversation: Messages) -> tuple[Messages, str]:
    """Returns what stands before the last message, and the last, which has to be the assistant's.

    Raises:
      ValueError: it is not, or nothing stands before it.
    """
    *prompt, last = conversation
    if last['role'] != 'assistant':
        raise ValueError(f'the last message is by {last["role"]}, where an answer is expected')
    if not prompt:
        raise ValueError('an answer without a prompt')
    return tuple(prompt), last['content']


def answers(conversation: Messages) -> list[tuple[Messages, str]]:
    """Returns each turn of the assistant with all that stands before it.

    Raises:
      ValueError: the assistant says nothing, or speaks first.
    """
    turns = [number for number, message in enumerate(conversation) if message['role'] == 'assistant']
    if not turns:
        raise ValueError('the assistant says nothing')
    return [split_last(conversation[: number + 1]) for number in turns]


def plain(conversation: Messages) -> str:
    r"""Returns the text of a conversation without control tokens: `\n\nHuman: Hi\n\nAssistant:`, to the answer.

    Source: the format of Anthropic/hh-rlhf (arXiv 2204.05862), which a model without a chat template can learn.
    """
    names = {'system': '', 'user': f'{HUMAN} ', 'assistant': f'{ASSISTANT} '}
    return ''.join(names[message['role']] + message['content'] for message in conversation) + ASSISTANT
