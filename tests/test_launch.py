"""launch/tpu.sh and worker.sh against stand-ins that note how they were called: what would reach the cloud."""

import base64
import os
import pathlib
import shlex
import shutil
import subprocess

import pytest
from stand_ins import LAUNCH, RUN, SECRET, ZONE, call  # noqa: F401

# ruff: noqa: F811 (a fixture is shared by importing it)


def tpu_vm(verb, *rest):
    return ['gcloud', 'compute', 'tpus', 'tpu-vm', verb, *rest, ZONE]


CASES = {
    'create': (
        ['--type=v5litepod-16'],
        tpu_vm('create', 'me', '--accelerator-type=v5litepod-16', '--version=v2-alpha-tpuv5-lite'),
    ),
    'status': ([], tpu_vm('describe', 'me', '--format=value(state)')),
    'logs': (['--worker=2'], tpu_vm('ssh', 'me', '--worker=2', '--command=tail -n 50 -F perl_jax.log')),
    'delete': ([], tpu_vm('delete', 'me', '--quiet')),
}  # fmt: skip


@pytest.mark.parametrize('command', CASES)
def test_each_command_is_one_call(call, command):
    flags, want = CASES[command]
    result, calls = call('tpu.sh', command, 'me', ZONE, *flags)
    assert result.returncode == 0, result.stderr
    assert calls == [want]
    assert call('tpu.sh', command, 'me', ZONE, '--project=p', *flags)[1] == [[*want, '--project=p']]


@pytest.mark.parametrize(('command', 'flags', 'rest'), [
    ('create', ['--type=v4-8', '--spot'],
     ['create', 'me', '--node-id=me', '--accelerator-type=v4-8', '--runtime-version=tpu-ubuntu2204-base', '--spot',
      ZONE]),
    ('status', [], ['describe', 'me', '--format=value(state.state)', ZONE]),
    ('delete', [], ['delete', 'me', '--force', '--quiet', ZONE]),
], ids=['create', 'status', 'delete'])  # fmt: skip
def test_a_queued_resource(call, command, flags, rest):
    _, calls = call('tpu.sh', command, 'me', ZONE, '--queued', *flags)
    assert calls == [['gcloud', 'compute', 'tpus', 'queued-resources', *rest]]


def test_install_copies_the_last_commit_to_every_worker(call):
    result, (copy, install) = call('tpu.sh', 'install', 'me', ZONE)
    assert result.returncode == 0, result.stderr
    assert copy[:5] == ['gcloud', 'compute', 'tpus', 'tpu-vm', 'scp'] and copy[6:] == [
        'me:perl_jax.tar.gz', '--worker=all', ZONE
    ]  # fmt: skip
    assert install[:6] == [*tpu_vm('ssh', 'me')[:-1], ]
    assert install[6] == '--worker=all' and '[tpu,hf,datasets]' in install[7]


def test_run_starts_the_worker_script_with_the_very_words(call):
    _, (ssh,) = call('tpu.sh', 'run', 'me', ZONE, '--', 'perl_jax', *RUN)
    assert ssh[6] == '--worker=all'
    words = shlex.split(ssh[7].removeprefix('--command='))
    assert words[: 3 + len(RUN)] == ['setsid', 'nohup', 'perl_jax/launch/worker.sh', *RUN]


def test_a_run_is_collected(call):
    result, calls = call('tpu.sh', 'collect', 'gs://b/run', 'out')
    assert calls == [['gcloud', 'storage', 'cp', '--recursive', 'gs://b/run', 'out']], result.stderr


@pytest.mark.parametrize('words', [
    ['create', 'me', ZONE, '--type=v6e-256', '--queued', '--spot'], ['install', 'me', ZONE],
    ['run', 'me', ZONE, '--', *RUN], ['stop', 'me', ZONE], ['collect', 'gs://b/run', 'out'],
], ids=lambda words: words[0])  # fmt: skip
def test_dry_run_prints_what_it_would_do_and_does_nothing(call, words):
    dry, calls = call('tpu.sh', *words[:2], '--dry_run', *words[2:])
    assert dry.returncode == 0 and calls == []
    printed = [shlex.split(line) for line in dry.stdout.splitlines()]
    _, done = call('tpu.sh', *words)
    mask = lambda line: [word for word in line if 'tar.gz' not in word]  # noqa: E731 (a temporary file's name)
    assert [mask(line) for line in printed if line[0] == 'gcloud'] == [mask(line) for line in done]


