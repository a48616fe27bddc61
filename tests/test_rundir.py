import gc
import json
import math
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from perl_jax.errors import UserError
from perl_jax.runs import logs, rundir
from perl_jax.runs.rundir import RunDir

ABOUT = {
    'phase': 'reward',
    'tuning': 'lora',
    'trainable_parameters': 10,
    'base_parameters': 100,
    'base': {'path': 'random:0', 'fingerprint': 'abc'},
    'devices': 'cpu x 1',
}


def start(folder, first=0, total=6, period=2):
    rundir.check(str(folder), ABOUT)
    return RunDir(str(folder), ABOUT, first=first, total=total, log_period=period, config=f'# from {first}\n')


def lines(folder, name='metrics.jsonl'):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def metrics(step, **more):
    """What a learning step hands over: arrays on the device."""
    return {'loss/reward': jnp.float32(step), 'tokens': jnp.int32(100)} | more


def train(run, stop=None):
    """Steps until `stop`, with an evaluation every 3."""
    for step in run.steps():
        run.log(step + 1, metrics(step + 1), 8)
        if (step + 1) % 3 == 0:
            run.settle(flush=True)
            run.evaluated(step + 1, {'auc': step / 10}, [{'prompt': 'é', 'response': f'{step}'}])
        if step + 1 == stop:
            return
    run.close(finished=True)


def timeless(rows):
    return [{k: v for k, v in row.items() if not k.startswith('throughput/')} for row in rows]


UNBROKEN = [
    {'step': 2, 'phase': 'reward', 'loss/reward': 1.5},
    {'step': 3, 'phase': 'reward', 'loss/reward': 3.0},  # a window ends where a checkpoint is
    {'step': 3, 'phase': 'reward', 'eval/auc': 0.2},
    {'step': 4, 'phase': 'reward', 'loss/reward': 4.0},
    {'step': 6, 'phase': 'reward', 'loss/reward': 5.5},
    {'step': 6, 'phase': 'reward', 'eval/auc': 0.5},
]


def test_a_run_leaves_its_log(tmp_path):
    train(start(tmp_path))
    rows = lines(tmp_path)
    assert timeless(rows) == UNBROKEN
    assert lines(tmp_path, 'samples.jsonl') == [
        {'step': 3, 'phase': 'reward', 'prompt': 'é', 'response': '2'},
        {'step': 6, 'phase': 'reward', 'prompt': 'é', 'response': '5'},
    ]
    assert (tmp_path / 'config.gin').read_text() == '# from 0\n'
    about = rundir.read(str(tmp_path))
    assert ABOUT.items() <= about.items()
    assert about['finished'] >= about['started'] and about['seconds'] >= 0
    assert [p for p in os.listdir(tmp_path) if 'tfevents' in p]


def test_one_process_at_a_time_writes_to_a_folder(tmp_path):
    for _ in range(2):  # and then another may
        with rundir.locked(str(tmp_path / 'run')), rundir.locked(str(tmp_path / 'other')):
            both = pytest.raises(UserError, match="run': another process is writing there")
            with both, rundir.locked(str(tmp_path / 'run')):
                pytest.fail('both are in')
    assert not os.listdir(tmp_path / 'run')


def test_lines_that_no_run_wrote_are_dropped(tmp_path, caplog):
    train(start(tmp_path), stop=4)
    path = tmp_path / 'metrics.jsonl'
    path.write_text(path.read_text() + '\0\0\0\n[1]\n{"step": "x"}\n')
    start(tmp_path, first=3)
    assert timeless(lines(tmp_path)) == UNBROKEN[:3]


def test_the_peak_counts_programs_that_later_batches_needed(tmp_path):
    run = start(tmp_path, total=4)
    step = jax.jit(lambda x: x.T @ x)  # a program for each width, as there is for each fill
    kept = []
    for i, width in enumerate([8, 8, 1024, 8]):
        kept = [step(jnp.ones((8, width)))]
        run.log(i + 1, metrics(i + 1), 8)
    run.close(finished=True)
    memory = rundir.read(str(tmp_path))['memory']
    assert kept and memory['peak'] - memory['held'] >= 4 * 1024**2


