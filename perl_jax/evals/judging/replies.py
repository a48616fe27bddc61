r"""A judge's reply without what is not its verdict: its thoughts, markup, what it quotes, the turns that it makes up.

    '<think>1 or 2? ..</think>\n\n**Answer: 2**'      'Answer: 2'
    '{"reason": "Answer 1 rambles", "answer": 2}'     'Final answer: 2'
"""

from __future__ import annotations

import json
import re
import unicodedata

FINAL = 'Final answer: '  # what JSON, \boxed{} and tags are written as: reading.py knows it

_THOUGHTS = r'(?:think|thinking|thought|thoughts|reasoning|analysis|reflection|scratchpad)'
_OPENS, _CLOSES = rf'[<\[◁]{_THOUGHTS}[>\]▷]', rf'[<\[◁]/{_THOUGHTS}[>\]▷]'
_ENDS = r'<\|(?:im_end|eot_id|end_of_text|endoftext|end|return)\|>|</s>|<end_of_turn>|<eos>'
_TAGGED = r'<(answer|final_answer|verdict|choice|decision|output|winner|preference)>\s*(.*?)\s*</\1>'
_KEYS = (
    'final_answer', 'answer', 'verdict', 'choice', 'decision', 'winner', 'preference', 'preferred', 'better', 'best',
    'harmful', 'judgement', 'judgment', 'result', 'label', 'prediction', 'output',
)  # fmt: skip
_WORDS = 3  # a quotation of so many words may be the verdict itself: "Answer 2"


def plain(text: str) -> str:
    """What a judge says, as plain sentences.

    Args:
      text: its reply as it came.

    Returns:
      The reply without reasoning (closed, left open by a reply that was cut, or opened by the chat template), special
      tokens, markdown, LaTeX, tags, block quotes, tables and longer quotations; the answer of a JSON object, of
      \\boxed{}, [[]] or an <answer> tag as 'Final answer: ..'.
    """
    text = re.sub('[\ufe0f\u20e3]', '', text).translate(str.maketrans("\u2018\u2019❶❷", "''12"))  # keycaps
    text = _unquoted(_object(_said(unicodedata.normalize('NFKC', text))))
    lines = [_line(line) for line in text.split('\n')]
    return '\n'.join(line for line in lines if line is not None).strip()


def _said(text: str) -> str:
    """The turn that answers, without thoughts."""
    text = text.rpartition('<|channel|>final<|message|>')[2]
    text = re.sub(rf'{_OPENS}.*?{_CLOSES}', '\n', text, flags=re.DOTALL | re.IGNORECASE)
    text = re.split(_CLOSES, text, flags=re.IGNORECASE)[-1]
    text = re.split(_OPENS, text, maxsplit=1, flags=re.IGNORECASE)[0]
    text = next((part for part in re.split(_ENDS, text) if part.strip()), '')
    return re.sub(r'<\|[^|>]*\|>|<s>|<bos>|<start_of_turn>(?:model\n)?', '', text)


def _object(text: str) -> str:
    """The text with what a machine is meant to read written as a final answer."""
    begin, end = text.find('{'), text.rfind('}')
    if 0 <= begin < end:
        try:
            fields = {str(k).lower().replace(' ', '_'): v for k, v in json.loads(text[begin : end + 1]).items()}
        except (ValueError, AttributeError):
            fields = {}
        for key in _KEYS:
            if isinstance(value := fields.get(key), str | int):
                said = {True: 'YES', False: 'NO'}[value] if isinstance(value, bool) else value
                return f'{FINAL}{said}'
    text = re.sub(r'\\\(|\\\)|\\\[|\\\]|\$', '', text)
    text = re.sub(r'\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}', r'\1', text)
    text = re.sub(r'\\boxed\{([^{}]*)\}', rf'\n{FINAL}\1\n', text)
    text = re.sub(r'\[\[([^\[\]]*)\]\]', rf'\n{FINAL}\1\n', text)
    text = re.sub(_TAGGED, rf'\n{FINAL}\2\n', text, flags=re.DOTALL | re.IGNORECASE)
    return re.sub(r'</?[A-Za-z_][^<>\n]*>', '', text)


def _unquoted(text: str) -> str:
    """The text without block quotes and quotations, which are somebody else's words."""
    lines = text.split('\n')
    own = [line for line in lines if not line.lstrip().startswith(('>', '|'))]
    text = '\n'.join(own if ''.join(own).strip() else [line.lstrip(' >|') for line in lines])
    text = re.sub('[“”«»]', '"', text)

    def short(match: re.Match[str]) -> str:
        return match[1] if len(match[1].split()) <= _WORDS else ' '

    text = re.sub(r'"([^"\n]*)(?:"|$)', short, text, flags=re.MULTILINE)
    return re.sub(r"(?<!\w)'(\w+(?: \w+)?)[.!]?'(?!\w)", r'\1', text)


def _line(line: str) -> str | None:
    """A line without markdown; None for a fence or a rule."""
    if re.fullmatch(r'\s*(?:```\w*|~~~\w*|[-*_=]{3,})\s*', line):
        return None
    line = re.sub(r'^\s*(?:#{1,6}\s+|[-*+•]\s+(?=\S))', '', line)
    line = re.sub(r'[*`~]', '', line)
    return re.sub(r'(?<!\w)_+|_+(?!\w)', '', line).strip()
