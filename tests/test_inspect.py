"""`perl_jax inspect`: a task as text, as tokens and as lengths; and a task of one's own in a dozen lines."""

import json
import re

import pytest
from toy_runs import perl, ran

from perl_jax.tasks import toy

VOCABULARY = toy.vocabulary()


def blocks(out, name):
    """The bars of a feature's histogram as (low, high, bar, count)."""
    body = out.split(f'\n{name}: tokens ')[1].split('\n\n')[0]
    found = re.findall(r'^ +(\d+) to +(\d+)  (#*) *([\d,]+)$', body, re.MULTILINE)
    return [(int(low), int(high), len(bar), int(count.replace(',', ''))) for low, high, bar, count in found]


def test_inspect_shows_examples_and_a_histogram_of_every_feature():
    out = ran('inspect', '--task=toy_pairs', '--split=test', '--num=2').out
    examples = list(toy.pairs('test'))
    assert out.count('--- example') == 2
    for example in examples[:2]:
        for name, text in example.items():
            ids = VOCABULARY.encode(text)
            length = len(ids) + (name != 'inputs')  # and EOS
            assert f'{name} ({length} tokens: {" ".join(map(str, ids[:8]))}' in out
            assert f'  | {text.rstrip()}\n' in out
    assert 'toy_pairs, test: 512 examples, WordVocabulary' in out
    for name in 'inputs', 'chosen', 'rejected':
        bars = blocks(out, name)
        assert sum(count for *_, count in bars) == 512
        longest = max(len(VOCABULARY.encode(example[name])) + (name != 'inputs') for example in examples)
        assert f'max {longest}' in out.split(f'\n{name}: tokens ')[1].splitlines()[0]
        assert bars[-1][1] == longest
        tallest = max(count for *_, count in bars)
        assert all(bar == round(40 * count / tallest) for *_, bar, count in bars)


def test_inspect_says_how_many_thumbs_are_up():
    out = ran('inspect', '--task=toy_thumbs', '--split=test', '--num=1').out
    up = sum(example['label'] for example in toy.thumbs('test')) / 512
    assert f'label: {up:.1%} up' in out and re.search(r'^label: [01]\.0$', out, re.MULTILINE)


def test_inspect_shows_fields_that_pass_through():
    out = ran('inspect', '--task=toy_prompts', '--split=test', '--num=1').out
    assert f'reference: {next(iter(toy.prompts("test")))["reference"]}\n' in out


def test_inspect_counts_with_another_tokenizer(tmp_path):
    pytest.importorskip('tokenizers')
    import tokenizers
    from tokenizers import models, pre_tokenizers

    letters = {text: i for i, text in enumerate(['[UNK]', '</s>', *map(chr, range(32, 127)), '\n'])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(letters, unk_token='[UNK]'))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r'[\s\S]'), 'isolated')
    tokenizer.add_special_tokens(['</s>'])
    tokenizer.save(str(tmp_path / 'tokenizer.json'))
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'eos_token': '</s>'}))
    result = perl('inspect', '--task=toy_prompts', '--split=test', f'--vocabulary={tmp_path / "tokenizer.json"}')
    assert result.code == 0, result.err
    longest = max(len(example['inputs']) for example in toy.prompts('test'))
    assert f'max {longest}' in result.out and 'TokenizersVocabulary' in result.out


OWN = """\
import csv
import pathlib
from perl_jax.tasks import registration

FOLDER = pathlib.Path(__file__).parent

def examples(split):
    with open(FOLDER / f'tickets_{split}.csv') as file:
        for row in csv.DictReader(file):
            yield {'inputs': row['question'] + '\\n', 'chosen': row['good'], 'rejected': row['bad']}

registration.add('tickets_pairs', 'pairs', examples, splits=['train'])
"""


def test_a_task_of_ones_own_takes_a_dozen_lines(tmp_path, monkeypatch):
    """A module in the folder that the command is started in."""
    assert len(OWN.strip().splitlines()) <= 12
    (tmp_path / 'my_tickets.py').write_text(OWN)
    (tmp_path / 'tickets_train.csv').write_text('question,good,bad\nwhere is it?,gate 4,no idea\nwhen?,at 9,later\n')
    monkeypatch.chdir(tmp_path)
    out = ran('inspect', '--task=tickets_pairs', '--module=my_tickets').out
    assert 'tickets_pairs, train: 2 examples, ByteVocabulary' in out
    assert '  | where is it?\n' in out and '  | gate 4\n' in out and 'inputs (13 tokens' in out
    result = perl('inspect', '--task=tickets_pairs', '--module=my_tickets', '--split=test')
    assert result.line == "perl_jax: task 'tickets_pairs' has no split 'test'; it has train"
