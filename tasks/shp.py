r"""Stanford Human Preferences: a post of one of 18 subreddits and two comments, of which one was voted up more.

Registers shp_{sft,pairs,prompts} and shp_DOMAIN_{..} for each of DOMAINS. The prompt is `POST: ..\n\nRESPONSE:` (ours:
the paper gives none), and an answer begins with a space. The sft target is the better comment of the post's first row.

    SHP_SOURCE       rows of post_id, domain, history, human_ref_A, human_ref_B, labels: 1 where A is better, 0 where B
    SHP_SCORE_RATIO  pairs alone whose better comment has so many times the other's votes (its authors took 2)
    SHP_POST_PAIRS   at most so many pairs of a post, those of the largest ratios (its authors took 5)

The splits are the source's, by post; `domain` is askacademia_train and so on. `group` is the post's id.

Source: Ethayarajh et al., Understanding Dataset Difficulty with V-Usable Information, ICML 2022; stanfordnlp/SHP.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Iterator, Mapping

from perl_jax.errors import UserError
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
    ratio: float | None


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
    ratio = row.get('score_ratio')
    inputs = f'POST: {history}\n\nRESPONSE:'
    return Comparison(str(row['post_id']), domain, inputs, chosen, rejected, None if ratio is None else float(ratio))


def sft(domain: str | None, split: str) -> Iterator[dict]:
    """Every post once, with the better comment of its first row."""
    for row in _posts(domain, split):
        yield {'inputs': row.inputs, 'targets': row.chosen, 'group': row.group}


def pairs(domain: str | None, split: str) -> Iterator[dict]:
    """Every comparison, or those that SHP_SCORE_RATIO and SHP_POST_PAIRS let pass; a post has many."""
    for row in _chosen(list(_rows(domain, split))):
        yield {'inputs': row.inputs, 'chosen': row.chosen, 'rejected': row.rejected, 'group': row.group}


def prompts(domain: str | None, split: str) -> Iterator[dict]:
    """Every post once; `reference` is the better comment of its first row."""
    for row in _posts(domain, split):
        yield {'inputs': row.inputs, 'reference': row.chosen.strip(), 'group': row.group}


def _chosen(rows: list[Comparison]) -> list[Comparison]:
    least, most = _setting('SHP_SCORE_RATIO', 1.0), _setting('SHP_POST_PAIRS', 1)
    if (least or most) and (lacking := sum(row.ratio is None for row in rows)):
        raise UserError(f'SHP_SCORE_RATIO, SHP_POST_PAIRS: {lacking} rows have no score_ratio; unset both')
    rows = [row for row in rows if not least or _ratio(row) >= least]
    if not most:
        return rows
    posts: dict[str, list[Comparison]] = {}
    for row in rows:
        posts.setdefault(row.group, []).append(row)
    kept_ids = {id(row) for post in posts.values() for row in sorted(post, key=lambda row: -_ratio(row))[: int(most)]}
    return [row for row in rows if id(row) in kept_ids]


def _ratio(row: Comparison) -> float:
    assert row.ratio is not None  # `_chosen` refuses rows without one first
    return row.ratio


def _setting(variable: str, least: float) -> float | None:
    """The number that an environment variable holds; None where it is not set."""
    if not (text := os.environ.get(variable)):
        return None
    try:
        value = type(least)(text)
    except ValueError:
        value = math.nan
    if not least <= value < math.inf:
        raise UserError(f'{variable}={text}: give a {"whole " * isinstance(least, int)}number of at least {least:g}')
    return value


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
