"""The launch scripts against stand-ins on PATH that note how they were called: what would reach the cloud."""

import os
import pathlib
import shlex
import shutil
import subprocess

import pytest

LAUNCH = pathlib.Path(__file__).parents[1] / 'launch'
NOTE = """#!/usr/bin/env bash
printf '%q ' "$(basename "$0")" "$@" >> "$CALLS"
echo >> "$CALLS"
[[ ! -t 0 && $1 == apply ]] && cat >> "$CALLS"
exit "${FAIL:-0}"
"""
RUN = ('policy', '--gin_file=recipes/toy_policy.gin', """--gin.MODEL_DIR='gs://b/it is'""")
ZONE = '--zone=us-west4-a'


@pytest.fixture
def call(tmp_path):
    """Run a script with stand-ins for the tools of the cloud: its result, and the calls as lists of words."""
    for name in ('gcloud', 'kubectl', 'xpk'):
        path = tmp_path / 'bin' / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(NOTE)
        path.chmod(0o755)
    log = tmp_path / 'calls'

    def run(script, *words, fail=0):
        log.write_text('')
        env = os.environ | {'PATH': f'{tmp_path}/bin:{os.environ["PATH"]}', 'CALLS': str(log), 'FAIL': str(fail)}
        result = subprocess.run(
            [LAUNCH / script, *words], env=env, cwd=tmp_path, capture_output=True, text=True,
            stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        return result, [shlex.split(line) for line in log.read_text().splitlines()]

    return run


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
    ('status', [], ['describe', 'me', ZONE, '--format=value(state.state)']),
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
    'flag': (['status', 'me', '--zonee=a'], "unknown flag '--zonee=a'"),
    'no run': (['run', 'me', ZONE], 'stands behind --'),
    'command': (['launch', 'me', ZONE], "no command is called 'launch'"),
    'bucket': (['collect', 'run', 'out'], 'collect gs://BUCKET/run DIR'),
}


@pytest.mark.parametrize('case', WRONG)
def test_errors_are_one_line(call, case):
    words, said = WRONG[case]
    result, calls = call('tpu.sh', *words)
    assert result.returncode == 2 and calls == []
    assert said in result.stderr and result.stderr.count('\n') == 1


def test_what_the_cloud_refuses_is_not_hidden(call):
    assert call('tpu.sh', 'status', 'me', ZONE, fail=3)[0].returncode == 3


def test_a_worker_goes_on_when_it_was_preempted_and_is_still_there(tmp_path):
    checkout = tmp_path / 'perl_jax'
    (checkout / 'launch').mkdir(parents=True)
    (checkout / '.venv/bin').mkdir(parents=True)
    shutil.copy(LAUNCH / 'worker.sh', checkout / 'launch')
    stand_in = checkout / '.venv/bin/perl_jax'
    stand_in.write_text(
        '#!/usr/bin/env bash\necho "$@" >> "$HOME/calls"\n[ $(wc -l < "$HOME/calls") -ge 3 ] || exit 75\n'
    )
    stand_in.chmod(0o755)
    result = subprocess.run(
        [checkout / 'launch/worker.sh', *RUN], env=os.environ | {'HOME': str(tmp_path)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0 and result.stdout.count('exit code 75') == 2
    assert (tmp_path / 'calls').read_text() == 3 * (' '.join([*RUN, '--distributed']) + '\n')


# Kubernetes.


def test_a_jobset(call):
    yaml = pytest.importorskip('yaml')
    flags = ('--image=i', '--type=v5litepod-16', '--slices=2', '--restarts=4')
    dry, calls = call('gke.sh', 'run', 'me', *flags, '--dry_run', '--', *RUN)
    assert dry.returncode == 0 and calls == []
    spec = yaml.safe_load(dry.stdout)
    (workers,) = spec['spec']['replicatedJobs']
    assert (spec['metadata']['name'], workers['replicas'], spec['spec']['failurePolicy']['maxRestarts']) == ('me', 2, 4)
    job = workers['template']['spec']
    assert job['parallelism'] == job['completions'] == 4
    pod = job['template']['spec']
    assert pod['nodeSelector']['cloud.google.com/gke-tpu-topology'] == '4x4'
    (container,) = pod['containers']
    assert container['args'] == [*RUN, '--distributed'] and container['resources']['limits'] == {'google.com/tpu': 4}
    result, calls = call('gke.sh', 'run', 'me', *flags, '--', *RUN)
    assert result.returncode == 0 and calls[0] == ['kubectl', 'apply', '-f', '-']


def test_xpk(call):
    flags = ('--image=i', '--type=v6e-16', '--xpk', '--cluster=c', ZONE)
    _, (line,) = call('gke.sh', 'run', 'me', *flags, '--', *RUN)
    assert line[:4] == ['xpk', 'workload', 'create', '--workload=me'] and '--num-slices=1' in line
    assert shlex.split(line[-1].removeprefix('--command=')) == ['perl_jax', *RUN, '--distributed']
    assert call('gke.sh', 'delete', 'me', '--xpk', '--cluster=c', ZONE)[1] == [
        ['xpk', 'workload', 'delete', '--workload=me', '--cluster=c', ZONE]
    ]


def test_logs_and_delete(call):
    assert call('gke.sh', 'logs', 'me')[1][0][:3] == ['kubectl', 'logs', '--follow']
    assert call('gke.sh', 'delete', 'me')[1] == [['kubectl', 'delete', 'jobset', 'me']]


@pytest.mark.parametrize(('words', 'said'), [
    (['run', 'me', '--image=i', '--type=v3-8', '--dry_run', '--', 'sft'], '--type=v3-8: give v4-'),
    (['run', 'me', '--type=v4-8', '--', 'sft'], '--image=... is missing'),
    (['run', 'me', '--image=i', '--type=v4-8'], 'stands behind --'),
    (['run', 'me', '--image=i', '--type=v4-8', '--xpk', '--', 'sft'], '--xpk needs --cluster'),
])  # fmt: skip
def test_errors_of_gke_are_one_line(call, words, said):
    result, calls = call('gke.sh', *words)
    assert result.returncode == 2 and calls == [] and said in result.stderr and result.stderr.count('\n') == 1
    assert not result.stdout


@pytest.mark.skipif(shutil.which('shellcheck') is None, reason='shellcheck is not installed')
def test_shellcheck():
    scripts = sorted(map(str, LAUNCH.glob('*.sh')))
    result = subprocess.run(['shellcheck', *scripts], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
