"""launch/local_pod.sh and worker.sh with a stand-in for perl_jax: how processes end, and which a stop reaches."""

import os
import pathlib
import shutil
import signal
import subprocess
import time

import pytest
from stand_ins import LAUNCH, ZONE, call  # noqa: F401

# ruff: noqa: F811 (a fixture is shared by importing it)


@pytest.fixture
def checkout(tmp_path):
    """A checkout with launch/ and a perl_jax that runs the script `perl_jax.sh` beside it."""
    shutil.copytree(LAUNCH, tmp_path / 'launch')
    program = tmp_path / '.venv/bin/perl_jax'
    program.parent.mkdir(parents=True)
    last_flag = 'index=${@: -1}; index=${index#*index=}'
    program.write_text(f'#!/usr/bin/env bash\n{last_flag}\nsource "${{BASH_SOURCE[0]%/*}}/../../perl_jax.sh"\n')
    program.chmod(0o755)
    return tmp_path


def pod(checkout, script, count=3):
    (checkout / 'perl_jax.sh').write_text(script)
    environment = os.environ | {'GRACE': '1', 'LOGS': str(checkout / 'logs')}
    command = [checkout / 'launch/local_pod.sh', str(count), '--', 'perl_jax', 'sft']
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize(('script', 'code', 'named'), [
    ('exit 0', 0, None),
    ('[[ $index == 1 ]] && exit 3; exec sleep 60', 3, 'process 1 of 3 ended with exit code 3'),
    # Another dies of a signal while the first one's failure is waited out.
    ('[[ $index == 1 ]] && exit 3; [[ $index == 2 ]] && { sleep 0.3; kill -SEGV $$; }; exec sleep 60', 3, 'process 1'),
    ('[[ $index == 0 ]] && kill -KILL $$; exec sleep 60', 137, 'process 0 of 3 ended with exit code 137'),
    ('kill -SEGV $$', 139, 'of 3 ended with exit code 139'),
    ('[[ $index == 2 ]] && exit 75; sleep 0.2; exit 75', 75, None),
], ids=['none fails', 'one fails', 'and another dies', 'the first is killed', 'all die', 'preempted'])  # fmt: skip
def test_a_pod_ends_with_the_code_and_name_of_the_process_that_failed(checkout, script, code, named):
    start = time.monotonic()
    result = pod(checkout, script)
    assert result.returncode == code, result.stderr
    assert time.monotonic() - start < 15
    assert len(result.stderr.splitlines()) < 12
    assert (named or '') in result.stderr and ('ended with' in result.stderr) == (named is not None)


def test_a_stop_reaches_the_named_run_alone(checkout, call, tmp_path):
    """As launch/tpu.sh stop has every worker do it: another perl_jax of the machine goes on."""
    (checkout / 'perl_jax.sh').write_text("trap 'exit 75' TERM; touch ~/ready\nfor _ in {1..300}; do sleep 0.1; done\n")
    home = tmp_path / 'home'
    home.mkdir()
    environment = os.environ | {'HOME': str(home)}
    other = subprocess.Popen([checkout / '.venv/bin/perl_jax', 'eval'], env=os.environ | {'HOME': str(tmp_path)})
    worker = subprocess.Popen([checkout / 'launch/worker.sh', 'sft'], env=environment, stdout=subprocess.DEVNULL)
    try:
        while not (home / 'ready').exists():
            assert worker.poll() is None
            time.sleep(0.05)
        _, (ssh,) = call('tpu.sh', 'stop', 'me', ZONE)
        line = next(word for word in ssh if word.startswith('--command=')).removeprefix('--command=')
        subprocess.run(['bash', '-c', line], env=environment, cwd=home, check=True, timeout=10)
        assert worker.wait(timeout=10) == 75
        assert other.poll() is None and not (home / 'perl_jax.pid').exists()
    finally:
        for process in other, worker:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()


def test_a_stop_where_nothing_runs(call, tmp_path):
    _, (ssh,) = call('tpu.sh', 'stop', 'me', ZONE)
    line = next(word for word in ssh if word.startswith('--command=')).removeprefix('--command=')
    assert subprocess.run(['bash', '-c', line], cwd=tmp_path, timeout=10, check=False).returncode == 0
    assert pathlib.Path(tmp_path, 'perl_jax.stop').exists()
