"""What is exported knows what it is: transformers and peft, in another process, with nothing but the folders."""
# ruff: noqa: F811 (a fixture is shared by importing it)

import atexit
import contextlib
import functools
import json
import shutil
import subprocess
import sys
import tempfile
import types

import numpy as np
import pytest

pytest.importorskip('gguf')
pytest.importorskip('torch', reason='needs torch, transformers and peft, which the tests do not install')
pytest.importorskip('transformers', reason='needs transformers')
pytest.importorskip('peft', reason='needs peft')
import tiny_gguf  # noqa: E402
from toy_runs import perl, quoted, ran, toy  # noqa: E402

from perl_jax.runs import finished  # noqa: E402

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
PROMPT = 'hello 12 world'
# It is given a kind, a folder and texts, and prints what they make of them.
READER = """
import json, os, sys, warnings
warnings.simplefilter('ignore')
import torch, transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
kind, folder, *texts = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
if kind == 'README':  # what it says, word by word; nothing else is known of the folder
    os.chdir(folder)
    code = open('README.md').read().split('```python')[1].split('```')[0]
    setting = next((line for line in code.splitlines() if line.startswith('texts = ')), None)
    exec(code.replace(setting, 'texts = sys.argv[3:]') if setting else code)
    kind = 'causal' if setting is None else 'scores'
elif kind == 'reward':
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
elif kind == 'causal':
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
else:
    from peft import AutoPeftModelForCausalLM
    model = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
said = []
with torch.no_grad():
    if kind == 'scores':
        said = {'as said': scores.tolist()}
        for tokenizer.padding_side in 'left', 'right':
            batch = tokenizer(texts, return_tensors='pt', padding=True)
            said[tokenizer.padding_side] = model(**batch).logits[:, 0].tolist()
        said['one by one'] = [model(**tokenizer(text, return_tensors='pt')).logits[0, 0].item() for text in texts]
    elif kind == 'reward':
        batch = tokenizer(texts, return_tensors='pt', padding=True)
        said = model(**batch).logits[:, 0].tolist()
    else:
        for text in texts:
            batch = tokenizer(text, return_tensors='pt')
            out = model.generate(**batch, max_new_tokens=12, do_sample=False)[0, batch['input_ids'].shape[1]:]
            said.append(out.tolist())
print(json.dumps({
    'said': said, 'len': len(tokenizer), 'eos': tokenizer.eos_token_id, 'pad': tokenizer.pad_token_id,
    'bos': tokenizer.bos_token_id, 'model_pad': model.config.pad_token_id, 'template': tokenizer.chat_template,
    'length': tokenizer.model_max_length, 'positions': model.config.max_position_embeddings,
    'ends': model.generation_config.eos_token_id if kind not in ('reward', 'scores') else None,
    'ids': [tokenizer(text)['input_ids'] for text in texts],
}))
"""

