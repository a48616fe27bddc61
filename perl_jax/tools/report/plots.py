"""Line plots as small inline SVG; colours and fonts come from the page's CSS and so follow light and dark mode."""

import dataclasses
import math

import numpy as np

from perl_jax.tools.report.formats import esc, number

SIZE = (420, 236)  # the view box, in units of about one pixel
WIDE = (590, 320)
TOP, RIGHT, BOTTOM = 12, 14, 38
POINTS = 240  # a curve is thinned to about this many points


@dataclasses.dataclass(frozen=True)
class Line:
    """One curve: x [n], y [n] float, n > 0.

    kind: 'raw' (faint), 'smooth' (strong), 'eval' (thin, with a marker at each point), 'dots' (faint points without a
    line), 'path' (strong, not in the order of x, with a marker at the end).
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    color: int = 0
    kind: str = 'smooth'
    dashed: bool = False


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round positions (1, 2, 2.5 or 5 times a power of ten) within [low, high], roughly `about` of them."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(place * step, 12) for place in range(first, math.floor(high / step + 1e-9) + 1)]


def y_limits(lines: list[Line], share: bool = False, zero: bool = False) -> tuple[float, float]:
    """Limits that show all of the strong lines and all but the wildest 2% of the raw points, with some air.

    share: stay within 0 and 1. zero: start at 0 if nothing is below it.
    """
    strong = [line.y for line in lines if line.kind not in ('raw', 'dots')]
    faint = [np.quantile(line.y, (0.01, 0.99)) for line in lines if line.kind in ('raw', 'dots')]
    values = np.concatenate(strong + faint)
    low, high = float(values.min()), float(values.max())
    if zero and low >= 0:
        low = 0.0
    if high - low < 1e-9 * max(abs(high), 1e-3):
        pad = 0.05 if share else abs(high) * 0.1 or 1.0
        low, high = low - (0 if zero else pad), high + pad
    air = 0.06 * (high - low)
    low, high = (low if zero and low == 0 else low - air), high + air
    return (max(low, 0.0), min(high, 1.0)) if share else (low, high)


def plot(lines: list[Line], name: str, x_title: str, size=SIZE, share: bool = False, zero: bool = False) -> str:
    """An SVG of the lines over common axes. name: what a screen reader says. x_title: the label under the x axis."""
    x0, x1 = x_limits(lines)
    y0, y1 = y_limits(lines, share, zero)
    y_ticks = ticks(y0, y1)
    y_labels = tick_labels(y_ticks, share)
    left = 12 + 6.3 * max(map(len, y_labels), default=1)
    right, bottom = size[0] - RIGHT, size[1] - BOTTOM
    width, height = right - left, bottom - TOP

    def place(x, y):
        across = (np.asarray(x, float) - x0) / (x1 - x0) * width
        down = (1 - (np.asarray(y, float) - y0) / (y1 - y0)) * height
        return np.stack([across, down], -1)

    axes = []
    for value, text in zip(y_ticks, y_labels):
        y = TOP + place(x0, value)[1]
        axes.append(f'<path class="rule" d="M{left:.1f} {y:.1f}H{right}"/>')
        axes.append(f'<text class="tick" x="{left - 6:.1f}" y="{y + 3.8:.1f}" text-anchor="end">{text}</text>')
    x_ticks = ticks(x0, x1)
    for value, text in zip(x_ticks, tick_labels(x_ticks)):
        x = left + place(value, y0)[0]
        axes.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{text}</text>')
    base = f'<path class="axis" d="M{left:.1f} {bottom}H{right}"/>'
    middle = left + width / 2
    title = f'<text class="tick" x="{middle:.1f}" y="{size[1] - 5}" text-anchor="middle">{esc(x_title)}</text>'
    order = {'raw': 0, 'dots': 0, 'smooth': 1, 'path': 1, 'eval': 2}
    lines = sorted(lines, key=lambda line: order[line.kind])
    drawn = ''.join(_curve(line, place(line.x, line.y)) for line in lines)
    marks = ''.join(_markers(line, place(line.x, line.y)) for line in lines)
    box = f'data-box="{left:.1f},{TOP},{width:.1f},{height}"'  # with the limits, what the page's script needs
    return (
        f'<svg class="plot" viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{esc(name)}" {box} '
        f'data-x="{x0},{x1}" data-y="{y0},{y1}" data-share="{int(share)}" data-axis="{esc(x_title)}">'
        f'{"".join(axes)}{base}{title}'
        f'<svg x="{left:.1f}" y="{TOP}" width="{width:.1f}" height="{height}" overflow="hidden">{drawn}</svg>'
        f'<g transform="translate({left:.1f} {TOP})">{marks}</g></svg>'
    )


def x_limits(lines: list[Line]) -> tuple[float, float]:
    """The x range of all lines, from 0 if they begin near it; never empty."""
    xs = np.concatenate([line.x for line in lines])
    low, high = float(xs.min()), float(xs.max())
    if 0 < low <= 0.15 * high:
        low = 0.0
    if any(line.kind == 'dots' for line in lines):
        high += 0.02 * (high - low)  # so that the last dot is whole
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def tick_labels(values: list[float], share: bool = False) -> list[str]:
    """The ticks with as many decimals as their step needs: 1,000 · 0.25 · −2 · 60%."""
    if len(values) < 2:
        return [f'{100 * value:.0f}%' if share else number(value) for value in values]
    step = (values[1] - values[0]) * (100 if share else 1)
    decimals = next((n for n in range(7) if abs(step * 10**n - round(step * 10**n)) < 1e-6 * 10**n * step), 7)
    texts = [f'{value * (100 if share else 1):,.{decimals}f}' for value in values]
    return [text.replace('-', '−') + ('%' if share else '') for text in texts]


def _curve(line, points):
    if line.kind == 'dots':
        points = points[:: max(len(points) // POINTS, 1)]
        circles = ''.join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="1.9"/>' for x, y in points)
        return f'<g class="dots c{line.color}">{circles}</g>'
    thin = _extremes(points) if line.kind == 'raw' else points[_spaced(len(points))]
    dash = ' dashed' if line.dashed and line.kind != 'raw' else ''
    path = ' '.join(f'{x:.2f},{y:.2f}' for x, y in thin)
    return f'<polyline class="{line.kind} c{line.color}{dash}" data-label="{esc(line.label)}" points="{path}"/>'


def _markers(line, points):
    if line.kind not in ('eval', 'path') and not (line.kind == 'smooth' and len(points) == 1):
        return ''
    chosen = points[-1:] if line.kind == 'path' else points[_spaced(len(points), 60)]
    radius = 4.5 if line.kind == 'path' else 3.2
    circles = ''.join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>' for x, y in chosen)
    return f'<g class="mark c{line.color}">{circles}</g>'


def _spaced(count, limit=POINTS):
    """Evenly spread places, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(int))


def _extremes(points):
    """The lowest and the highest point of each of POINTS/2 stretches: as ragged as the whole curve, but small."""
    if len(points) <= POINTS:
        return points
    keep = set()
    for stretch in np.array_split(np.arange(len(points)), POINTS // 2):
        keep |= {stretch[np.argmin(points[stretch, 1])], stretch[np.argmax(points[stretch, 1])]}
    return points[sorted(keep)]
