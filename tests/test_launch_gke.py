"""launch/gke.sh against stand-ins for kubectl and xpk, and what a JobSet of it does after each kind of failure."""

import base64
import pathlib
import re
import shlex

import pytest
from stand_ins import LAUNCH, RUN, SECRET, ZONE, call  # noqa: F401

from perl_jax.cli import exits
from perl_jax.parallel import survivor, topology

# ruff: noqa: F811 (a fixture is shared by importing it)


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
    assert result.returncode == 0 and calls == [['kubectl', 'apply', '-f', '-']]
    assert yaml.safe_load(call.stdin.read_text()) == spec
    _, calls = call('gke.sh', 'run', 'me', *flags, '--', '--namespace=n', '--', *RUN)
    assert calls == [['kubectl', 'apply', '-f', '-', '--namespace=n']]


@pytest.mark.parametrize('name', ['null', 'on', 'no', 'true'])
def test_a_name_is_a_name_in_yaml(call, name):
    yaml = pytest.importorskip('yaml')
    flags = (f'--image={name}', '--type=v4-8', f'--secret={name}', '--env=NO=1')
    dry, _ = call('gke.sh', 'run', name, *flags, '--dry_run', '--', *RUN)
    secret, spec = yaml.safe_load_all(dry.stdout)
    assert secret['metadata']['name'] == f'{name}-env' and list(secret['data']) == ['NO']
    assert spec['metadata']['name'] == name
    (workers,) = spec['spec']['replicatedJobs']
    (container,) = workers['template']['spec']['template']['spec']['containers']
    assert container['image'] == name and container['envFrom'][0] == {'secretRef': {'name': name}}


def verdict(spec, code, disrupted=False):
    """What becomes of a job set of which one pod fails: as its controller and that of jobs read the two policies."""
    (workers,) = spec['replicatedJobs']
    reason = message = None
    for i, rule in enumerate(workers['template']['spec']['podFailurePolicy']['rules']):
        assert rule['action'] == 'FailJob'
        if code in rule.get('onExitCodes', {}).get('values', ()):
            message = f'Container perl-jax for pod d/x failed with exit code {code} matching FailJob rule at index {i}'
        elif disrupted and {'type': 'DisruptionTarget', 'status': 'True'} in rule.get('onPodConditions', ()):
            message = f'Pod d/x has condition DisruptionTarget matching FailJob rule at index {i}'
        if message:
            reason = 'PodFailurePolicy'
            break
    for rule in spec['failurePolicy']['rules']:
        patterns = rule.get('onJobFailureMessagePatterns', [''])
        if reason in rule['onJobFailureReasons'] and any(re.search(pattern, message) for pattern in patterns):
            return rule['action']
    return 'RestartJobSet'  # counted: what the controller does by default


def test_what_a_jobset_does_after_a_failure(call):
    yaml = pytest.importorskip('yaml')
    dry, _ = call('gke.sh', 'run', 'me', '--image=i', '--type=v4-16', '--dry_run', '--', *RUN)
    spec = yaml.safe_load(dry.stdout)['spec']
    pod = spec['replicatedJobs'][0]['template']['spec']['template']['spec']
    assert pod['terminationGracePeriodSeconds'] == 300 and pod['restartPolicy'] == 'Never'
    assert verdict(spec, 2) == 'FailJobSet'
    uncounted = 'RestartJobSetAndIgnoreMaxRestarts'
    assert [verdict(spec, code) for code in (exits.PREEMPTED, survivor.LOST)] == [uncounted] * 2
    assert verdict(spec, 137, disrupted=True) == uncounted
    assert [verdict(spec, code) for code in (1, 20, 27, 134, 137)] == ['RestartJobSet'] * 5


def test_variables_of_a_jobset_are_a_secret(call):
    yaml = pytest.importorskip('yaml')
    flags = ('--image=i', '--type=v4-16', '--env', 'HF_TOKEN', '--env=A=', '--secret=mine')
    result, calls = call('gke.sh', 'run', 'me', *flags, '--', *RUN, HF_TOKEN=SECRET)
    assert result.returncode == 0 and calls == [['kubectl', 'apply', '-f', '-']], result.stderr
    secret, job = yaml.safe_load_all(call.stdin.read_text())
    assert (secret['kind'], secret['metadata']) == ('Secret', {'name': 'me-env'})
    assert {name: base64.b64decode(value or '').decode() for name, value in secret['data'].items()} == {
        'HF_TOKEN': SECRET, 'A': ''
    }  # fmt: skip
    (container,) = job['spec']['replicatedJobs'][0]['template']['spec']['template']['spec']['containers']
    assert container['envFrom'] == [{'secretRef': {'name': 'mine'}}, {'secretRef': {'name': 'me-env'}}]
    assert 'hf_' not in result.stdout + result.stderr + str(job)