# It imports for seven seconds what READER needs, and runs it in a child for each line of stdin: what it prints goes to
# `output`.
FORKS = """
import importlib, json, os, sys, warnings
warnings.simplefilter('ignore')
for name in 'torch', 'peft', 'transformers.models.auto.modeling_auto', 'transformers.models.llama.modeling_llama':
    importlib.import_module(name)
for line in sys.stdin:
    output, code, *arguments = json.loads(line)
    if not (child := os.fork()):
        file = os.open(output, os.O_WRONLY)
        os.dup2(file, 1), os.dup2(file, 2)
        sys.argv[1:] = arguments
        exec(code, {'__name__': '__main__'})
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def server():
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, '-c', FORKS], stdin=pipe, stdout=pipe, text=True, cwd='/')
    atexit.register(process.communicate)  # closes its input, at whose end it ends
    return process


def reads(kind, folder, *texts):
    """What transformers says of a folder, in a process that has nothing of ours."""
    with tempfile.NamedTemporaryFile('r') as output:
        server().stdin.write(json.dumps([output.name, READER, kind, str(folder), *texts]) + '\n')
        server().stdin.flush()
        code, said = server().stdout.readline(), output.read()
    assert code == '0\n', said[-3000:]
    return json.loads(said.splitlines()[-1])


def export(run, kind, output, *flags):
    ran('export', f'--model_dir={run}', f'--format={kind}', f'--output={output}', *flags)
    return output


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """GGUF -> folder -> SFT -> reward and policy, all with LoRA."""
    path = tmp_path_factory.mktemp('runs')
    tiny_gguf.write(path / 'm.gguf', tokenizer__chat_template=TEMPLATE, tokenizer__ggml__padding_token_id=2)
    model = '--gin_file=models/from_hf.gin'
    ran('import', '--format=gguf', f'--input={path}/m.gguf', f'--model_dir={path}/imported', model)
    export(path / 'imported', 'hf', path / 'weights')
    flags = model, '--gin_file=tuning/lora.gin', '--gin.TRAIN_STEPS=3', quoted('VOCABULARY', path / 'weights')
    flags += '--gin.LORA_LEARNING_RATE=0.1', "--gin.TASK_FEATURE_LENGTHS={'inputs': 110, 'targets': 110}"
    ran(*toy('sft', path / 'sft', quoted('INITIAL_CHECKPOINT_PATH', path / 'weights'), *flags))
    start = quoted('INITIAL_CHECKPOINT_PATH', path / 'sft'), *flags
    ran(*toy('reward', path / 'reward', *start))
    reward = quoted('REWARD_MODEL_DIR', path / 'reward')
    ran(*toy('policy', path / 'policy', *start, reward, '--gin.MAX_DECODE_LENGTH=12'))
    return types.SimpleNamespace(path=path, **{x: path / x for x in ('weights', 'sft', 'reward', 'policy', 'imported')})


def test_a_gguf_file_becomes_a_folder_once(runs):
    got = reads('causal', runs.weights, PROMPT)
    assert (got['len'], got['eos'], got['bos'], got['pad']) == (268, 2, 1, 2)
    assert got['template'] == TEMPLATE and (got['length'], got['positions']) == (128, 128)
    from perl_jax.tokenizers.tokenizers import TokenizersVocabulary

    assert got['ids'] == [TokenizersVocabulary(str(runs.path / 'm.gguf')).encode(PROMPT)]
    assert 2 in np.ravel(got['ends'])


@pytest.fixture(scope='module')
def merged(runs):
    return export(runs.policy, 'hf', runs.path / 'merged')


def test_the_policys_answers_are_those_of_generate(runs, merged):
    got = reads('causal', merged, PROMPT)
    from perl_jax.tokenizers.tokenizers import TokenizersVocabulary

    vocabulary = TokenizersVocabulary(str(runs.weights / 'tokenizer.json'))
    said = ran('sample', f'--model_dir={runs.policy}', f'--prompt={PROMPT}', '--gin.TEMPERATURE=0.0').out
    assert said.startswith(PROMPT + vocabulary.decode(got['said'][0]))
    assert got['template'] == TEMPLATE and got['positions'] == 128


@pytest.mark.parametrize('flags', [(), ('--rank=16',), ('--base=sft',), ('--base=weights',)], ids=str)
def test_an_adapter_says_the_same_on_weights_that_anyone_can_load(runs, merged, flags, tmp_path):
    if flags == ('--base=sft',):
        flags = (f'--base={export(runs.sft, "hf", tmp_path / "sft")}',)
    elif flags == ('--base=weights',):
        flags = (f'--base={runs.weights}',)
    out = export(runs.policy, 'peft', tmp_path / 'adapter', *flags)
    config = json.loads((out / 'adapter_config.json').read_text())
    assert config['base_model_name_or_path'] == str(flags[0][7:] if flags and 'base' in flags[0] else runs.weights)
    elsewhere = shutil.move(out, tmp_path / 'elsewhere')
    want, got = reads('causal', merged, PROMPT, 'the 13'), reads('peft', elsewhere, PROMPT, 'the 13')
    assert got['said'] == want['said'] and got['template'] == TEMPLATE


END = '<|im_end|>'
TEXTS = [PROMPT + END, 'the' + END, 'a 1 2 13 hello' + END]


@pytest.fixture(scope='module')
def scores(runs):
    """What the reward run makes of tokens."""
    import jax

    from perl_jax.interop import hf
    from perl_jax.models import lora
    from perl_jax.parallel.partitioning import Partitioner
    from perl_jax.runs import base as bases
    from perl_jax.runs.base import BaseConfig

    network, partitioner = hf.network(str(runs.weights)), Partitioner()
    with partitioner.scope():
        base = bases.load(BaseConfig(network, str(runs.sft)), partitioner, 0)
    adapter, _ = finished.read_adapter(str(runs.reward), 'reward', phase='reward', flag='')
    variables = lora.bind(base.params, jax.tree.map(jax.numpy.asarray, adapter))

    def score(ids):
        row = np.array(ids)[None]
        hidden = network.apply(variables, row[:, :1], row[:, :1] > -1, row[:, None, 1:])
        return lora.readout(variables, hidden[0, 0, -1])

    return lambda rows: np.array([score(ids) for ids in rows])


def test_a_rewards_scores_are_ours_with_padding(runs, scores, tmp_path):
    out = export(runs.reward, 'hf', tmp_path / 'out')
    got = reads('reward', out, *TEXTS)
    assert got['pad'] == got['model_pad'] == 0 and got['eos'] == 2
    np.testing.assert_allclose(scores(got['ids']), got['said'], atol=1e-4)


def assert_scores(got, scores):
    assert set(got['said']) == {'as said', 'left', 'right', 'one by one'}
    assert len({len(row) for row in got['ids']}) == 3  # some are padded
    for said in got['said'].values():
        np.testing.assert_allclose(scores(got['ids']), said, atol=1e-4)


@contextlib.contextmanager
def says(folder, **keys):
    """A folder whose config.json says something else for a while; None is nothing."""
    path = folder / 'config.json'
    before = path.read_text()
    said = {key: value for key, value in (json.loads(before) | keys).items() if value is not None}
    path.write_text(json.dumps(said))
    try:
        yield
    finally:
        path.write_text(before)


@pytest.mark.parametrize('pad', [2, None, 5], ids=['the end of a text', 'none', 'another'])
def test_a_rewards_adapter_is_loaded_as_its_readme_says(runs, scores, pad, tmp_path):
    """PEFT takes labels and padding from the base alone: with the end as padding, scores were read a token early."""
    with says(runs.weights, pad_token_id=pad):
        done = ran('export', f'--model_dir={runs.reward}', '--format=peft', f'--output={tmp_path}/out')
        assert f"from_pretrained('{tmp_path}/out', num_labels=1, pad_token_id=0)" in done.err, done.err
        got = reads('README', shutil.move(tmp_path / 'out', tmp_path / 'elsewhere'), *TEXTS)
    assert got['pad'] == got['model_pad'] == 0
    assert_scores(got, scores)
    assert f"+ '{END}', ...]" in (tmp_path / 'elsewhere/README.md').read_text()


CLASSIFIER = """
import sys
from transformers import AutoModelForSequenceClassification, AutoTokenizer
base, out, labels = sys.argv[1:]
AutoTokenizer.from_pretrained(base).save_pretrained(out)
AutoModelForSequenceClassification.from_pretrained(base, num_labels=int(labels), pad_token_id=0).save_pretrained(out)
"""


def test_a_rewards_adapter_on_a_classifier_needs_no_words(runs, scores, tmp_path):
    for labels in '1', '2':
        command = [sys.executable, '-c', CLASSIFIER, str(runs.weights), f'{tmp_path}/{labels}', labels]
        subprocess.run(command, check=True, capture_output=True, cwd='/')
    asked = 'export', f'--model_dir={runs.reward}', '--format=peft'
    done = ran(*asked, f'--output={tmp_path}/out', f'--base={tmp_path}/1')
    assert 'load it with' not in done.err
    assert 'from_pretrained(folder).eval()' in (tmp_path / 'out/README.md').read_text()
    got = reads('README', tmp_path / 'out', *TEXTS)
    assert_scores(got, scores)
    # And back: it is the reward that it was.
    back = tmp_path / 'back'
    ran('import', '--format=peft', f'--input={tmp_path}/out', f'--model_dir={back}', '--gin_file=models/from_hf.gin')
    again = reads('README', export(back, 'peft', tmp_path / 'again'), *TEXTS)
    np.testing.assert_allclose(again['said']['right'], got['said']['right'], atol=1e-5)

    # What is none that it could be on.
    merged = export(runs.reward, 'hf', tmp_path / 'merged')
    line = perl(*asked, f'--output={tmp_path}/x', f'--base={merged}').line
    assert '--base' in line and 'has its adapter in it already' in line
    line = perl(*asked, f'--output={tmp_path}/x', f'--base={tmp_path}/2').line
    assert '--base' in line and 'num_labels 1' in line
    line = perl(asked[0], f'--model_dir={runs.policy}', *asked[2:], f'--output={tmp_path}/x', f'--base={merged}').line
    assert '--base' in line and 'is a classifier' in line and not (tmp_path / 'x').exists()


def test_an_adapter_on_weights_that_stop_elsewhere_brings_its_ends(runs, merged, tmp_path):
    other = shutil.copytree(runs.weights, tmp_path / 'other')
    (other / 'generation_config.json').write_text('{"eos_token_id": 0}')
    asked = f'--model_dir={runs.policy}', '--format=peft', f'--output={tmp_path}/out', f'--base={other}'
    assert 'generation_config=GenerationConfig.from_pretrained(' in ran('export', *asked).err
    got, want = reads('README', tmp_path / 'out', PROMPT, 'the 13'), reads('causal', merged, PROMPT, 'the 13')
    assert (got['said'], got['ends']) == (want['said'], want['ends']) and 2 in np.ravel(got['ends'])
    assert not (export(runs.policy, 'peft', tmp_path / 'own') / 'generation_config.json').exists()
    got = reads('README', tmp_path / 'own', PROMPT, 'the 13')
    assert (got['said'], got['ends']) == (want['said'], want['ends'])


def test_weights_of_another_network_are_no_base(runs, tmp_path):
    other = shutil.copytree(runs.weights, tmp_path / 'other')
    asked = f'--model_dir={runs.policy}', '--format=peft', f'--output={tmp_path}/x', f'--base={other}'
    with says(other, vocab_size=352):
        line = perl('export', *asked).line
    assert '--base' in line and 'of another network than the run: vocab_size is 352 there and 280 here' in line
    with says(other, num_hidden_layers=3):
        assert 'num_layers is 3 there and 2 here' in perl('export', *asked).line
    (other / 'model.safetensors').unlink()
    line = perl('export', *asked).line
    assert '--base' in line and not (tmp_path / 'x').exists()


def test_wrong_weights_are_no_base(runs, tmp_path):
    other = tmp_path / 'other'
    shutil.copytree(runs.weights, other)
    from safetensors.numpy import load_file, save_file

    tensors = load_file(other / 'model.safetensors')
    save_file({k: v * 1.01 for k, v in tensors.items()}, other / 'model.safetensors')
    asked = f'--model_dir={runs.policy}', '--format=peft', f'--output={tmp_path}/x', f'--base={other}'
    line = perl('export', *asked).line
    assert '--base' in line and 'does not hold the weights' in line and not (tmp_path / 'x').exists()
