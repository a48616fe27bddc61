"""Line plots as inline SVG; colours and fonts come from the page's CSS, which supports light and dark mode."""

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
    """One curve.

    Attributes:
      label: the run's label.
      x: float [n], n > 0.
      y: float [n].
      color: an index of the eight colours in style.py.
      kind: 'raw' (faint), 'smooth' (strong), 'eval' (thin, with a marker at each point), 'dots' (faint points without a
        line), 'path' (strong, not ordered by x, with a marker at the end).
      dashed: whether the line is dashed.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    color: int = 0
    kind: str = 'smooth'
    dashed: bool = False


def ticks(low: float, high: float, target_count: int = 5) -> list[float]:
    """Return about `target_count` round positions (1, 2, 2.5 or 5 times a power of ten) within [low, high]."""
    raw_step = (high - low) / target_count
    power = 10.0 ** math.floor(math.log10(raw_step))
    step = next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= raw_step * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def y_limits(lines: list[Line], share: bool = False, zero: bool = False) -> tuple[float, float]:
    """Return y limits with a margin that show all strong lines and the central 98% of the raw points.

    Args:
      lines: the curves.
      share: whether to stay within 0 and 1.
      zero: whether to start at 0 if no value is negative.
    """
    strong_values = [line.y for line in lines if line.kind not in ('raw', 'dots')]
    faint_ranges = [np.quantile(line.y, (0.01, 0.99)) for line in lines if line.kind in ('raw', 'dots')]
    values = np.concatenate(strong_values + faint_ranges)
    low, high = float(values.min()), float(values.max())
    if zero and low >= 0:
        low = 0.0
    if high - low < 1e-9 * max(abs(high), 1e-3):
        pad = 0.05 if share else abs(high) * 0.1 or 1.0
        low, high = low - (0 if zero else pad), high + pad
    margin = 0.06 * (high - low)
    low, high = (low if zero and low == 0 else low - margin), high + margin
    return (max(low, 0.0), min(high, 1.0)) if share else (low, high)


def plot(lines: list[Line], name: str, x_title: str, size=SIZE, share: bool = False, zero: bool = False) -> str:
    """Draw the lines over common axes as SVG.

    Args:
      lines: the curves.
      name: the label for screen readers.
      x_title: the label of the x axis.
      size: width and height of the view box.
      share: see `y_limits`.
      zero: see `y_limits`.
    """
    x0, x1 = x_limits(lines)
    y0, y1 = y_limits(lines, share, zero)
    y_ticks = ticks(y0, y1)
    y_labels = tick_labels(y_ticks, share)
    left = 12 + 6.3 * max(map(len, y_labels), default=1)
    right, bottom = size[0] - RIGHT, size[1] - BOTTOM
    width, height = right - left, bottom - TOP

    def to_pixels(x, y):
        x_pixels = (np.asarray(x, float) - x0) / (x1 - x0) * width
        y_pixels = (1 - (np.asarray(y, float) - y0) / (y1 - y0)) * height
        return np.stack([x_pixels, y_pixels], -1)

    axes = []
    for value, text in zip(y_ticks, y_labels):
        y = TOP + to_pixels(x0, value)[1]
        axes.append(f'<path class="rule" d="M{left:.1f} {y:.1f}H{right}"/>')
        axes.append(f'<text class="tick" x="{left - 6:.1f}" y="{y + 3.8:.1f}" text-anchor="end">{text}</text>')
    x_ticks = ticks(x0, x1)
    for value, text in zip(x_ticks, tick_labels(x_ticks)):
        x = left + to_pixels(value, y0)[0]
        axes.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{text}</text>')
    axis_line = f'<path class="axis" d="M{left:.1f} {bottom}H{right}"/>'
    middle = left + width / 2
    title = f'<text class="tick" x="{middle:.1f}" y="{size[1] - 5}" text-anchor="middle">{esc(x_title)}</text>'
    order = {'raw': 0, 'dots': 0, 'smooth': 1, 'path': 1, 'eval': 2}
    lines = sorted(lines, key=lambda line: order[line.kind])
    curves_html = ''.join(_curve(line, to_pixels(line.x, line.y)) for line in lines)
    markers_html = ''.join(_markers(line, to_pixels(line.x, line.y)) for line in lines)
    box_attribute = f'data-box="{left:.1f},{TOP},{width:.1f},{height}"'  # the page's script needs it, and the limits
    return (
        f'<svg class="plot" viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{esc(name)}" {box_attribute} '
        f'data-x="{x0},{x1}" data-y="{y0},{y1}" data-share="{int(share)}" data-axis="{esc(x_title)}">'
        f'{"".join(axes)}{axis_line}{title}'
        f'<svg x="{left:.1f}" y="{TOP}" width="{width:.1f}" height="{height}" overflow="hidden">{curves_html}</svg>'
        f'<g transform="translate({left:.1f} {TOP})">{markers_html}</g></svg>'
    )


def x_limits(lines: list[Line]) -> tuple[float, float]:
    """Return the x range of all lines, from 0 if they begin near it; never empty."""
    xs = np.concatenate([line.x for line in lines])
    low, high = float(xs.min()), float(xs.max())
    if 0 < low <= 0.15 * high:
        low = 0.0
    if any(line.kind == 'dots' for line in lines):
        high += 0.02 * (high - low)  # so that the last dot is not clipped
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def tick_labels(values: list[float], share: bool = False) -> list[str]:
    """Format ticks with as many decimals as their step needs: 1,000 · 0.25 · −2 · 60%."""
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
    thinned = _extremes(points) if line.kind == 'raw' else points[_even_indices(len(points))]
    dash = ' dashed' if line.dashed and line.kind != 'raw' else ''
    path = ' '.join(f'{x:.2f},{y:.2f}' for x, y in thinned)
    return f'<polyline class="{line.kind} c{line.color}{dash}" data-label="{esc(line.label)}" points="{path}"/>'


def _markers(line, points):
    if line.kind not in ('eval', 'path') and not (line.kind == 'smooth' and len(points) == 1):
        return ''
    marked = points[-1:] if line.kind == 'path' else points[_even_indices(len(points), 60)]
    radius = 4.5 if line.kind == 'path' else 3.2
    circles = ''.join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>' for x, y in marked)
    return f'<g class="mark c{line.color}">{circles}</g>'


def _even_indices(num_points, limit=POINTS):
    """Return evenly spaced indices, including the first and the last."""
    return np.unique(np.linspace(0, num_points - 1, min(num_points, limit)).round().astype(int))


def _extremes(points):
    """Thin a curve to the minimum and maximum of each of POINTS/2 segments, which keeps its spikes."""
    if len(points) <= POINTS:
        return points
    kept_indices = set()
    for indices in np.array_split(np.arange(len(points)), POINTS // 2):
        kept_indices |= {indices[np.argmin(points[indices, 1])], indices[np.argmax(points[indices, 1])]}
    return points[sorted(kept_indices)]
