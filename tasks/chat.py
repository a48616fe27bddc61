r"""The formats of chat models: functions from a conversation to a prompt's text, which ends where the answer begins.

    chatml([{'role': 'system', 'content': 'You take orders.'}, {'role': 'user', 'content': 'A latte, please.'}])
    chatml('A latte, please.')                # a string is one message of the user

The roles are system (first, if at all), user and assistant. The texts are those of transformers' apply_chat_template
with add_generation_prompt, less BOS: that is the vocabulary's, and a run puts it in front. A vocabulary has to know the
markers as tokens, and its EOS has to be the one that ends a turn, since EOS ends what the model learns to answer.

    chatml    <|im_end|>       SmolLM2, Qwen      the EOS of Instruct models' own tokenizers
    llama3    <|eot_id|>       Llama 3            likewise
    gemma     <end_of_turn>    Gemma 2 and 3      not the tokenizer's: TokenizersVocabulary(path, eos='<end_of_turn>')

What stands in a message never becomes a control token, though it be spelled like one (controls.py). A task calls them
in its function of examples, or names one in preprocessors.chat; a checkpoint's own template is
perl_jax.interop.chat_template.Template. Some models' own templates put in a system message where there is none
(SmolLM2, Qwen2.5: their name; Llama 3.1: two dates): give such a message yourself.
"""

from collections.abc import Mapping, Sequence

from perl_jax.errors import UserError
from perl_jax.tokenizers.chat.controls import Formatted, mark, unmark

Conversation = str | Sequence[Mapping[str, str]]
ROLES = ('system', 'user', 'assistant')


def chatml(conversation: Conversation) -> Formatted:
    r"""`<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n`.

    Raises:
      UserError: a message without role or content, an unknown role, a system message that is not the first.
    """
    start, end = mark('<|im_start|>'), mark('<|im_end|>')
    turns = (f'{start}{role}\n{content}{end}\n' for role, content in _messages(conversation))
    return Formatted(''.join(turns) + f'{start}assistant\n')


def llama3(conversation: Conversation) -> Formatted:
    r"""`<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n`.

    White space around a message is dropped. Raises what chatml does.
    """
    head = f'{mark("<|start_header_id|>")}{{}}{mark("<|end_header_id|>")}\n\n'.format
    turns = (f'{head(role)}{content.strip()}{mark("<|eot_id|>")}' for role, content in _messages(conversation))
    return Formatted(''.join(turns) + head('assistant'))


def gemma(conversation: Conversation) -> Formatted:
    r"""`<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n`; a system message opens the user's first.

    White space around a message is dropped. Raises what chatml does, and UserError where user and assistant do not
    alternate.
    """
    messages = _messages(conversation)
    system = f'{messages.pop(0)[1]}\n\n' if messages[0][0] == 'system' else ''
    text, start, end = '', mark('<start_of_turn>'), mark('<end_of_turn>')
    for i, (role, content) in enumerate(messages):
        if role != ('user', 'assistant')[i % 2]:
            raise UserError(f'gemma: user and assistant must take turns, the user first; turn {i + 1} is by {role}')
        name = 'model' if role == 'assistant' else role
        text += f'{start}{name}\n{system if i == 0 else ""}{content.strip()}{end}\n'
    return Formatted(f'{text}{start}model\n')


def _messages(conversation: Conversation) -> list[tuple[str, str]]:
    if isinstance(conversation, str):
        return [('user', unmark(conversation))]
    if not conversation:
        raise UserError('a conversation has no messages; it needs at least one')
    for i, message in enumerate(conversation):
        if not message.keys() >= {'role', 'content'}:
            raise UserError(f'message {i + 1} of a conversation has {", ".join(message)}; it needs role and content')
        if message['role'] not in ROLES:
            raise UserError(f'message {i + 1} of a conversation is by {message["role"]!r}; use {", ".join(ROLES)}')
        if message['role'] == 'system' and i:
            raise UserError(f'message {i + 1} of a conversation is by system, which only the first can be')
    return [(message['role'], unmark(message['content'])) for message in conversation]
