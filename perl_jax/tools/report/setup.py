"""The report's lower half: the runs' configurations, differences first, and their environments."""

from perl_jax.tools.report.formats import NONE, esc, moment, plural
from perl_jax.tools.report.overview import by_phase, phase_name, table
from perl_jax.tools.report.reader import Run

SUMMARY = {'phase', 'tuning', 'trainable_parameters', 'base_parameters', 'seconds'}  # shown at the top of the page
SHOWN = SUMMARY | {'base', 'devices', 'started', 'finished'}


def differing(runs: list[Run]) -> list[str]:
    """Return the gin keys whose values differ between runs, or that only some runs of a phase have."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key != 'MODEL_DIR')
    return [key for key in keys if _differs(key, runs)]


def configuration(runs: list[Run]) -> str:
    """Return a table of the differing keys, then every config.gin in a collapsible section."""
    keys, differences = differing(runs), ''
    if keys:
        rows = [[f'<code>{_breakable(key)}</code>', *(_setting(run, key) for run in runs)] for key in keys]
        note = f'{plural(len(keys), "differing setting")}; – where a run lacks it.'
        differences = f'<p class="note">{note}</p>' + table(['Setting', *(run.label for run in runs)], rows, 'config')
    elif len(runs) > 1:
        differences = '<p class="note">The settings that runs share do not differ.</p>'
    config_folds = ''.join(
        f'<details class="fold"><summary>{esc(run.label)} <span class="soft">config.gin, '
        f'{plural(len(run.config), "setting")}</span></summary>'
        f'<pre>{esc(run.config_text.strip()) or "(not written)"}</pre></details>'
        for run in runs
    )
    explanation = 'Each config.gin is the operative configuration: the settings that took effect, with defaults.'
    return f'{differences}{config_folds}<p class="note">{explanation}</p>'


def environment(runs: list[Run]) -> str:
    """Return a table of base, devices, dates and other entries of run.json, and a warning if the bases differ."""
    scalar_types = (str, int, float)
    run_infos = [_flat_info(run.info) for run in runs]
    extra_keys = dict.fromkeys(
        key for info in run_infos for key, value in info.items() if key not in SHOWN and isinstance(value, scalar_types)
    )
    headings = ['Run', 'Base model', 'Fingerprint', 'Devices', 'Started', 'Finished', *extra_keys]
    rows = [
        _environment_cells(run) + [esc(info[key]) if key in info else NONE for key in extra_keys]
        for run, info in zip(runs, run_infos)
    ]
    warning = ''
    for phase, group in by_phase(runs).items():
        fingerprints = {base.get('fingerprint') for run in group if isinstance(base := run.info.get('base'), dict)}
        if len(fingerprints) > 1:
            text = f'The {phase_name(phase)} runs have different base models, so compare them with care.'
            warning += f'<p class="warn">{esc(text)}</p>'
    return warning + table(headings, rows, 'runs plain')


def _flat_info(info):
    memory = info.get('memory')
    memory_sizes = memory.items() if isinstance(memory, dict) else ()
    memory_rows = {
        f'memory, {name}': f'{size / 2**20:,.1f} MiB' for name, size in memory_sizes if isinstance(size, int)
    }
    return {key: value for key, value in info.items() if key != 'memory'} | memory_rows


def _environment_cells(run):
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
    runs_with_key = [run for run in runs if key in run.config]
    if len({run.config[key] for run in runs_with_key}) > 1 and len({_resolved(run, key) for run in runs_with_key}) > 1:
        return True
    phases_with_key = {run.phase for run in runs_with_key}
    return any(run.phase in phases_with_key and key not in run.config and run.config for run in runs)


def _breakable(key):
    return esc(key).replace('.', '.<wbr>').replace('/', '/<wbr>')


def _code(value):
    return f'<code>{_breakable(str(value))}</code>' if value else NONE


def _resolved(run, key):
    """Return the key's value, with macros (%NAME) resolved."""
    value = run.config[key]
    for _ in run.config:  # a macro may name another one
        value = run.config.get(value[1:], value) if value.startswith('%') else value
    return value


def _setting(run, key):
    return f'<code>{esc(_resolved(run, key))}</code>' if key in run.config else NONE
