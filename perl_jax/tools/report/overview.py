"""The report's top: what the runs are, the headline figures and the summary; and how runs are named and drawn."""

import collections
import statistics

from perl_jax.tools.report.formats import NONE, duration, esc, number, small_percent
from perl_jax.tools.report.metrics import TRUTH, present
from perl_jax.tools.report.reader import Run

NAMES = {'sft': 'SFT', 'reward': 'Reward model', 'policy': 'Policy'}
LONG_NAMES = NAMES | {'sft': 'Supervised fine-tuning (SFT)', 'policy': 'Policy (reinforcement learning)'}
WHAT = {
    'sft': 'supervised fine-tuning (SFT) teaches a language model to imitate example answers',
    'reward': 'a reward model learns to score answers from preferences',
    'policy': 'reinforcement learning moves a policy towards answers that score higher, but not far from its start',
}
TUNINGS = {'lora': 'LoRA', 'full': 'full'}
TRAINED = {'policy': 'policy + value'}  # where a run trains more than one thing
COOL, WARM = (0, 5, 2, 7), (1, 4, 3, 6)  # of the eight colours in style.py


def by_phase(runs: list[Run]) -> dict[str, list[Run]]:
    """The runs of each phase, in the page's order."""
    return {phase: [run for run in runs if run.phase == phase] for phase in dict.fromkeys(run.phase for run in runs)}


def looks(runs: list[Run]) -> dict[str, dict]:
    """How each run's label is drawn; where LoRA meets full tuning, LoRA is in cool colours, full warm and dashed."""
    drawn = {}
    for group in by_phase(runs).values():
        mixed, used = len({run.tuning for run in group}) > 1, collections.Counter()
        for run in group:
            dashed = mixed and run.tuning == 'full'
            family = (WARM if dashed else COOL) if mixed else range(8)
            drawn[run.label] = {'color': family[used[dashed] % len(family)], 'dashed': dashed}
            used[dashed] += 1
    return drawn


def tuning_name(run: Run) -> str:
    """LoRA, full, or whatever else run.json says."""
    return TUNINGS.get(run.tuning, run.tuning)


def phase_name(phase: str, long: bool = False) -> str:
    """The phase as a heading."""
    return (LONG_NAMES if long else NAMES).get(phase, phase.capitalize())


def lead(runs: list[Run]) -> str:
    """What the page shows, in one sentence for a newcomer, and one more on the kinds of tuning."""
    told = [WHAT.get(phase, f'a phase called {phase}') for phase in by_phase(runs)]
    last = {1: '', 2: ' and '}.get(len(told), ', and ') + told[-1]
    kinds = {run.tuning for run in runs}
    shares = [share for run in runs if run.tuning == 'lora' and (share := trained_share(run)) is not None]
    span = ' to '.join(dict.fromkeys(small_percent(share) for share in (min(shares), max(shares)))) if shares else ''
    small = f" ({span} of the base model's parameters)" if span else ''
    lora = f'LoRA trains small adapters{small} and leaves the base model as it is'
    full = 'full tuning trains every weight'
    how = '; '.join([lora] * ('lora' in kinds) + [full] * ('full' in kinds))
    text = f'In {"this run" if len(runs) == 1 else f"these {len(runs)} runs"}, {", ".join(told[:-1])}{last}.'
    return f'<p class="lead">{esc(text)}</p>' + (f'<p class="note">{esc(how[0].upper() + how[1:])}.</p>' if how else '')


def run_name(run: Run) -> str:
    """The run's label and its tuning, in HTML."""
    tuning = f' <span class="soft">{esc(tuning_name(run))}</span>' if run.tuning else ''
    return f'{esc(run.label)}{tuning}'


def trained_share(run: Run) -> float | None:
    """Trained parameters as a share of the base's; None if run.json does not have both."""
    try:
        return float(run.info['trainable_parameters']) / float(run.info['base_parameters'])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def tiles(runs: list[Run]) -> str:
    """The headline: for a lone run a tile for each of its main metrics, else one for each phase and kind of tuning."""
    groups = {}
    for run in runs:
        groups.setdefault((run.phase, run.tuning), []).append(run)
    if len(groups) == 1:
        made = [_tile(metric.title, group, [metric]) for group in groups.values() for metric in _columns(group)[:4]]
    else:
        made = [
            _tile(f'{phase_name(phase)} · {tuning_name(group[0])}'.strip(' ·'), group, _columns(group)[:4])
            for (phase, _), group in groups.items()
        ]
    return f'<div class="tiles">{"".join(made)}</div>' if made else ''


