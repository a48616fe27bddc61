"""The report's top: lead, headline figures and summary; also the names and line styles of runs."""

import collections
import statistics

from perl_jax.tools.report.formats import NONE, duration, esc, number, small_percent
from perl_jax.tools.report.metrics import TRUTH, present
from perl_jax.tools.report.reader import Run

NAMES = {'sft': 'SFT', 'reward': 'Reward model', 'policy': 'Policy'}
LONG_NAMES = NAMES | {'sft': 'Supervised fine-tuning (SFT)', 'policy': 'Policy (reinforcement learning)'}
PHASE_DESCRIPTIONS = {
    'sft': 'supervised fine-tuning (SFT) teaches a language model to imitate example answers',
    'reward': 'a reward model learns to score answers from preferences',
    'policy': 'reinforcement learning moves a policy towards answers that score higher, but not far from its start',
}
TUNINGS = {'lora': 'LoRA', 'full': 'full'}
TRAINED_PARTS = {'policy': 'policy + value'}  # phases that train several models
COOL_COLORS, WARM_COLORS = (0, 5, 2, 7), (1, 4, 3, 6)  # indices of the eight colours in style.py


def by_phase(runs: list[Run]) -> dict[str, list[Run]]:
    """Group the runs by phase, in the page's order."""
    return {phase: [run for run in runs if run.phase == phase] for phase in dict.fromkeys(run.phase for run in runs)}


def line_styles(runs: list[Run]) -> dict[str, dict]:
    """Choose a line style for each run's label.

    If a phase has both tunings, LoRA gets cool colours, full tuning gets warm colours and dashes.
    """
    styles = {}
    for group in by_phase(runs).values():
        has_both_tunings, color_counts = len({run.tuning for run in group}) > 1, collections.Counter()
        for run in group:
            dashed = has_both_tunings and run.tuning == 'full'
            colors = (WARM_COLORS if dashed else COOL_COLORS) if has_both_tunings else range(8)
            styles[run.label] = {'color': colors[color_counts[dashed] % len(colors)], 'dashed': dashed}
            color_counts[dashed] += 1
    return styles


def tuning_name(run: Run) -> str:
    """Return the tuning's display name: LoRA, full, or the value in run.json."""
    return TUNINGS.get(run.tuning, run.tuning)


def phase_name(phase: str, long: bool = False) -> str:
    """Return the phase's display name."""
    return (LONG_NAMES if long else NAMES).get(phase, phase.capitalize())


def lead(runs: list[Run]) -> str:
    """Return a sentence that explains the runs to newcomers, and one about the kinds of tuning."""
    sentences = [PHASE_DESCRIPTIONS.get(phase, f'a phase called {phase}') for phase in by_phase(runs)]
    last_description = {1: '', 2: ' and '}.get(len(sentences), ', and ') + sentences[-1]
    kinds = {run.tuning for run in runs}
    shares = [share for run in runs if run.tuning == 'lora' and (share := trained_share(run)) is not None]
    share_range = (
        ' to '.join(dict.fromkeys(small_percent(share) for share in (min(shares), max(shares)))) if shares else ''
    )
    share_note = f" ({share_range} of the base model's parameters)" if share_range else ''
    lora = f'LoRA trains small adapters{share_note} and leaves the base model as it is'
    full = 'full tuning trains every weight'
    tuning_note = '; '.join([lora] * ('lora' in kinds) + [full] * ('full' in kinds))
    subject = 'this run' if len(runs) == 1 else f'these {len(runs)} runs'
    text = f'In {subject}, {", ".join(sentences[:-1])}{last_description}.'
    return f'<p class="lead">{esc(text)}</p>' + (
        f'<p class="note">{esc(tuning_note[0].upper() + tuning_note[1:])}.</p>' if tuning_note else ''
    )


def run_name(run: Run) -> str:
    """Return the run's label and tuning as HTML."""
    tuning = f' <span class="soft">{esc(tuning_name(run))}</span>' if run.tuning else ''
    return f'{esc(run.label)}{tuning}'


def trained_share(run: Run) -> float | None:
    """Return the trainable parameters as a share of the base's; None if run.json lacks either."""
    try:
        return float(run.info['trainable_parameters']) / float(run.info['base_parameters'])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def tiles(runs: list[Run]) -> str:
    """Return the headline tiles: one per main metric of a single group, else one per phase and tuning."""
    groups = {}
    for run in runs:
        groups.setdefault((run.phase, run.tuning), []).append(run)
    if len(groups) == 1:
        tile_html = [
            _tile(metric.title, group, [metric]) for group in groups.values() for metric in _columns(group)[:4]
        ]
    else:
        tile_html = [
            _tile(f'{phase_name(phase)} · {tuning_name(group[0])}'.strip(' ·'), group, _columns(group)[:4])
            for (phase, _), group in groups.items()
        ]
    return f'<div class="tiles">{"".join(tile_html)}</div>' if tile_html else ''


