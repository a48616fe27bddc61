r"""Stanford Human Preferences: a post of one of 18 subreddits and two comments, of which one was voted up more.

Registers shp_{sft,pairs,prompts} and shp_DOMAIN_{..} for each of DOMAINS. The prompt is `POST: ..\n\nRESPONSE:` (ours:
the paper gives none), and an answer begins with a space. The sft target is the better comment of the post's first row.

    SHP_SOURCE     rows of post_id, domain, history, human_ref_A, human_ref_B, labels: 1 where A is better, 0 where B

The splits are the source's, by post; `domain` is askacademia_train and so on. `group` is the post's id.

Source: Ethayarajh et al., Understanding Dataset Difficulty with V-Usable Information, ICML 2022; stanfordnlp/SHP.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping

from perl_jax.tasks import registration, sources

DOMAINS = (
    'askacademia', 'askanthropology', 'askbaking', 'askcarguys', 'askculinary', 'askdocs', 'askengineers',
    'askhistorians', 'askhr', 'askphilosophy', 'askphysics', 'askscience', 'asksciencefiction', 'asksocialscience',
    'askvet', 'changemyview', 'explainlikeimfive', 'legaladvice',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two comments on a post."""

    group: str
    domain: str
    inputs: str
    chosen: str
    rejected: str


def read(row: Mapping) -> Comparison:
    """A row's prompt and comments, the better first. Raises ValueError where a text is empty or the label is odd."""
    comments = [f' {row[key].strip()}' for key in ('human_ref_A', 'human_ref_B')]
    history, label, domain = row['history'].strip(), row['labels'], row['domain'].partition('_')[0]
    if label not in (0, 1):
        raise ValueError(f'labels is {label!r}, not 0 or 1')
    if domain not in DOMAINS:
        raise ValueError(f'domain is {row["domain"]!r}')
    if not history or not all(map(str.strip, comments)):
        raise ValueError('history or a comment is empty')
    chosen, rejected = comments if label else comments[::-1]
    return Comparison(str(row['post_id']), domain, f'POST: {history}\n\nRESPONSE:', chosen, rejected)


def sft(domain: str | None, split: str) -> Iterator[dict]:
    """Every post once, with the better comment of its first row."""
    for row in _posts(domain, split):
        yield {'inputs': row.inputs, 'targets': row.chosen, 'group': row.group}


def pairs(domain: str | None, split: str) -> Iterator[dict]:
    """Every comparison; a post has many."""
    for row in _rows(domain, split):
        yield {'inputs': row.inputs, 'chosen': row.chosen, 'rejected': row.rejected, 'group': row.group}


def prompts(domain: str | None, split: str) -> Iterator[dict]:
    """Every post once; `reference` is the better comment of its first row."""
    for row in _posts(domain, split):
        yield {'inputs': row.inputs, 'reference': row.chosen.strip(), 'group': row.group}


def _rows(domain: str | None, split: str) -> Iterator[Comparison]:
    return (row for row in SOURCE.rows(split) if domain in (None, row.domain))


def _posts(domain: str | None, split: str) -> list[Comparison]:
    posts = {}
    for row in _rows(domain, split):
        posts.setdefault(row.inputs, row)
    return list(posts.values())


SOURCE = sources.Source(
    'SHP_SOURCE', 'hf:stanfordnlp/SHP', 'set it to a clone of huggingface.co/datasets/stanfordnlp/SHP', read
)
for _domain in (None, *DOMAINS):
    for _kind in (sft, pairs, prompts):
        _name = '_'.join(filter(None, ('shp', _domain, _kind.__name__)))
        registration.add(_name, _kind.__name__, functools.partial(_kind, _domain))