def test_throughput_is_of_the_window(tmp_path):
    train(start(tmp_path))
    rows = [row for row in lines(tmp_path) if 'loss/reward' in row]
    for row in rows:
        examples, tokens = row['throughput/examples_per_second'], row['throughput/tokens_per_second']
        assert examples > 0 and tokens / examples == pytest.approx(100 / 8)
        assert 'tokens' not in row


@pytest.mark.parametrize('stop', [3, 4, 5])
def test_after_a_kill_the_log_is_that_of_an_unbroken_run(tmp_path, stop):
    train(start(tmp_path), stop)  # killed: never closed; the last checkpoint is of step 3
    with open(tmp_path / 'metrics.jsonl', 'a') as file:
        file.write('{"step": 5, "pha')
    again = start(tmp_path, first=3)
    assert timeless(lines(tmp_path)) == UNBROKEN[:3]
    train(again)
    assert timeless(lines(tmp_path)) == UNBROKEN
    assert [row['step'] for row in lines(tmp_path, 'samples.jsonl')] == [3, 6]
    assert (tmp_path / 'config.gin').read_text() == '# from 3\n'


def test_after_a_kill_before_the_first_checkpoint_nothing_is_left(tmp_path):
    run = start(tmp_path)
    run.evaluated(0, {'auc': 0.5})  # before training
    train(run, 2)
    train(start(tmp_path))
    assert timeless(lines(tmp_path)) == UNBROKEN


def test_an_evaluation_before_training_survives_a_restart(tmp_path):
    run = start(tmp_path)
    run.evaluated(0, {'auc': 0.5})
    train(run, 4)
    train(start(tmp_path, first=3))
    assert timeless(lines(tmp_path)) == [{'step': 0, 'phase': 'reward', 'eval/auc': 0.5}, *UNBROKEN]


def test_the_start_of_a_run_is_remembered(tmp_path):
    run = start(tmp_path)
    train(run, 3)
    run.close(finished=False)
    before = rundir.read(str(tmp_path))
    assert before['finished'] is None
    train(start(tmp_path, first=3))
    after = rundir.read(str(tmp_path))
    assert after['started'] == before['started'] and after['finished']
    assert after['seconds'] >= before['seconds']


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_the_run(tmp_path, value):
    run = start(tmp_path)
    run.log(1, metrics(1), 8)
    run.log(2, metrics(2) | {'loss/reward': jnp.float32(value)}, 8)
    with pytest.raises(UserError, match=f"loss/reward is {value} at step 2 of '{tmp_path}'"):
        run.log(3, metrics(3), 8)
    run.close(finished=False)
    assert rundir.read(str(tmp_path))['finished'] is None
    assert not (tmp_path / 'metrics.jsonl').exists()  # not even step 1, which was to share a line with step 2


def test_nothing_is_saved_of_a_step_that_is_no_number(tmp_path):
    """The loop calls flush before it saves; the pending step is the one to be saved."""
    run = start(tmp_path)
    run.log(1, metrics(1), 8)
    run.log(2, metrics(2, grad_norm=jnp.float32(math.nan)), 8)
    with pytest.raises(UserError, match='grad_norm is nan at step 2'):
        run.settle(flush=True)


def test_a_draft_of_events_that_a_killed_process_left_is_removed(tmp_path):
    train(start(tmp_path))
    (events,) = tmp_path.glob('events.out.tfevents.*')
    (tmp_path / f'{events.name}.tmp').write_bytes(events.read_bytes()[:40])
    logs.truncate_events(str(tmp_path), 2)
    assert [path.name for path in tmp_path.glob('events.out.tfevents.*')] == [events.name]


def test_the_first_step_is_looked_at_at_once(tmp_path):
    run = start(tmp_path)
    with pytest.raises(UserError, match='grad_norm is nan at step 1'):
        run.log(1, metrics(1, grad_norm=jnp.float32(math.nan)), 8)


def test_an_evaluation_that_is_no_number_stops_the_run(tmp_path):
    run = start(tmp_path)
    with pytest.raises(UserError, match='eval/auc is nan at step 3'):
        run.evaluated(3, {'auc': math.nan})
    run.close(finished=False)


