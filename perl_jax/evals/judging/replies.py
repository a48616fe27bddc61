r"""Cleans a judge's reply: removes reasoning, markup, quotations and invented further turns.

    '<think>1 or 2? ..</think>\n\n**Answer: 2**'      'Answer: 2'
    '{"reason": "Answer 1 rambles", "answer": 2}'     'Final answer: 2'
"""

from __future__ import annotations

import json
import re
import unicodedata

FINAL = 'Final answer: '  # replaces JSON, \boxed{} and tags; reading.py recognises it

CUT = ' [cut at the token limit]'  # ends a reply that was not finished

_THOUGHTS = r'(?:think|thinking|thought|thoughts|reasoning|analysis|reflection|scratchpad)'
_OPENS, _CLOSES = rf'[<\[◁]{_THOUGHTS}[>\]▷]', rf'[<\[◁]/{_THOUGHTS}[>\]▷]'
_ENDS = r'<\|(?:im_end|eot_id|end_of_text|endoftext|end|return)\|>|</s>|<end_of_turn>|<eos>'
_TAGGED = r'<(answer|final_answer|verdict|choice|decision|output|winner|preference)>\s*(.*?)\s*</\1>'
_KEYS = (
    'final_answer', 'answer', 'verdict', 'choice', 'decision', 'winner', 'preference', 'preferred', 'better', 'best',
    'judgement', 'judgment', 'result', 'label', 'prediction', 'output', 'harmful', 'unsafe', 'harmless', 'safe',
)  # fmt: skip
_HARM_KEYS = ('harmful', 'unsafe', 'harmless', 'safe')  # they say what YES means, so that they stay
_WORDS = 3  # quotations up to this many words are kept: they may be the verdict itself, "Answer 2"


def plain(text: str) -> str:
    """Reduce a judge's reply to plain sentences.

    Args:
      text: the raw reply.

    Returns:
      The reply without reasoning (closed, left open by truncation, or opened by the chat template), special tokens,
      markdown, LaTeX, tags, block quotes, tables and longer quotations. The answer in a JSON object, \\boxed{}, [[]] or
      an <answer> tag becomes 'Final answer: ..'.
    """
    text = re.sub(r'\bis_(?=harm|safe|unsafe)', 'is ', text, flags=re.IGNORECASE)
    text = re.sub('[\ufe0f\u20e3]', '', text).translate(str.maketrans('\u2018\u2019❶❷', "''12"))  # keycaps
    text = _without_quotations(_structured_answer(_final_turn(unicodedata.normalize('NFKC', text))))
    lines = [_without_markdown(line) for line in text.split('\n')]
    return '\n'.join(line for line in lines if line is not None).strip()


def _final_turn(text: str) -> str:
    """Return the answering turn without its reasoning."""
    text = text.rpartition('<|channel|>final<|message|>')[2]
    text = re.sub(rf'{_OPENS}.*?{_CLOSES}', '\n', text, flags=re.DOTALL | re.IGNORECASE)
    text = re.split(_CLOSES, text, flags=re.IGNORECASE)[-1]
    text = re.split(_OPENS, text, maxsplit=1, flags=re.IGNORECASE)[0]
    text = next((turn for turn in re.split(_ENDS, text) if turn.strip()), '')
    return re.sub(r'<\|[^|>]*\|>|<s>|<bos>|<start_of_turn>(?:model\n)?', '', text)


def _structured_answer(text: str) -> str:
    """Rewrite machine-readable answers (JSON, \\boxed{}, [[]], tags) as 'Final answer: ..'."""
    begin, end = text.find('{'), text.rfind('}')
    if 0 <= begin < end:
        try:
            items = json.loads(text[begin : end + 1]).items()
            fields = {str(key).lower().replace(' ', '_').removeprefix('is_'): value for key, value in items}
        except (ValueError, AttributeError):
            fields = {}
        for key in _KEYS:
            if isinstance(value := fields.get(key), str | int):
                verdict = {True: 'YES', False: 'NO'}[value] if isinstance(value, bool) else value
                return f'{key}: {verdict}' if key in _HARM_KEYS else f'{FINAL}{verdict}'
    text = re.sub(r'\\\(|\\\)|\\\[|\\\]|\$', '', text)
    text = re.sub(r'\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}', r'\1', text)
    text = re.sub(r'\\boxed\{([^{}]*)\}', rf'\n{FINAL}\1\n', text)
    if len({*re.findall(r'\[\[([^\[\]]*)\]\]', text)}) == 1:  # two may be the choices that were offered
        text = re.sub(r'\[\[([^\[\]]*)\]\]', rf'\n{FINAL}\1\n', text)
    text = re.sub(_TAGGED, rf'\n{FINAL}\2\n', text, flags=re.DOTALL | re.IGNORECASE)
    return re.sub(r'</?[A-Za-z_][^<>\n]*>', '', text)


def _without_quotations(text: str) -> str:
    """Remove block quotes and quotations: they are the answers' words, not the judge's."""
    lines = text.split('\n')
    unquoted_lines = [line for line in lines if not line.lstrip().startswith(('>', '|'))]
    text = '\n'.join(unquoted_lines if ''.join(unquoted_lines).strip() else [line.lstrip(' >|') for line in lines])
    text = re.sub('[“”«»]', '"', text)

    def keep_short_quotation(match: re.Match[str]) -> str:
        return match[1] if len(match[1].split()) <= _WORDS else ' '

    text = re.sub(r'"([^"\n]*)(?:"|$)', keep_short_quotation, text, flags=re.MULTILINE)
    return re.sub(r"(?<!\w)'(\w+(?: \w+)?)[.!]?'(?!\w)", r'\1', text)


def _without_markdown(line: str) -> str | None:
    """Remove the markdown of a line; None for a code fence or a rule."""
    if re.fullmatch(r'\s*(?:```\w*|~~~\w*|[-*_=]{3,})\s*', line):
        return None
    line = re.sub(r'^\s*(?:#{1,6}\s+|[-*+•]\s+(?=\S))', '', line)
    line = re.sub(r'[*`~]', '', line)
    return re.sub(r'(?<!\w)_+|_+(?!\w)', '', line).strip()
