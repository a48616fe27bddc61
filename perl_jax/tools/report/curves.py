"""The report's curves: every metric over the steps, and reward and truth over the KL to the anchor."""

import numpy as np

from perl_jax.tools.report import plots
from perl_jax.tools.report.formats import esc, plural
from perl_jax.tools.report.metrics import KL, REWARD, TRUTH, Metric, others, present, smooth
from perl_jax.tools.report.overview import by_phase, line_styles, phase_name, run_name
from perl_jax.tools.report.reader import Run


def curves(runs: list[Run]) -> str:
    """Return the panels of each phase under one legend, with unknown metrics in a collapsible section."""
    styles, sections = line_styles(runs), []
    for phase, group in by_phase(runs).items():
        panels = ''.join(_panel(metric, group, styles) for metric in present(group))
        other_panels = [_panel(metric, group, styles) for metric in others(group)]
        layout_class = ' many' if len(group) > 3 else ''
        legend_html = legend(group, styles, 'dots: evaluations; faint lines: as logged, before smoothing')
        sections.append(
            f'<h3>{esc(phase_name(phase, long=True))}</h3>{legend_html}<div class="grid{layout_class}">{panels}</div>'
        )
        if other_panels:
            name = plural(len(other_panels), 'other logged number')
            sections.append(
                f'<details><summary>{name}</summary><div class="grid">{"".join(other_panels)}</div></details>'
            )
    return ''.join(sections)


def reward_against_kl(runs: list[Run]) -> str:
    """Return plots of reward and truth over KL for the policy runs; '' if none logged both a reward and a KL."""
    styles, rewards, truths = line_styles(runs), [], []
    group = [run for run in runs if 'train' in REWARD.curves(run) and 'train' in KL.curves(run)]
    for run in group:
        steps, kl = KL.curves(run)['train']
        score = np.interp(steps, *REWARD.curves(run)['train'])
        rewards.append(plots.Line(run.label, kl, score, kind='dots', **styles[run.label]))
        path, start = (smooth(kl), smooth(score)), REWARD.start(run)
        if start is not None:  # at step 0 the policy is the anchor
            path = np.append(0.0, path[0]), np.append(start, path[1])
        rewards.append(plots.Line(run.label, *path, kind='path', **styles[run.label]))
        if 'eval' in TRUTH.curves(run):
            eval_steps, truth = TRUTH.curves(run)['eval']
            eval_kl = np.where(eval_steps > 0, np.interp(eval_steps, steps, smooth(kl)), 0.0)
            truths.append(plots.Line(run.label, eval_kl, truth, kind='eval', **styles[run.label]))
    if not rewards:
        return ''
    explanation = (
        'How much reward each step away from the anchor buys. Where the reward still climbs while the truth falls, the '
        'policy over-optimises: it has learned the flaws of the reward model.'
    )
    axis = 'KL to the anchor (nats per answer)'
    svg = plots.plot(rewards, 'Reward over KL', axis, plots.WIDE)
    note = 'A dot for each logged step; the line is smoothed, starts at the anchor and ends in the large dot.'
    figures = _figure('Reward over KL', REWARD.unit, note, svg)
    if truths:
        svg = plots.plot(truths, 'Truth over KL', axis, plots.WIDE, share=True)
        figures += _figure('Truth over KL', TRUTH.unit, 'A dot for each evaluation.', svg)
    return f'<p class="note">{explanation}</p>{legend(group, styles)}<div class="grid wide">{figures}</div>'


def legend(group: list[Run], styles: dict[str, dict], note: str = '') -> str:
    """Return a legend with the line, label and tuning of each run, and a note on the other marks."""
    items = ''.join(
        f'<li><svg class="key" viewBox="0 0 26 10" aria-hidden="true"><path class="smooth c{styles[run.label]["color"]}'
        f'{" dashed" if styles[run.label]["dashed"] else ""}" d="M1 5H25"/></svg>{run_name(run)}</li>'
        for run in group
    )
    return f'<ul class="legend">{items}' + (f'<li class="soft">{esc(note)}</li>' if note else '') + '</ul>'


def _panel(metric: Metric, group, styles):
    lines = []
    for run in group:
        run_curves, line_style = metric.curves(run), styles[run.label]
        if 'train' in run_curves:
            steps, values = run_curves['train']
            smoothed = smooth(values)
            lines.append(plots.Line(run.label, steps, smoothed, **line_style))
            if smoothed is not values:
                lines.append(plots.Line('', steps, values, kind='raw', **line_style))
        if 'eval' in run_curves:
            lines.append(plots.Line(f'{run.label}, evaluation', *run_curves['eval'], kind='eval', **line_style))
    svg = plots.plot(lines, metric.title, 'step', share=metric.share, zero=metric.zero)
    return _figure(metric.title, metric.unit, metric.note, svg)


def _figure(title, unit, note, svg):
    unit = f' <span class="soft">{esc(unit)}</span>' if unit else ''
    note = f'<p class="note">{esc(note)}</p>' if note else ''
    return f'<figure><figcaption><b>{esc(title)}</b>{unit}</figcaption>{svg}{note}</figure>'
