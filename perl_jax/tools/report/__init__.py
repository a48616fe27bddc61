"""`perl_jax report RUN...`: one self-contained HTML page for a run, or for a comparison of several.

The page works offline: styles, plots (inline SVG) and a small script are embedded. It is made from the runs' folders
alone (reader.py describes their format), so it can be written while a run is in progress.
"""

import datetime
import os

from perl_jax import __version__
from perl_jax.errors import UserError
from perl_jax.tools.report import answers, curves, overview, reader, setup, style
from perl_jax.tools.report.formats import esc, plural
from perl_jax.tools.report.reader import Run

READING = (
    'How to read the numbers. The main value is the last evaluation or, for numbers that only training logs, the '
    'mean of the last tenth of the logged steps. Best is the best evaluation. '
    'Smoothed is a centred mean over a fifteenth of the points; the faint line behind is what was logged.'
)


def write(run_dirs: list[str], output: str | None = None) -> str:
    """Write the report of these runs.

    Args:
      run_dirs: folders of runs (MODEL_DIR), finished or in progress; each needs a metrics.jsonl.
      output: the page's path, or a folder for report.html. None is report.html in the run's folder or, for several
        runs, in their deepest common parent.

    Returns:
      The path of the page.

    Raises:
      UserError: a folder is not a run's, its metrics are empty, or the page cannot be written.
    """
    runs = reader.read([run_dirs] if isinstance(run_dirs, str) else list(run_dirs))
    if output is None:
        output = runs[0].folder if len(runs) == 1 else reader.common_parent([run.folder for run in runs])
    if os.path.isdir(output):
        output = os.path.join(output, 'report.html')
    text = page(runs)
    try:
        os.makedirs(os.path.dirname(os.path.abspath(output)), exist_ok=True)
        with open(output + '.partial', 'w', encoding='utf-8', errors='replace') as file:
            file.write(text)
        os.replace(output + '.partial', output)
    except OSError as error:
        raise UserError(f'{output} cannot be written ({error.strerror}): give another path with --output') from error
    return output


def page(runs: list[Run]) -> str:
    """Return the page as HTML."""
    parent = reader.common_parent([run.folder for run in runs])
    title = esc(runs[0].label if len(runs) == 1 else os.path.basename(parent) or 'Comparison')
    sections = [
        ('Summary', overview.summary(runs)),
        ('Curves', curves.curves(runs)),
        ('Reward and KL', curves.reward_against_kl(runs)),
        ('Answers', answers.answers(runs)),
        ('Configuration', setup.configuration(runs)),
        ('Environment', setup.environment(runs)),
    ]
    sections = [(name, name.lower().replace(' ', '-'), body) for name, body in sections if body]
    links = ''.join(f'<a href="#{anchor}">{name}</a>' for name, anchor, _ in sections)
    body = ''.join(f'<section id="{anchor}"><h2>{name}</h2>{text}</section>' for name, anchor, text in sections)
    top = [
        f'<p class="eyebrow">{_eyebrow(runs)}</p><h1>{title}</h1>',
        overview.lead(runs),
        _unreadable_lines_warning(runs),
        overview.tiles(runs),
    ]
    written = f'Written by perl_jax {__version__}, {datetime.datetime.now():%d %b %Y, %H:%M}.'
    foot = f'<p>{READING}</p><p>{written}</p>'
    return style.shell(title=title, head=''.join(top), links=links, body=body, foot=foot)


def _unreadable_lines_warning(runs):
    warnings = [
        f'{esc(run.label)}: {plural(run.broken, "line")} of its logs could not be read.' for run in runs if run.broken
    ]
    return ''.join(f'<p class="warn">{text}</p>' for text in warnings)


def _eyebrow(runs):
    phases = [overview.phase_name(phase) for phase in overview.by_phase(runs)]
    return f'perl_jax report · {esc(", ".join(phases))} · {plural(len(runs), "run")}'