def table(heads: list[str], rows: list[list[str]], kind: str) -> str:
    """An HTML table that a narrow screen shows as cards. heads: plain text. rows: HTML cells. kind: its CSS classes."""
    head = ''.join(f'<th scope="col">{esc(text)}</th>' for text in heads)
    cells = [''.join(f'<td data-head="{esc(text)}">{cell}</td>' for text, cell in zip(heads, row)) for row in rows]
    body = ''.join(f'<tr>{row}</tr>' for row in cells)
    inner = f'<thead><tr>{head}</tr></thead><tbody>{body}</tbody>'
    return f'<div class="scroll"><table class="{kind}">{inner}</table></div>'


def summary(runs: list[Run]) -> str:
    """A table for each phase: what was trained, for how long, and the final and best value of its metrics."""
    drawn = looks(runs)
    return ''.join(_phase_table(phase, group, drawn) for phase, group in by_phase(runs).items())


def _columns(group):
    return [metric for metric in present(group) if metric.column]


def _tile(title, group, metrics):
    """A headline value: the mean over the group's runs of the first metric, and the other metrics in small."""
    told = [(metric, _before(metric, group) + value) for metric in metrics if (value := _mean(metric, group))]
    if not told:
        return ''
    (main, value), rest = told[0], told[1:]
    small = [f'<span>{esc(metric.column)} <b>{text}</b></span>' for metric, text in rest]
    if len(group) > 1:
        small.append(f'<span>{len(group)} runs, mean ± s.d.</span>')
    what = main.title if main.title != title else main.unit
    name = f'<span class="what">{esc(what + (", before → after" if _before(main, group) else ""))}</span>'
    top = f'<h3>{esc(title)}</h3><p class="value">{value}</p>{name}'
    return f'<div class="tile">{top}<p class="more">{"".join(small)}</p></div>'


def _mean(metric, group):
    values = [value for run in group if (value := metric.final(run)) is not None]
    if not values:
        return ''
    spread = f' <small>± {_spread(metric, values)}</small>' if len(values) > 1 else ''
    return metric.show(statistics.fmean(values)) + spread


def _spread(metric, values):
    deviation = statistics.stdev(values)
    return f'{100 * deviation:.1f}' if metric.share else number(deviation, 2)


def _before(metric, group):
    """'53.1% → ' where all of the group's runs evaluated what they started as, and since; else ''."""
    values = [metric.start(run) for run in group if max(run.steps)]
    if not values or None in values:
        return ''
    return f'<span class="from">{metric.show(statistics.fmean(values))} →</span> '


def _phase_table(phase, group, drawn):
    metrics = _columns(group)
    heads = ['Run', 'Tuning', 'Trainable', '% of base', 'Steps', 'Time'] + [metric.column for metric in metrics]
    rows = []
    for run in group:
        dot = f'<span class="dot c{drawn[run.label]["color"]}"></span>'
        running = ' <span class="chip busy">running</span>' if run.running else ''
        count, share, time = run.info.get('trainable_parameters'), trained_share(run), run.info.get('seconds')
        cells = [
            dot + esc(run.label) + running,
            esc(tuning_name(run)) or NONE,
            _under(f'{count:,}', TRAINED.get(phase)) if isinstance(count, int) else NONE,
            NONE if share is None else small_percent(share),
            f'{max(run.steps):,}',
            duration(time) if isinstance(time, (int, float)) else NONE,
        ]
        cells += [_result(metric, run) for metric in metrics]
        rows.append(cells)
    return f'<h3>{esc(phase_name(phase, long=True))}</h3>{table(heads, rows, "runs")}{_notes(phase, group)}'


def _notes(phase, group):
    told, samples = [], [len(run.last_samples()[1]) for run in group if run.samples]
    if any(_before(metric, group) for metric in _columns(group)):
        told.append('Before → after: at step 0 the policy is still the SFT model, its anchor.')
    if phase == 'policy':
        told.append("Trainable: the policy's parameters and those of its value baseline.")
    if samples and any(TRUTH.curves(run) for run in group):
        text = f'Truth: of one sampled answer to each of {min(samples):,} prompts, so with a standard error of up to'
        told.append(f'{text} {50 / min(samples) ** 0.5:.1f} points.')
    return f'<p class="note">{esc(" ".join(told))}</p>' if told else ''


def _result(metric, run):
    final, peak = metric.final(run), metric.peak(run)
    if final is None:
        return NONE
    text, best = metric.show(final), metric.show(peak[0]) if peak else ''
    best = best if best != text else ''
    text = f'{_before(metric, [run])}<span class="final">{text}</span>'
    return _under(text, f'best {best} at {peak[1]:,}' if best else '')


def _under(text, small):
    return text + (f'<span class="under">{esc(small)}</span>' if small else '')