SIZES = {
    'v4-256': ('4x4x8', 32), 'v4-512': ('4x8x8', 64), 'v5p-256': ('4x4x8', 32), 'v5p-512': ('4x8x8', 64),
    'tpu7x-8': ('2x2x1', 1), 'tpu7x-512': ('4x8x8', 64), 'v5litepod-4': ('2x2', 1), 'v6e-4': ('2x2', 1),
}  # fmt: skip


@pytest.mark.parametrize('kind', SIZES)
def test_sizes_of_a_jobset(call, kind):
    yaml = pytest.importorskip('yaml')
    dry, _ = call('gke.sh', 'run', 'me', '--image=i', f'--type={kind}', '--dry_run', '--', *RUN)
    job = yaml.safe_load(dry.stdout)['spec']['replicatedJobs'][0]['template']['spec']
    selector = job['template']['spec']['nodeSelector']
    assert (selector['cloud.google.com/gke-tpu-topology'], job['completions']) == SIZES[kind]


def test_every_mesh_file_has_a_type_with_its_topology(call):
    """gke.sh's table and gin/mesh are two lists of the same slices."""
    yaml = pytest.importorskip('yaml')
    for path in (LAUNCH.parent / 'gin/mesh').glob('*_*.gin'):
        kind, _, size = path.stem.partition('_')
        named = f'{"v5litepod" if kind == "v5e" else kind}-{size}'
        dry, _ = call('gke.sh', 'run', 'me', '--image=i', f'--type={named}', '--dry_run', '--', *RUN)
        assert dry.returncode == 0, dry.stderr
        job = yaml.safe_load(dry.stdout)['spec']['replicatedJobs'][0]['template']['spec']
        shape = job['template']['spec']['nodeSelector']['cloud.google.com/gke-tpu-topology']
        assert f"'{kind}:{shape}'" in path.read_text()
        (container,) = job['template']['spec']['containers']
        chips = job['completions'] * container['resources']['limits']['google.com/tpu']
        assert topology.parse(f'{kind}:{shape}').num_devices == chips * topology.CHIPS[kind].devices


def test_xpk(call):
    flags = ('--image=i', '--type=v6e-16', '--xpk', '--cluster=c', ZONE)
    _, (line,) = call('gke.sh', 'run', 'me', *flags, '--', *RUN)
    assert line[:4] == ['xpk', 'workload', 'create', '--workload=me'] and '--num-slices=1' in line
    assert {'--restart-on-exit-codes=75,76', '--termination-grace-period-seconds=300', '--max-restarts=10'} <= {*line}
    assert shlex.split(line[-1].removeprefix('--command=')) == ['exec', 'perl_jax', *RUN, '--distributed']
    _, (more,) = call('gke.sh', 'run', 'me', *flags, '--', '--priority=high', '--', *RUN)
    assert more == [*line[:-1], '--priority=high', line[-1]]
    assert call('gke.sh', 'delete', 'me', '--xpk', '--cluster=c', ZONE)[1] == [
        ['xpk', 'workload', 'delete', '--workload=me', '--cluster=c', ZONE]
    ]


def test_variables_reach_xpk_in_a_file(call):
    flags = ('--image=i', '--type=tpu7x-16', '--xpk', '--cluster=c', ZONE, '--env', 'HF_TOKEN', '--')
    result, (line,) = call('gke.sh', 'run', 'me', *flags, *RUN, HF_TOKEN='hf_secret')
    (copy,) = call.copies.iterdir()
    assert copy.read_text() == 'HF_TOKEN=hf_secret\n' and copy.stat().st_mode & 0o777 == 0o600
    assert f'--env-file={line[-3].partition("=")[2]}' == line[-3] and line[-2] == '--no-use-parallel-containers'
    assert not pathlib.Path(line[-3].partition('=')[2]).exists()
    assert 'hf_secret' not in result.stdout + result.stderr + str(line)
    result, calls = call('gke.sh', 'run', 'me', *flags, *RUN, HF_TOKEN=SECRET)
    assert result.returncode == 2 and calls == [] and 'XPK cannot pass values that contain' in result.stderr


def test_logs_and_delete(call):
    assert call('gke.sh', 'logs', 'me')[1][0][:3] == ['kubectl', 'logs', '--follow']
    assert call('gke.sh', 'delete', 'me')[1] == [
        ['kubectl', 'delete', 'jobset', 'me'], ['kubectl', 'delete', 'secret', 'me-env', '--ignore-not-found'],
    ]  # fmt: skip