WRONG = {
    'no zone': (['create', 'me', '--type=v4-8'], '--zone=... is missing'),
    'no type': (['create', 'me', ZONE], '--type=... is missing'),
    'type': (['create', 'me', ZONE, '--type=v3-8'], '--type=v3-8: give v4-N'),
    'flag': (['status', 'me', '--zonee=a'], "unknown flag '--zonee'"),
    'no run': (['run', 'me', ZONE], 'comes after --'),
    'command': (['launch', 'me', ZONE], "no command is called 'launch'"),
    'bucket': (['collect', 'run', 'out'], 'collect gs://BUCKET/run DIR'),
    'ironwood': (['create', 'me', ZONE, '--type=tpu7x-8'], 'Ironwood is available on GKE only: launch/gke.sh run'),
    'renewed type': (['renew', 'me', ZONE, '--type=v3-8', '--queued'], '--type=v3-8: give v4-N'),
    'renewed slices': (['renew', 'me', ZONE, '--type=v4-8', '--slices=2'], 'several slices require --queued'),
    'slices': (['create', 'me', ZONE, '--type=v4-8', '--slices=2'], 'several slices require --queued'),
    'no number': (['status', 'me', ZONE, '--slices=two'], '--slices=two: give a number'),
    'word': (['create', 'me', ZONE, '--type=v4-8', '--', '--network', 'mine'], "'mine' is not a flag"),
    'no value': (['run', 'me', ZONE, '--env', 'HF_TOKEN', '--', 'sft'], '--env HF_TOKEN: there is no variable of that'),
    'no name': (['run', 'me', ZONE, '--env=HF-TOKEN=a', '--', 'sft'], '--env: give NAME or NAME=VALUE'),
    'line break': (['run', 'me', ZONE, '--env=A=b\nc', '--', 'sft'], '--env A: its value has a line break'),
    'no file': (['run', 'me', ZONE, '--env_file=no', '--', 'sft'], '--env_file=no: not a readable file'),
    'not for it': (['create', 'me', ZONE, '--type=v4-8', '--env=A=b'], 'create: --env and --env_file are for run'),
}


@pytest.mark.parametrize('case', WRONG)
def test_errors_are_one_line(call, case):
    words, said = WRONG[case]
    result, calls = call('tpu.sh', *words)
    assert result.returncode == 2 and calls == []
    assert said in result.stderr and result.stderr.count('\n') == 1


@pytest.mark.parametrize(('words', 'flags'), [
    (['create', 'me', ZONE, '--type=v4-8'], ['--network=mine', '--tags=a']),
    (['create', 'me', ZONE, '--type=v4-8', '--queued'], ['--valid-until-duration=6h']),
    (['logs', 'me', ZONE], ['--internal-ip']), (['stop', 'me', ZONE], ['--tunnel-through-iap']),
    (['install', 'me', ZONE], ['--tunnel-through-iap']), (['delete', 'me', ZONE], ['--async']),
    (['collect', 'gs://b/run', 'out'], ['--quiet']),
], ids=lambda words: words[0])  # fmt: skip
def test_further_flags_reach_gcloud(call, words, flags):
    plain, more = call('tpu.sh', *words)[1], call('tpu.sh', *words, '--', *flags)[1]
    mask = lambda line: [word for word in line if 'tar.gz' not in word]  # noqa: E731 (a temporary file's name)
    assert [mask(line) for line in more] == [[*mask(line), *flags] for line in plain] and plain


def test_further_flags_of_run_stand_before_its_words(call):
    plain = call('tpu.sh', 'run', 'me', ZONE, '--', *RUN)[1]
    assert call('tpu.sh', 'run', 'me', ZONE, '--', '--internal-ip', '--', *RUN)[1] == [[*plain[0], '--internal-ip']]


def test_variables_reach_the_workers_in_a_file(call, tmp_path):
    (tmp_path / 'more.env').write_text('# mine\n\nTASKMASTER_DIR=gs://b/data\nTLDR_SOURCE\r\nA=1\n')
    words = ('run', 'me', ZONE, '--env=A=0', '--env', 'HF_TOKEN', '--env_file=more.env', '--', *RUN)
    result, (scp, ssh) = call('tpu.sh', *words, HF_TOKEN=SECRET, TLDR_SOURCE='hub')
    assert result.returncode == 0, result.stderr
    assert scp[4:] == ['scp', scp[5], 'me:perl_jax.env', '--worker=all', ZONE]
    assert not pathlib.Path(scp[5]).exists()
    (copy,) = call.copies.iterdir()
    assert copy.stat().st_mode & 0o777 == 0o600
    want = f'A=1\nHF_TOKEN={SECRET}\nTASKMASTER_DIR=gs://b/data\nTLDR_SOURCE=hub\n'
    assert copy.read_text() == want
    line = shlex.split(ssh[7].removeprefix('--command='))
    assert line[2:4] == ['perl_jax/launch/worker.sh', '--env_file=perl_jax.env'] and line[4 : 4 + len(RUN)] == [*RUN]
    assert SECRET not in result.stdout + result.stderr + str([scp, ssh])


