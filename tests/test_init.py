"""`perl_jax init`, `inspect --data`, `--data` and `--model`: from a file and a model to runs, without code."""

import json
import pathlib
import shlex

import pytest

pytest.importorskip('tokenizers')
from test_run_vocabulary import about, config_of, hf_folder
from tokenizers import Tokenizer
from toy_runs import configured, perl, quoted, ran, rows

from perl_jax.cli import catalog, macros
from perl_jax.tasks import sources

ROWS = pathlib.Path(__file__).parent / 'rows'
FEW = ['--gin.TRAIN_STEPS=2', '--gin.EVAL_PERIOD=1', '--gin.BATCH_SIZE=2', '--gin.EVAL_EXAMPLES=2']


@pytest.fixture(scope='module')
def mine(tmp_path_factory):
    """A folder with weights, 80 pairs, and the recipes that init writes for them."""
    folder = tmp_path_factory.mktemp('mine')
    hf_folder(folder / 'weights')
    config = json.loads((folder / 'weights/tokenizer_config.json').read_text())
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}<|im_start|>"
    (folder / 'weights/tokenizer_config.json').write_text(json.dumps(config | {'chat_template': template}))
    pairs = [{'prompt': 'hello ' * (1 + i % 4) + str(i), 'chosen': 'hello', 'rejected': 'wo wo'} for i in range(80)]
    (folder / 'pairs.jsonl').write_text('\n'.join(map(json.dumps, pairs)))
    result = ran('init', folder / 'out', f'--model={folder}/weights', f'--data={folder}/pairs.jsonl')
    return folder, result


def test_init_says_what_it_recognised_and_what_is_next(mine):
    folder, result = mine
    recognised, wrote, command = result.out.splitlines()
    assert recognised == (
        'recognised: preferences (prompt, chosen, rejected) in 80 rows; they serve sft, reward, policy'
    )
    assert wrote == f'wrote {", ".join(f"{folder}/out/{phase}.gin" for phase in ("sft", "reward", "policy"))}'
    assert command == f'next: perl_jax sft --gin_file={folder}/out/sft.gin'


