"""The report's lower half: the runs' configuration, first what differs between them, and where they ran."""

from perl_jax.tools.report.formats import NONE, esc, moment, plural
from perl_jax.tools.report.overview import by_phase, phase_name, table
from perl_jax.tools.report.reader import Run

SUMMARY = {'phase', 'tuning', 'trainable_parameters', 'base_parameters', 'seconds'}  # shown at the top of the page
SHOWN = SUMMARY | {'base', 'devices', 'started', 'finished'}


def differing(runs: list[Run]) -> list[str]:
    """The gin keys on whose value runs disagree, and those that some runs of a phase have and others of it lack."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key != 'MODEL_DIR')
    return [key for key in keys if _differs(key, runs)]


def configuration(runs: list[Run]) -> str:
    """The differing keys of several runs in a table, then every config.gin in a fold."""
    keys, top = differing(runs), ''
    if keys:
        rows = [[f'<code>{_breakable(key)}</code>', *(_setting(run, key) for run in runs)] for key in keys]
        note = f'{plural(len(keys), "setting")} on which runs differ; – where a run does not have it.'
        top = f'<p class="note">{note}</p>' + table(['Setting', *(run.label for run in runs)], rows, 'config')
    elif len(runs) > 1:
        top = '<p class="note">No setting that runs share differs between them.</p>'
    folds = ''.join(
        f'<details class="fold"><summary>{esc(run.label)} <span class="soft">config.gin, '
        f'{plural(len(run.config), "setting")}</span></summary>'
        f'<pre>{esc(run.config_text.strip()) or "(not written)"}</pre></details>'
        for run in runs
    )
    text = 'Each config.gin is the operative configuration: the settings that took effect, with defaults.'
    return f'{top}{folds}<p class="note">{text}</p>'


def environment(runs: list[Run]) -> str:
    """Base model, devices and dates of each run, and whatever else run.json holds; a warning if the bases differ."""
    plain = (str, int, float)
    found = [_flat(run.info) for run in runs]
    extra = dict.fromkeys(
        key for info in found for key, value in info.items() if key not in SHOWN and isinstance(value, plain)
    )
    heads = ['Run', 'Base model', 'Fingerprint', 'Devices', 'Started', 'Finished', *extra]
    rows = [_where(run) + [esc(info[key]) if key in info else NONE for key in extra] for run, info in zip(runs, found)]
    warning = ''
    for phase, group in by_phase(runs).items():
        prints = {base.get('fingerprint') for run in group if isinstance(base := run.info.get('base'), dict)}
        if len(prints) > 1:
            text = f'The {phase_name(phase)} runs stand on different base models, so compare them with care.'
            warning += f'<p class="warn">{esc(text)}</p>'
    return warning + table(heads, rows, 'runs plain')


def _flat(info):
    memory = info.get('memory')
    sizes = memory.items() if isinstance(memory, dict) else ()
    found = {f'memory, {name}': f'{size / 2**20:,.1f} MiB' for name, size in sizes if isinstance(size, int)}
    return {key: value for key, value in info.items() if key != 'memory'} | found


def _where(run):
    base, info = run.info.get('base'), run.info
    base = base if isinstance(base, dict) else {'path': base}
    running = '<span class="chip busy">running</span>' if run.running else NONE
    return [
        esc(run.label),
        _code(base.get('path')),
        _code(base.get('fingerprint')),
        esc(info.get('devices') or '') or NONE,
        moment(info['started']) if info.get('started') else NONE,
        moment(info['finished']) if info.get('finished') else running,
    ]


def _differs(key, runs):
    having = [run for run in runs if key in run.config]
    if len({run.config[key] for run in having}) > 1 and len({_resolved(run, key) for run in having}) > 1:
        return True
    setters = {run.phase for run in having}
    return any(run.phase in setters and key not in run.config and run.config for run in runs)


def _breakable(key):
    return esc(key).replace('.', '.<wbr>').replace('/', '/<wbr>')


def _code(value):
    return f'<code>{_breakable(str(value))}</code>' if value else NONE


def _resolved(run, key):
    """The key's value; where that is a macro (%NAME), the macro's."""
    value = run.config[key]
    for _ in run.config:  # a macro may name another one
        value = run.config.get(value[1:], value) if value.startswith('%') else value
    return value


def _setting(run, key):
    return f'<code>{esc(_resolved(run, key))}</code>' if key in run.config else NONE
