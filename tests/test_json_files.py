"""JSON of a right syntax and a wrong type, and damaged JSON: one line that names the file and the key."""

import json
from collections.abc import Mapping
from typing import Literal

import numpy as np
import pytest
from safetensors.numpy import save_file

from perl_jax import json_files
from perl_jax.errors import UserError
from perl_jax.interop import hf_config, peft_config, safetensors
from perl_jax.runs import logs, rundir
from perl_jax.settings import Layers
from perl_jax.tokenizers import tokenizer_files

DEEP = b'[' * 100_000
RUN = {'phase': 'sft', 'base': {'path': 'x', 'fingerprint': 'y'}}
READERS = {
    'config.json': hf_config.read,
    'adapter_config.json': peft_config.read,
    'model.safetensors.index.json': safetensors.entries,
    'tokenizer_config.json': lambda folder: tokenizer_files.read_metadata(folder / 'tokenizer.json'),
    'run.json': lambda folder: rundir.require(str(folder)),
}


def line_of(read, *arguments):
    """The line that a UserError is said in."""
    with pytest.raises(UserError) as error:
        read(*arguments)
    assert '\n' not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize('name', READERS)
@pytest.mark.parametrize(('content', 'problem'), [
    (b'', 'not JSON (Expecting value: line 1 column 1 (char 0))'),
    (b'\xff{}', "not JSON ('utf-8' codec can't decode byte 0xff in position 0: invalid start byte)"),
    (DEEP, 'not JSON (it is nested too deeply)'),
    (b'{"a": {"b": [1, NaN]}}', 'not JSON (a.b = nan: give a finite number)'),
    (b'{"a": 1e999}', 'not JSON (a = inf: give a finite number)'),
    (b'{"a": "\\ud800"}', "not JSON ('utf-8' codec can't encode character '\\ud800' in position 0: surrogates not"),
    (b'[]', 'not an object of JSON'), (b'null', 'not an object of JSON'),
], ids=range(8))  # fmt: skip
def test_a_damaged_file_is_named(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content)
    assert f'{tmp_path / name}: {problem}' in line_of(READERS[name], tmp_path)


@pytest.mark.parametrize(('fields', 'problem'), [
    ({'layers': 10**30}, 'layers = 1000000000000000000000000000000: give a number of at most 10,000'),
    ({'layers': None}, 'layers = None: give a whole number'),
    ({}, 'layers = None: give a whole number'),
    ({'layers': 2, 'phase': 'x'}, "phase = 'x': give 'sft' or 'reward'"),
    ({'layers': 2, 'base': []}, 'base.path = None: give a string'),
    ({'layers': 2, 'base': {'path': 3}}, 'base.path = 3: give a string'),
    ({'layers': 2, 'base': {'path': 'x'}, 'map': {'a': 5}}, "map['a'] = 5: give a string"),
    ({'layers': 2, 'base': {'path': 'x'}, 'another': [None]}, None),
])  # fmt: skip
def test_a_field_of_another_type_is_named(fields, problem):
    annotations = {
        'layers': Layers, 'phase': Literal['sft', 'reward'] | None, 'base.path': str, 'map': Mapping[str, str] | None
    }  # fmt: skip
    content = json.dumps(fields)
    if problem is None:
        assert json_files.parse(content, 'a.json', annotations) == fields
    else:
        assert line_of(json_files.parse, content, 'a.json', annotations) == f'a.json: {problem}'


def test_a_file_that_is_not_there_is_named(tmp_path):
    assert line_of(json_files.read, tmp_path / 'a.json') == (
        f'{tmp_path}/a.json: cannot be read (No such file or directory); download it again'
    )


@pytest.mark.parametrize(('key', 'value', 'problem'), [
    ('num_hidden_layers', 10**30, 'give a number of at most 10,000'),
    ('vocab_size', 10**30, 'give a number of at most 2,147,483,647'),
    ('hidden_size', '8', "hidden_size = '8': give a whole number"),
    ('rope_theta', 'x', "rope_theta = 'x': give a number"),
    ('rms_norm_eps', -1, 'rms_norm_eps = -1: give a number above 0'),
    ('tie_word_embeddings', 'no', "tie_word_embeddings = 'no': give True or False"),
    ('architectures', [{}], 'architectures[0] = {}: give a string'),
    ('layer_types', 'full', "layer_types = 'full': give a list"),
])  # fmt: skip
def test_a_config_of_wrong_types(tmp_path, key, value, problem):
    (tmp_path / 'config.json').write_text(json.dumps({'model_type': 'llama', key: value}))
    assert problem in line_of(hf_config.network, tmp_path)


@pytest.mark.parametrize(('fields', 'problem'), [
    ({'dtype': []}, 'dtype = []: give a string'),
    ({'shape': 'x'}, "shape = 'x': give a list"),
    ({'shape': [2, -1]}, 'shape[1] = -1: give a number of at least 0'),
    ({'data_offsets': [0]}, 'data_offsets = [0]: '),
    ({'data_offsets': [-8, 8]}, 'data_offsets[0] = -8: give a number of at least 0'),
    ({'data_offsets': [0, 10**30]}, 'give a number of at most 9,007,199,254,740,992'),
    ({'data_offsets': [8, 0]}, 'tensor b overlaps another'),
    ({'data_offsets': [4, 12]}, 'tensor b overlaps another'),
    ({'data_offsets': [8, 24]}, 'truncated in tensor b'),
    (None, 'dtype = None: give a string'),
])  # fmt: skip
def test_a_header_of_safetensors_with_wrong_types_or_places(tmp_path, fields, problem):
    file = tmp_path / 'model.safetensors'
    save_file({'a': np.zeros(2, np.float32), 'b': np.ones(2, np.float32)}, file)
    content = file.read_bytes()
    length = int.from_bytes(content[:8], 'little')
    table = json.loads(content[8 : 8 + length])
    table['b'] = fields and table['b'] | fields
    header = json.dumps(table).encode()
    file.write_bytes(len(header).to_bytes(8, 'little') + header + content[8 + length :])
    assert problem in line_of(safetensors.entries, tmp_path)


@pytest.mark.parametrize('line', [b'\xff\n', b'{"step": "2"}\n', b'{"step": null}\n', b'[]\n', DEEP + b'\n', b'{"a\n'])
def test_a_damaged_line_of_a_log_does_not_block_a_run(tmp_path, line, caplog):
    path = tmp_path / 'metrics.jsonl'
    path.write_bytes(b'{"step": 1}\n' + line + b'{"step": 2}\n{"step": 3}\n')
    logs.truncate(str(path), 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert '1 lines are not valid' in caplog.text


@pytest.mark.parametrize(('fields', 'problem'), [
    ({'seconds': '3'}, "seconds = '3': give a number"),
    ({'phase': 'ppo'}, "phase = 'ppo': give 'sft', 'reward' or 'policy'"),
    ({'base': []}, 'base.path = None: give a string'),
    ({'imported': ['x']}, "imported = ['x']: give a string"),
])  # fmt: skip
def test_a_run_json_of_wrong_types(tmp_path, fields, problem):
    (tmp_path / 'run.json').write_text(json.dumps(RUN | fields))
    assert problem in line_of(rundir.require, str(tmp_path))