def table(headings: list[str], rows: list[list[str]], kind: str) -> str:
    """Return an HTML table, which narrow screens show as cards.

    Args:
      headings: plain text.
      rows: HTML cells.
      kind: CSS classes.
    """
    header = ''.join(f'<th scope="col">{esc(text)}</th>' for text in headings)
    cells = [''.join(f'<td data-head="{esc(text)}">{cell}</td>' for text, cell in zip(headings, row)) for row in rows]
    body = ''.join(f'<tr>{row}</tr>' for row in cells)
    table_html = f'<thead><tr>{header}</tr></thead><tbody>{body}</tbody>'
    return f'<div class="scroll"><table class="{kind}">{table_html}</table></div>'


def summary(runs: list[Run]) -> str:
    """Return a table for each phase: what was trained, for how long, and the final and best values of its metrics."""
    styles = line_styles(runs)
    return ''.join(_phase_table(phase, group, styles) for phase, group in by_phase(runs).items())


def _columns(group):
    return [metric for metric in present(group) if metric.column]


def _tile(title, group, metrics):
    """Return a tile with the group's mean of the first metric in large and of the other metrics in small print."""
    values = [(metric, _start_value(metric, group) + value) for metric in metrics if (value := _mean(metric, group))]
    if not values:
        return ''
    (main, value), other_values = values[0], values[1:]
    details = [f'<span>{esc(metric.column)} <b>{text}</b></span>' for metric, text in other_values]
    if len(group) > 1:
        details.append(f'<span>{len(group)} runs, mean ± s.d.</span>')
    caption = main.title if main.title != title else main.unit
    name = f'<span class="what">{esc(caption + (", before → after" if _start_value(main, group) else ""))}</span>'
    top = f'<h3>{esc(title)}</h3><p class="value">{value}</p>{name}'
    return f'<div class="tile">{top}<p class="more">{"".join(details)}</p></div>'


def _mean(metric, group):
    values = [value for run in group if (value := metric.final(run)) is not None]
    if not values:
        return ''
    spread = f' <small>± {_spread(metric, values)}</small>' if len(values) > 1 else ''
    return metric.show(statistics.fmean(values)) + spread


def _spread(metric, values):
    deviation = statistics.stdev(values)
    return f'{100 * deviation:.1f}' if metric.share else number(deviation, 2)


def _start_value(metric, group):
    """Return '53.1% → ' if all runs of the group evaluated at step 0 and later; else ''."""
    values = [metric.start(run) for run in group if max(run.steps)]
    if not values or None in values:
        return ''
    return f'<span class="from">{metric.show(statistics.fmean(values))} →</span> '


def _phase_table(phase, group, styles):
    metrics = _columns(group)
    headings = ['Run', 'Tuning', 'Trainable', '% of base', 'Steps', 'Time'] + [metric.column for metric in metrics]
    rows = []
    for run in group:
        dot = f'<span class="dot c{styles[run.label]["color"]}"></span>'
        running = ' <span class="chip busy">running</span>' if run.running else ''
        count, share, time = run.info.get('trainable_parameters'), trained_share(run), run.info.get('seconds')
        cells = [
            dot + esc(run.label) + running,
            esc(tuning_name(run)) or NONE,
            _with_subtext(f'{count:,}', TRAINED_PARTS.get(phase)) if isinstance(count, int) else NONE,
            NONE if share is None else small_percent(share),
            f'{max(run.steps):,}',
            duration(time) if isinstance(time, (int, float)) else NONE,
        ]
        cells += [_result(metric, run) for metric in metrics]
        rows.append(cells)
    return f'<h3>{esc(phase_name(phase, long=True))}</h3>{table(headings, rows, "runs")}{_notes(phase, group)}'


def _notes(phase, group):
    sentences, samples = [], [len(run.last_samples()[1]) for run in group if run.samples]
    if any(_start_value(metric, group) for metric in _columns(group)):
        sentences.append('Before → after: at step 0 the policy is still the SFT model, its anchor.')
    if phase == 'policy':
        sentences.append("Trainable: the policy's parameters and those of its value baseline.")
    if samples and any(TRUTH.curves(run) for run in group):
        text = f'Truth: of one sampled answer to each of {min(samples):,} prompts, so with a standard error of up to'
        sentences.append(f'{text} {50 / min(samples) ** 0.5:.1f} points.')
    return f'<p class="note">{esc(" ".join(sentences))}</p>' if sentences else ''


def _result(metric, run):
    final, peak = metric.final(run), metric.peak(run)
    if final is None:
        return NONE
    final_text, best_text = metric.show(final), metric.show(peak[0]) if peak else ''
    best_text = best_text if best_text != final_text else ''
    final_text = f'{_start_value(metric, [run])}<span class="final">{final_text}</span>'
    return _with_subtext(final_text, f'best {best_text} at {peak[1]:,}' if best_text else '')


def _with_subtext(text, small):
    return text + (f'<span class="under">{esc(small)}</span>' if small else '')