def test_a_dry_run_shows_the_names_of_variables_alone(call):
    flags = ('--dry_run', '--env', 'HF_TOKEN', '--env=A=x1y2', '--')
    gke = ('run', 'me', '--image=i', '--type=v4-16')
    for script, words in (('tpu.sh', ('run', 'me', ZONE)), ('gke.sh', gke),
                          ('gke.sh', (*gke, '--xpk', '--cluster=c', ZONE))):  # fmt: skip
        result, calls = call(script, *words, *flags, *RUN, HF_TOKEN='hf_secret')
        assert result.returncode == 0 and calls == [], result.stderr
        assert 'HF_TOKEN' in result.stdout
        encoded = base64.b64encode(b'hf_secret').decode()
        assert not [said for said in ('hf_secret', 'x1y2', encoded) if said in result.stdout + result.stderr]


# Several slices, spot machines.


def test_several_slices(call):
    flags = ('--queued', '--slices=2', ZONE)
    _, (create,) = call('tpu.sh', 'create', 'me', '--type=v5litepod-16', '--spot', *flags)
    assert create[3:] == [
        'queued-resources', 'create', 'me', '--node-count=2', '--node-prefix=me', '--accelerator-type=v5litepod-16',
        '--runtime-version=v2-alpha-tpuv5-lite', '--spot', ZONE,
    ]  # fmt: skip
    _, (scp, ssh) = call('tpu.sh', 'install', 'me', *flags)
    assert scp[3:5] == ['queued-resources', 'scp'] and scp[6:] == [
        'me:perl_jax.tar.gz', '--node=all', '--worker=all', ZONE,
    ]  # fmt: skip
    assert ssh[3:8] == ['queued-resources', 'ssh', 'me', '--node=all', '--worker=all']
    _, (logs,) = call('tpu.sh', 'logs', 'me', '--slice=1', '--worker=3', *flags)
    assert logs[3:8] == ['queued-resources', 'ssh', 'me', '--node=1', '--worker=3']
    assert call('tpu.sh', 'delete', 'me', '--slices=2', ZONE)[1] == [
        ['gcloud', 'compute', 'tpus', 'queued-resources', 'delete', 'me', '--force', '--quiet', ZONE]
    ]


ENDED = [('--queued', 'SUSPENDED'), ('--queued', 'FAILED'), ('--spot', 'PREEMPTED'), ('--spot', 'TERMINATED')]


@pytest.mark.parametrize(('flag', 'state'), ENDED)
def test_a_spot_machine_that_was_taken_is_renewed(call, flag, state):
    result, calls = call('tpu.sh', 'status', 'me', ZONE, flag, STATE=state)
    assert (result.returncode, result.stdout, len(calls)) == (75, f'{state}\n', 1)
    assert f'me is {state} and will not recover: renew it' in result.stderr and result.stderr.count('\n') == 1
    flags = ('--type=v5litepod-16', ZONE, flag, '--', '--network=mine')
    result, (describe, delete, create) = call('tpu.sh', 'renew', 'me', *flags, STATE=state)
    assert result.returncode == 0, result.stderr
    assert [line[4] for line in (describe, delete, create)] == ['describe', 'delete', 'create']
    assert create == call('tpu.sh', 'create', 'me', *flags)[1][0]
    assert '--network=mine' not in describe + delete


@pytest.mark.parametrize('state', ['ACTIVE', 'WAITING_FOR_RESOURCES', 'READY'])
def test_a_machine_that_is_there_is_not_renewed(call, state):
    assert call('tpu.sh', 'status', 'me', ZONE, STATE=state)[0].returncode == 0
    result, calls = call('tpu.sh', 'renew', 'me', ZONE, '--type=v4-8', '--queued', STATE=state)
    assert result.returncode == 2 and len(calls) == 1 and f'renew: me is {state}, and not SUSPENDED' in result.stderr


