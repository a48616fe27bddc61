"""How the report writes numbers, times and texts: HTML-safe, thousands apart, a true minus, as few digits as say it."""

import datetime
import html
import math

NONE = '<span class="none">–</span>'


def esc(text) -> str:
    """Any value as text that is safe in HTML content and in a quoted attribute."""
    return html.escape(str(text), quote=True)


def number(value: float, digits: int = 3) -> str:
    """A number with about `digits` significant digits: 12,345 · 123 · 6.31 · 0.0123 · −2.10 · 1.2e−5."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size and size < 1e-3:
        text = f'{value:.{max(digits - 2, 0)}e}'.replace('e-0', 'e-')
    else:
        whole = len(str(int(size))) if size >= 1 else 1 - math.ceil(-math.log10(size)) if size else 1
        text = f'{value:,.{min(max(digits - whole, 0), 6)}f}'
    return text.replace('-', '−')


def score(value: float) -> str:
    """A score with two decimals, more if it is tiny: 3.14, −0.22, 0.013."""
    return f'{value:.2f}'.replace('-', '−') if not value or abs(value) >= 0.1 else number(value, 2)


def percent(share: float, digits: int = 1) -> str:
    """A share between 0 and 1 as a percentage: 91.2%."""
    return f'{100 * share:.{digits}f}%'.replace('-', '−')


def small_percent(share: float) -> str:
    """A share as a percentage with two significant digits below 10%: 0.087%, 1.2%, 100%."""
    return f'{100 * share:.2g}%' if share < 0.1 else f'{100 * share:.0f}%'


def duration(seconds: float) -> str:
    """A time span in its two largest units: 41 s, 3 min 12 s, 2 h 5 min, 1 d 4 h."""
    left = max(round(seconds), 0)
    for size, name, below, lower in ((86400, 'd', 3600, 'h'), (3600, 'h', 60, 'min'), (60, 'min', 1, 's')):
        if left >= size:
            rest = left % size // below
            return f'{left // size} {name}' + (f' {rest} {lower}' if rest else '')
    return f'{left} s'


def moment(text) -> str:
    """An ISO time as 12 Mar 2025, 14:05; anything else as it stands, escaped."""
    try:
        when = datetime.datetime.fromisoformat(str(text))
    except ValueError:
        return esc(text)
    zone = ' UTC' if when.utcoffset() == datetime.timedelta(0) else ''
    return f'{when.day} {when:%b %Y, %H:%M}{zone}'


def plural(count: int, noun: str) -> str:
    """1 run, 12 runs, 1,024 steps."""
    return f'{count:,} {noun}' + ('' if count == 1 else 's')