# Whose folder it is.


def test_a_folder_of_the_same_run_is_taken_up(tmp_path):
    rundir.check(str(tmp_path / 'new'), ABOUT)
    train(start(tmp_path))
    rundir.check(str(tmp_path), ABOUT | {'devices': 'TPU v5e x 4', 'base_parameters': 1})


@pytest.mark.parametrize('other', [
    {'phase': 'policy'}, {'tuning': 'full'}, {'trainable_parameters': 11},
    {'base': {'path': 'random:0', 'fingerprint': 'abd'}},
], ids=['phase', 'tuning', 'size', 'base'])  # fmt: skip
def test_a_folder_of_another_run_is_refused_and_untouched(tmp_path, other):
    train(start(tmp_path))
    before = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    (key,) = other
    with pytest.raises(UserError, match=f'another {key}') as error:
        rundir.check(str(tmp_path), ABOUT | other)
    assert str(tmp_path) in str(error.value) and '\n' not in str(error.value)
    assert {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()} == before


def test_checkpoints_without_a_run_are_refused(tmp_path):
    (tmp_path / 'checkpoints' / '10').mkdir(parents=True)
    with pytest.raises(UserError, match='has checkpoints but no run.json'):
        rundir.check(str(tmp_path), ABOUT)


def test_a_base_that_has_moved_is_the_same_base(tmp_path):
    """The fingerprint says what a base is; its path only where it lay."""
    train(start(tmp_path))
    rundir.check(str(tmp_path), ABOUT | {'base': {'path': '/elsewhere', 'fingerprint': 'abc'}})


@pytest.mark.parametrize('text', ['', '{"phase": "rew'], ids=['empty', 'cut'])
def test_a_run_json_that_cannot_be_read_is_named(tmp_path, text):
    (tmp_path / 'run.json').write_text(text)
    with pytest.raises(UserError, match=r'run\.json'):
        rundir.check(str(tmp_path), ABOUT)


def test_a_kill_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / 'run.json'
    logs.replace(str(path), 'old')
    monkeypatch.setattr(os, 'replace', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        logs.replace(str(path), 'new')
    assert path.read_text() == 'old'


def test_a_folder_that_is_written_whole_leaves_others_alone(tmp_path):
    """Whatever its user calls his folders; what a killed process left is removed, what a living one writes is not."""
    host = socket.gethostname()
    dead = subprocess.Popen([sys.executable, '-c', ''])
    dead.wait()
    others = ['out.tmp', 'out.draft', f'out.{host}.{os.getppid()}.draft', f'out2.{host}.{dead.pid}.draft']
    for name in [*others, f'out.{host}.{dead.pid}.draft']:
        (tmp_path / name).mkdir()
        (tmp_path / name / 'mine').write_text('x')
    with pytest.raises(KeyError), rundir.complete_folder(str(tmp_path / 'out')) as folder:
        (pathlib.Path(folder) / 'half').write_text('')
        raise KeyError
    assert sorted(os.listdir(tmp_path)) == sorted(others)
    with rundir.complete_folder(str(tmp_path / 'out')) as folder:
        (pathlib.Path(folder) / 'whole').write_text('')
    assert sorted(os.listdir(tmp_path)) == sorted([*others, 'out']) and os.listdir(tmp_path / 'out') == ['whole']
    assert all((tmp_path / name / 'mine').exists() for name in others)


def test_a_resumed_run_has_each_event_once(tmp_path):
    """TensorBoard reads every file of the folder, also that of the killed process with its broken last record."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    train(start(tmp_path), stop=5)
    gc.collect()
    (events,) = tmp_path.glob('events.out.tfevents.*')
    with events.open('ab') as file:
        file.write(b'half a record')
    train(start(tmp_path, first=3))
    seen = [
        (value.tag, event.step)
        for path in tmp_path.glob('events.out.tfevents.*')
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
    ]
    assert len(seen) == len(set(seen)) and {step for _, step in seen} == {row['step'] for row in lines(tmp_path)}