@pytest.mark.parametrize(('words', 'said'), [
    (['run', 'me', '--image=i', '--type=v3-8', '--dry_run', '--', 'sft'], '--type=v3-8: give v4-'),
    (['run', 'me', '--type=v4-8', '--', 'sft'], '--image=... is missing'),
    (['run', 'me', '--image=i', '--type=v4-8'], 'comes after --'),
    (['run', 'me', '--image=i', '--type=v3-8', '--', 'sft'], '--type=v3-8: give v4-'),  # and nothing is applied
    (['run', 'me', '--image=i', '--type=v4-8', '--', 'sft', '--gin.X=a\nb'], 'an argument has a line break'),
    (['run', 'me', '--image=a: b', '--type=v4-8', '--', 'sft'], '--image=...: the name of an image'),
    (['run', 'me', '--image=i', '--type=v4-8', '--secret=', '--', 'sft'], '--secret=...: the name of a secret'),
    (['run', 'me', '--image=i', '--type=v4-8', '--secret=a}', '--', 'sft'], '--secret=...: the name of a secret'),
    (['run', 'me', '--image=i', '--type=v4-8', '--cluster=c', '--', 'sft'], '--cluster and --zone require --xpk'),
    (['delete', 'me', '--xpk'], '--xpk needs --cluster'),
    (['run', 'me', '--image=i', '--type=v4-8', '--env', 'type', '--', 'sft'], '--env: of a name in small letters give'),
    (['run', 'me', '--image=i', '--type=v4-8', '--env', 'RANDOM', '--', 'sft'], '--env RANDOM: there is no variable'),
    (['run', 'me', '--image=i', '--type=v4-8', '--xpk', '--', 'sft'], '--xpk needs --cluster'),
    (['run', 'me', '--image=i', '--type=v4-8', '--slices=2', '--', 'sft'], '--slices=2: v4-8 is one host'),
    (['run', 'me', '--image=i', '--type=v4-8', '--restarts=many', '--', 'sft'], '--restarts=many: give a number'),
    (['run', 'Me', '--image=i', '--type=v4-8', '--', 'sft'], "'Me': a name has at most 40 of a-z, 0-9 and -"),
    (['run', 'me', '--image=i', '--type=v4-8', '--env', 'NO_SUCH', '--', 'sft'], '--env NO_SUCH: there is no variable'),
    (['run', 'me', '--image=i', '--type=v4-8', '--xpk', '--cluster=c', '--zone=z', '--secret=s', '--', 'sft'],
     '--secret: XPK does not support secrets'),
    (['delete', 'me', '--env=A=b'], 'delete: variables are for run'),
])  # fmt: skip
def test_errors_of_gke_are_one_line(call, words, said):
    result, calls = call('gke.sh', *words)
    assert result.returncode == 2 and calls == [] and said in result.stderr and result.stderr.count('\n') == 1
    assert not result.stdout


@pytest.mark.parametrize('words', [('--env', 'hf_aBcDeF'), ('--env', 'A=1', 'HF=hf_aBcDeF'), ('--HF=hf_aBcDeF',)])
def test_what_may_be_a_secret_in_a_wrong_place_is_not_printed(call, tmp_path, words):
    (tmp_path / 'bare').write_text('hf_aBcDeF\n')
    for flags in words, (f'--env_file={tmp_path / "bare"}',):
        result, calls = call('gke.sh', 'run', 'me', '--image=i', '--type=v4-8', *flags, '--', *RUN)
        assert result.returncode == 2 and calls == [] and 'aBcDeF' not in result.stderr


def test_words_reach_the_pod_as_they_are(call):
    """Kubernetes would put the value of a variable in the place of $(NAME); an empty value is no null."""
    yaml = pytest.importorskip('yaml')
    words = ['sft', "--gin.X='$(HF_TOKEN) $$ $HOME'"]
    result, _ = call('gke.sh', 'run', 'me', '--image=i', '--type=v4-8', '--env', 'EMPTY=', '--', *words)
    assert result.returncode == 0, result.stderr
    secret, spec = yaml.safe_load_all(call.stdin.read_text())
    assert secret['data'] == {'EMPTY': ''}
    job = spec['spec']['replicatedJobs'][0]['template']['spec']
    args = job['template']['spec']['containers'][0]['args']
    assert [re.sub(r'\$\$', '$', word) for word in args] == [*words, '--distributed']
    assert not re.search(r'(?<!\$)(\$\$)*\$\(', args[1])


@pytest.mark.parametrize('script', ['gke.sh', 'tpu.sh'])
def test_help_ends_with_a_sentence(call, script):
    result, _ = call(script, 'run')
    assert result.returncode == 2 and result.stderr.strip().endswith('.')