def test_lengths_are_those_of_the_data(mine):
    folder, _ = mine
    text = (folder / 'out/sft.gin').read_text()
    # <|im_start|>hello hello hello hello 79<|im_end|><|im_start|>: by the tokenizer itself
    tokenizer = Tokenizer.from_file(str(folder / 'weights/tokenizer.json'))
    ids = tokenizer.encode('<|im_start|>' + ('hello ' * 4 + '79').strip() + '<|im_end|><|im_start|>').ids
    answers = max(len(tokenizer.encode(x).ids) + 1 for x in ('hello', 'wo wo'))
    width = lambda n: -(-n // 16) * 16  # noqa: E731
    assert f"TASK_FEATURE_LENGTHS = {{'inputs': {width(len(ids))}, 'targets': {width(answers)}}}" in text
    assert f'99% of the prompts have at most {len(ids)}' in text


@pytest.mark.slow
def test_the_recipes_run_in_turn(mine):
    folder, _ = mine
    for phase in ('sft', 'reward', 'policy'):
        ran(phase, f'--gin_file={folder}/out/{phase}.gin', *FEW)
        assert rows(folder / 'out' / phase)[-1]['step'] == 2
        assert about(folder / 'out' / phase)['vocabulary'] == f'{folder}/weights'
    sample = json.loads((folder / 'out/sft/samples.jsonl').read_text().splitlines()[0])
    assert sample['prompt'].startswith('<|im_start|>hello') and sample['prompt'].endswith('<|im_end|><|im_start|>')
    assert 'auc' not in ran('eval', f'--model_dir={folder}/out/reward').out  # pairs
    assert 'pairwise_accuracy' in ran('eval', f'--model_dir={folder}/out/reward').out
    assert ran('sample', f'--model_dir={folder}/out/policy', '--num=1').out.startswith('<|im_start|>hello')


@pytest.mark.slow
def test_a_run_goes_on_with_its_rows_alone(mine, tmp_path, monkeypatch):
    """PATHS is absolute in config.gin, whatever was typed, and other rows are refused by name."""
    folder, _ = mine
    monkeypatch.chdir(folder)
    model_dir = quoted('MODEL_DIR', tmp_path / 'run')
    argv = ['sft', '--data=pairs.jsonl', '--model=weights', model_dir, *FEW]
    argv += ["--gin.TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 8}"]
    ran(*argv)
    assert f"PATHS = '{folder}/pairs.jsonl'" in config_of(tmp_path / 'run')
    text = configured(*argv, quoted('PATHS', 'pairs.jsonl'), '--gin_file=tuning/full.gin')
    assert f"PATHS = '{folder}/pairs.jsonl'" in text and 'FullSpec' in text
    (tmp_path / 'copy.jsonl').write_text((folder / 'pairs.jsonl').read_text())
    for flag, name in (
        (quoted('PATHS', tmp_path / 'copy.jsonl'), 'PATHS'), (quoted('CHAT', 'plain'), 'CHAT'),
        ("--gin.COLUMNS={'prompt': 'prompt'}", 'COLUMNS'), (quoted('PROMPT_TEMPLATE', '{prompt}'), 'PROMPT_TEMPLATE'),
        (quoted('ANSWER_TEMPLATE', '{answer}!'), 'ANSWER_TEMPLATE'), (quoted('SYSTEM', 'x'), 'SYSTEM'),
    ):  # fmt: skip
        line = perl(*argv, '--gin.TRAIN_STEPS=4', flag).line
        assert line.startswith(f'perl_jax: {name} = ') and 'ACCEPT_OTHER_DATA' in line, line


@pytest.mark.slow
def test_a_run_does_not_go_on_with_rows_that_changed_in_their_file(mine, tmp_path):
    folder, _ = mine
    (tmp_path / 'rows.jsonl').write_text((folder / 'pairs.jsonl').read_text())
    argv = ['sft', f'--data={tmp_path}/rows.jsonl', f'--model={folder}/weights', quoted('MODEL_DIR', tmp_path / 'run')]
    argv += [*FEW, "--gin.TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 8}"]
    ran(*argv)
    before = (tmp_path / 'run/metrics.jsonl').read_text()
    (tmp_path / 'rows.jsonl').write_text((folder / 'pairs.jsonl').read_text().replace('hello 7', 'wo 7'))
    sources._read.cache_clear()  # a new process
    line = perl(*argv, '--gin.TRAIN_STEPS=4').line
    assert f"the training rows are not those that '{tmp_path}/run' began with" in line and 'ACCEPT_OTHER_DATA' in line
    assert (tmp_path / 'run/metrics.jsonl').read_text() == before
    sources._read.cache_clear()
    ran(*argv, '--gin.TRAIN_STEPS=4', '--gin.ACCEPT_OTHER_DATA=True')
    assert rows(tmp_path / 'run')[-1]['step'] == 4


def test_ratings_and_demonstrations_get_what_they_can_train(mine, tmp_path):
    folder, _ = mine
    ran('init', tmp_path / 'kto', f'--model={folder}/weights', f'--data={ROWS}/kto.jsonl')
    assert sorted(path.name for path in (tmp_path / 'kto').iterdir()) == ['policy.gin', 'reward.gin', 'sft.gin']
    assert "KIND = 'thumbs'" in (tmp_path / 'kto/reward.gin').read_text()
    ran('init', tmp_path / 'chat', f'--model={folder}/weights', f'--data={ROWS}/messages.jsonl')
    assert [path.name for path in (tmp_path / 'chat').iterdir()] == ['sft.gin']
    text = ran('inspect', f'--data={ROWS}/ratings.csv', '--kind=sft').out
    assert text.startswith('recognised: ratings (prompt = question, answer = response, label) in 2 rows; they serve')
    assert "not read: 'rater'\n" in text and 'Is it raining, now?' in text


def test_what_cannot_be_is_said_and_nothing_is_written(mine, tmp_path):
    folder, _ = mine
    weights, data = f'--model={folder}/weights', f'--data={folder}/pairs.jsonl'
    (tmp_path / 'prompts.jsonl').write_text('{"prompt": "a"}\n')
    (tmp_path / 'odd.jsonl').write_text('{"txt": "a"}\n')
    bare = hf_folder(tmp_path / 'bare', tokenizer=False)
    before = sorted(tmp_path.iterdir())
    for argv, words in (
        ([folder / 'out', weights, data], ['out/sft.gin', 'exist already']),
        ([tmp_path / 'x', f'--model={bare}', data], ['has no tokenizer']),
        ([tmp_path / 'x', weights, f'--data={tmp_path}/prompts.jsonl'], ['the rows are prompts', 'needs answers']),
        ([tmp_path / 'x', weights, f'--data={tmp_path}/odd.jsonl'], ['odd.jsonl row 1: columns txt are of no']),
        ([tmp_path / 'x', weights, '--data=none.jsonl'], ['none.jsonl: there is no such file or folder']),
        ([tmp_path / 'x', weights, data, '--columns=promt=x'], ["promt is none of prompt, answer"]),
        ([tmp_path / 'x', weights, data, '--columns=prompt'], ["--columns='prompt': write NAME=COLUMN"]),
        ([tmp_path / 'x', weights, '--data=a,,b'], ["--data='a,,b': give"]),
    ):
        line = perl('init', *argv).line
        assert all(word in line for word in words), line
    assert sorted(tmp_path.iterdir()) == before
    assert '--columns and --kind are for --data' in perl('inspect', '--task=toy_sft', '--kind=sft').line


def test_all_that_is_missing_is_named_at_once_with_flags_that_can_be_pasted(tmp_path):
    line = perl('reward', '--gin_file=runs/reward.gin', '--gin_file=data/files.gin', quoted('MODEL_DIR', tmp_path)).line
    names = ['INITIAL_CHECKPOINT_PATH', 'KIND', 'NETWORK', 'PATHS', 'TASK_FEATURE_LENGTHS', 'TRAIN_STEPS']
    assert line.startswith(f'perl_jax: gin: {", ".join(names)} are not given; add ')
    flags = shlex.split(line.partition('; add ')[2])
    assert '--gin_file=models/from_hf.gin' in flags and "--gin.PATHS='rows.jsonl'" in flags
    settings = [item for phase in catalog.PHASES for item in catalog.settings(phase).items()]
    required = {name for name, default in settings if default == 'required'}
    assert required <= macros.EXAMPLES.keys()
