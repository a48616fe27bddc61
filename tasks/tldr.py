r"""Reddit TL;DR: posts with their authors' summaries, and summaries of which people chose the better.

Registers tldr_{sft,pairs,prompts}; the text is the source's own, `SUBREDDIT: r/..\n\nTITLE: ..\n\nPOST: ..\n\nTL;DR:`,
and an answer begins with a space. The defaults are mirrors without a loading script, which `datasets` no longer runs.

    TLDR_SOURCE         posts: id, subreddit, title, post, summary
    TLDR_PAIRS_SOURCE   comparisons: info {id, subreddit, title, post}, summaries [{text}, {text}], choice 0 or 1,
                        split train, valid1 (validation: models were chosen by it) or valid2 (test)

Comparisons about CNN/DM articles, and of a summary with itself, are passed over. `group` is the post's id.

Source: Stiennon et al., Learning to summarize from human feedback, arXiv 2009.01325. Its files are read as they are:
openaipublic.blob.core.windows.net/summarize-from-feedback/{datasets/tldr_3_filtered/*.jsonl,dataset/comparisons/*.json}
"""

import dataclasses
from collections.abc import Iterator, Mapping

from perl_jax.tasks import registration, sources


@dataclasses.dataclass(frozen=True)
class Post:
    """One post: its id, its prompt and the author's summary."""

    group: str
    inputs: str
    summary: str


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One comparison of two summaries."""

    group: str
    inputs: str
    chosen: str
    rejected: str


def prompt(row: Mapping[str, str]) -> str:
    """The prompt of a post with subreddit, title and post."""
    post = _text(row, 'post').strip()
    return f'SUBREDDIT: r/{_text(row, "subreddit")}\n\nTITLE: {row["title"] or ""}\n\nPOST: {post}\n\nTL;DR:'


def answer(text: str) -> str:
    """A summary as a target: one space in front, none behind. Raises ValueError where nothing is left."""
    if not text.strip():
        raise ValueError('a summary is empty')
    return f' {text.strip()}'


def sft(split: str) -> Iterator[dict]:
    """Every post with its author's summary."""
    for row in POSTS.rows(split):
        yield {'inputs': row.inputs, 'targets': row.summary, 'group': row.group}


def prompts(split: str) -> Iterator[dict]:
    """Every post; `reference` is its author's summary."""
    for row in POSTS.rows(split):
        yield {'inputs': row.inputs, 'reference': row.summary.strip(), 'group': row.group}


def pairs(split: str) -> Iterator[dict]:
    """Every comparison, duplicates and contradictions too."""
    for row in COMPARISONS.rows(split):
        yield {'inputs': row.inputs, 'chosen': row.chosen, 'rejected': row.rejected, 'group': row.group}


def _post(row: Mapping) -> Post:
    return Post(_text(row, 'id'), prompt(row), answer(_text(row, 'summary')))


def _comparison(row: Mapping) -> Comparison | None:
    info, summaries, choice = row['info'], row['summaries'], row['choice']
    if info.get('article') and not info.get('post'):
        return None
    # A list of dicts in JSON and Parquet; TFDS turns it into a dict of lists.
    texts = summaries['text'] if isinstance(summaries, Mapping) else [summary['text'] for summary in summaries]
    if len(texts) != 2 or choice not in (0, 1):
        raise ValueError(f'{len(texts)} summaries and choice {choice!r}, not two and 0 or 1')
    chosen, rejected = answer(texts[choice]), answer(texts[1 - choice])
    if chosen == rejected:
        return None
    return Comparison(_text(info, 'id'), prompt(info), chosen, rejected)


def _text(row: Mapping, key: str) -> str:
    if not isinstance(row[key], str) or not row[key]:
        raise ValueError(f'{key} is {row[key]!r}, not a text')
    return row[key]


POSTS = sources.Source(
    'TLDR_SOURCE',
    'hf:cleanrl/summarize_from_feedback_tldr_3_filtered_oai_preprocessing_1704563162',
    'set it to a folder with the train, valid and test.jsonl of tldr_3_filtered (docs/reference/tasks.md)',
    _post,
)
COMPARISONS = sources.Source(
    'TLDR_PAIRS_SOURCE',
    'hf:vwxyzjn/summarize_from_feedback_oai_preprocessing_1711138084',
    'set it to a folder with the batch*.json of the comparisons (docs/reference/tasks.md)',
    _comparison,
    split=lambda row: {'valid1': 'validation', 'valid2': 'test'}.get(row['split'], row['split']),
)
for _kind in (sft, pairs, prompts):
    registration.add(f'tldr_{_kind.__name__}', _kind.__name__, _kind)
