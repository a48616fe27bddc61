"""Settings and flags that no grammar expects, and what they quote from files, end in one line that can be read."""

import pytest
from toy_runs import perl, toy

from perl_jax.cli import exits
from perl_jax.errors import UserError


@pytest.mark.parametrize(('value', 'line'), [
    ('[', "cannot read the value in 'BATCH_SIZE = ['"),
    ('"""', 'cannot read the value in \'BATCH_SIZE = """\''),
    ('[' * 300 + ']' * 300, 'BATCH_SIZE = [[[[[[[...]]]]]]]: give a whole number'),
    ('1e999', 'BATCH_SIZE = inf: give a finite number'),
    ('[1, -1e999]', 'BATCH_SIZE = [1, -inf]: give a finite number'),
])  # fmt: skip
def test_a_value_that_cannot_be_read(tmp_path, value, line):
    assert line in perl(*toy('sft', tmp_path / 'x', f'--gin.BATCH_SIZE={value}')).line
    assert not (tmp_path / 'x').exists()


@pytest.mark.parametrize(('argv', 'line'), [
    (['sample', '--model_dir=--'], "sample: argument --model_dir: '--' is no value"),
    (['average', '--model_dirs=a,b', '--model_dir=--'], "average: argument --model_dir: '--' is no value"),
    (['inspect', '--task=x', '--module='], "--module: no module named ''"),
    (['inspect', '--task=x', '--module=.x'], "--module: no module named '.x'"),
    (['sft', '--gin_file=hf://'], "sft: File system scheme 'hf' not implemented"),
    (['sft', '--gin_file=gs://x'], "sft: GCS path doesn't contain an object name: gs://x"),
])  # fmt: skip
def test_a_flag_that_cannot_be_read(argv, line):
    assert line in perl(*argv).line


@pytest.mark.parametrize(('message', 'line'), [
    ('a\x1b[2Jb', 'a\\x1b[2Jb'),
    ('a\ud800', 'a\\ud800'),
    ('a\u2028b', 'a b'),
    ('x' * 100_000, 'x' * (exits.LONGEST - 300) + ' ... ' + 'x' * 300),
])  # fmt: skip
def test_what_a_message_quotes_is_shown_escaped_and_short(capsys, message, line):
    def command(argv):
        raise UserError(message)

    assert exits.run(command, 'x', [], is_main_program=False) == 2
    assert capsys.readouterr().err == f'perl_jax: {line}\n'
