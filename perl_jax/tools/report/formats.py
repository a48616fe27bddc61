"""Formats numbers, times and texts for the report: HTML-safe, with thousands separators and a typographic minus."""

import datetime
import html
import math

NONE = '<span class="none">–</span>'


def esc(text) -> str:
    """Escape any value for HTML content and quoted attributes."""
    return html.escape(str(text), quote=True)


def number(value: float, digits: int = 3) -> str:
    """Format a number with about `digits` significant digits: 12,345 · 123 · 6.31 · 0.0123 · −2.10 · 1.2e−5."""
    if not math.isfinite(value):
        return str(value)
    magnitude = abs(value)
    if magnitude and magnitude < 1e-3:
        text = f'{value:.{max(digits - 2, 0)}e}'.replace('e-0', 'e-')
    else:
        integer_digits = (
            len(str(int(magnitude))) if magnitude >= 1 else 1 - math.ceil(-math.log10(magnitude)) if magnitude else 1
        )
        text = f'{value:,.{min(max(digits - integer_digits, 0), 6)}f}'
    return text.replace('-', '−')


def score(value: float) -> str:
    """Format a score with two decimals, more if it is tiny: 3.14, −0.22, 0.013."""
    return f'{value:.2f}'.replace('-', '−') if not value or abs(value) >= 0.1 else number(value, 2)


def percent(share: float, digits: int = 1) -> str:
    """Format a share between 0 and 1 as a percentage: 91.2%."""
    return f'{100 * share:.{digits}f}%'.replace('-', '−')


def small_percent(share: float) -> str:
    """Format a share as a percentage with two significant digits below 10%: 0.087%, 1.2%, 100%."""
    return f'{100 * share:.2g}%' if share < 0.1 else f'{100 * share:.0f}%'


def duration(seconds: float) -> str:
    """Format a time span in its two largest units: 41 s, 3 min 12 s, 2 h 5 min, 1 d 4 h."""
    total = max(round(seconds), 0)
    for size, name, lower_size, lower_name in ((86400, 'd', 3600, 'h'), (3600, 'h', 60, 'min'), (60, 'min', 1, 's')):
        if total >= size:
            rest = total % size // lower_size
            return f'{total // size} {name}' + (f' {rest} {lower_name}' if rest else '')
    return f'{total} s'


def moment(text) -> str:
    """Format an ISO time as 12 Mar 2025, 14:05; other values are only escaped."""
    try:
        time = datetime.datetime.fromisoformat(str(text))
    except ValueError:
        return esc(text)
    suffix = ' UTC' if time.utcoffset() == datetime.timedelta(0) else ''
    return f'{time.day} {time:%b %Y, %H:%M}{suffix}'


def plural(count: int, noun: str) -> str:
    """Format a count with its noun: 1 run, 12 runs, 1,024 steps."""
    return f'{count:,} {noun}' + ('' if count == 1 else 's')