def test_what_the_cloud_refuses_is_not_hidden(call):
    assert call('tpu.sh', 'status', 'me', ZONE, fail=3)[0].returncode == 3


@pytest.fixture
def worker(tmp_path):
    """Run worker.sh in a checkout whose perl_jax notes its words and variables, and ends with these codes in turn."""
    checkout = tmp_path / 'perl_jax'
    (checkout / 'launch').mkdir(parents=True)
    (checkout / '.venv/bin').mkdir(parents=True)
    for name in ('worker.sh', 'env.sh'):
        shutil.copy(LAUNCH / name, checkout / 'launch')
    stand_in = checkout / '.venv/bin/perl_jax'

    def run(*words, codes=(0,)):
        stand_in.write_text(
            '#!/usr/bin/env bash\necho "$@" "${HF_TOKEN:-}" >> "$HOME/calls"\ncodes=($CODES)\n'
            'exit "${codes[$(wc -l < "$HOME/calls") - 1]}"\n'
        )
        stand_in.chmod(0o755)
        env = {'HOME': str(tmp_path), 'PATH': os.environ['PATH'], 'CODES': ' '.join(map(str, codes))}
        result = subprocess.run(
            [checkout / 'launch/worker.sh', *words], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        calls = tmp_path / 'calls'
        return result, calls.read_text().splitlines() if calls.exists() else []

    return run


def test_a_worker_goes_on_when_it_was_preempted_and_is_still_there(worker):
    result, calls = worker(*RUN, codes=(75, 75, 0))
    assert result.returncode == 0 and result.stdout.count('exit code 75') == 2
    assert calls == 3 * [' '.join([*RUN, '--distributed', ''])]


@pytest.mark.parametrize('code', [1, 2, 76])
def test_a_worker_ends_with_any_other_code(worker, code):
    result, calls = worker(*RUN, codes=(code, 0))
    assert result.returncode == code and len(calls) == 1


def test_a_worker_reads_variables_and_removes_their_file(worker, tmp_path):
    (tmp_path / 'perl_jax.env').write_text(f'HF_TOKEN={SECRET}\n')
    result, calls = worker('--env_file=perl_jax.env', '--env=OTHER=1', *RUN, codes=(75, 0))
    assert result.returncode == 0, result.stderr
    assert calls == 2 * [' '.join([*RUN, '--distributed', SECRET])]
    assert not (tmp_path / 'perl_jax.env').exists() and SECRET not in result.stdout + result.stderr
    (tmp_path / 'mine.env').write_text('HF_TOKEN=a\n')
    worker('--env_file=mine.env', *RUN)
    assert (tmp_path / 'mine.env').exists()


def test_a_file_of_variables_is_removed_whatever_is_in_it(worker, tmp_path):
    (tmp_path / 'perl_jax.env').write_text('A=s3cret\n1B=x\n')
    result, calls = worker('--env_file=perl_jax.env', *RUN)
    assert result.returncode == 2 and calls == [] and 's3cret' not in result.stderr
    assert not (tmp_path / 'perl_jax.env').exists()


def test_a_jobs_variables_are_not_the_scripts_own(worker):
    result, calls = worker('--env', 'checkout=/nowhere', '--env', 'code=75', '--env', 'HF_TOKEN=t', *RUN)
    assert result.returncode == 0 and calls == [' '.join([*RUN, '--distributed', 't'])]
    result, calls = worker('--env', 'UID=5', *RUN)
    assert result.returncode == 2 and len(calls) == 1  # only the first


@pytest.mark.parametrize(('words', 'said'), [
    ((), 'give a perl_jax command'), (('--envv=A=b', 'sft'), "unknown flag '--envv=A=b'"),
    (('--env', 'NO_SUCH', 'sft'), '--env NO_SUCH: there is no variable of that name here'),
    (('--env_file=bad.env', 'sft'), 'bad.env, line 2: give NAME or NAME=VALUE'),
])  # fmt: skip
def test_errors_of_a_worker_are_one_line(worker, tmp_path, words, said):
    (tmp_path / 'bad.env').write_text('A=b\nexport C=secret\n')
    result, calls = worker(*words)
    assert result.returncode == 2 and calls == [] and said in result.stderr and result.stderr.count('\n') == 1
    assert 'secret' not in result.stderr


@pytest.mark.skipif(shutil.which('shellcheck') is None, reason='shellcheck is not installed')
def test_shellcheck():
    scripts = sorted(map(str, LAUNCH.glob('*.sh')))
    result = subprocess.run(['shellcheck', *scripts], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
