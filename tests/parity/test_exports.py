"""What is exported knows what it is: transformers and peft, in another process, with nothing but the folders."""
# ruff: noqa: F811 (a fixture is shared by importing it)

import json
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest

pytest.importorskip('gguf')
pytest.importorskip('torch', reason='needs torch, transformers and peft, which the tests do not install')
pytest.importorskip('transformers', reason='needs transformers')
pytest.importorskip('peft', reason='needs peft')
import tiny_gguf  # noqa: E402
from toy_runs import perl, quoted, ran, toy  # noqa: E402

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
PROMPT = 'hello 12 world'
# It is given a kind, a folder and texts, and prints what they make of them.
READER = """
import json, sys, warnings
warnings.simplefilter('ignore')
import torch, transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
kind, folder, *texts = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
if kind == 'reward':
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
elif kind == 'causal':
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
else:
    from peft import AutoPeftModelForCausalLM
    model = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
said = []
with torch.no_grad():
    if kind == 'reward':
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
    'ends': model.generation_config.eos_token_id if kind != 'reward' else None,
    'ids': [tokenizer(text)['input_ids'] for text in texts],
}))
"""


def reads(kind, folder, *texts):
    """What transformers says of a folder, in a process that has nothing of ours."""
    command = [sys.executable, '-c', READER, kind, str(folder), *texts]
    done = subprocess.run(command, capture_output=True, text=True, cwd='/', check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


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
    from perl_jax.interop.tokenizers import TokenizersVocabulary

    assert got['ids'] == [TokenizersVocabulary(str(runs.path / 'm.gguf')).encode(PROMPT)]
    assert 2 in np.ravel(got['ends'])


@pytest.fixture(scope='module')
def merged(runs):
    return export(runs.policy, 'hf', runs.path / 'merged')


def test_the_policys_answers_are_those_of_generate(runs, merged):
    got = reads('causal', merged, PROMPT)
    from perl_jax.interop.tokenizers import TokenizersVocabulary

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


def test_a_rewards_scores_are_ours_with_padding(runs, tmp_path):
    out = export(runs.reward, 'hf', tmp_path / 'out')
    end = '<|im_end|>'
    texts = [PROMPT + end, 'the' + end, 'a 1 2 13 hello' + end]
    got = reads('reward', out, *texts)
    assert got['pad'] == got['model_pad'] == 0 and got['eos'] == 2
    import jax

    from perl_jax import base as bases
    from perl_jax import lora
    from perl_jax.base import BaseConfig
    from perl_jax.interop import hf
    from perl_jax.partitioning import Partitioner

    network, partitioner = hf.network(str(runs.weights)), Partitioner()
    with partitioner.scope():
        base = bases.load(BaseConfig(network, str(runs.sft)), partitioner, 0)
    adapter, _ = bases.read_adapter(str(runs.reward), 'reward', phase='reward', flag='')
    variables = lora.bind(base.params, jax.tree.map(jax.numpy.asarray, adapter))
    for ids, score in zip(got['ids'], got['said'], strict=True):
        row = np.array(ids)[None]
        hidden = network.apply(variables, row[:, :1], row[:, :1] > -1, row[:, None, 1:])
        np.testing.assert_allclose(lora.readout(variables, hidden[0, 0, -1]), score, atol=1e-4)


def test_wrong_weights_are_no_base(runs, tmp_path):
    other = tmp_path / 'other'
    shutil.copytree(runs.weights, other)
    from safetensors.numpy import load_file, save_file

    tensors = load_file(other / 'model.safetensors')
    save_file({k: v * 1.01 for k, v in tensors.items()}, other / 'model.safetensors')
    asked = f'--model_dir={runs.policy}', '--format=peft', f'--output={tmp_path}/x', f'--base={other}'
    line = perl('export', *asked).line
    assert '--base' in line and 'does not hold the weights' in line and not (tmp_path / 'x').exists()
