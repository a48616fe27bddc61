"""The toy task: a world in which SFT cannot be good and a reward can, and only the grammar knows the truth."""

import collections
import hashlib
import itertools
import pathlib
import random
import re
import subprocess
import sys

import pytest
import seqio
import tensorflow as tf

from perl_jax.tasks import dialog_text, toy
from perl_jax.tasks import toy_grammar as grammar

ROOT = pathlib.Path(__file__).parents[1]
KINDS = {'sft': toy.sft, 'pairs': toy.pairs, 'thumbs': toy.thumbs, 'prompts': toy.prompts}
EXAMPLES = {name: {split: list(kind(split)) for split in toy.SIZES} for name, kind in KINDS.items()}
VOCABULARY = toy.vocabulary()
TEXTS = sorted({
    text for splits in EXAMPLES.values() for examples in splits.values() for example in examples
    for text in example.values() if isinstance(text, str)
})  # fmt: skip


def requests(count):
    rng = random.Random('test')
    for _ in range(count):
        yield rng, *grammar.request(rng)


# The examples.


@pytest.mark.parametrize('kind', KINDS)
def test_the_examples_are_always_the_same(kind):
    for split, size in toy.SIZES.items():
        assert len(EXAMPLES[kind][split]) == size
        assert EXAMPLES[kind][split] == list(KINDS[kind](split))


def test_the_grammar_is_the_same_in_every_process():
    """Whatever the seed of Python's hashes: nothing hangs on the order of a set."""
    code = """
import random
from perl_jax.tasks import toy_grammar as grammar
rng = random.Random(0)
for _ in range(300):
    said, meant, first = grammar.request(rng)
    print(said, meant, first, grammar.demonstrate(rng, meant, first), grammar.compare(rng, meant, first),
          grammar.judge(rng, meant, first))
"""
    digests = set()
    for seed in '1', '2':
        command = [sys.executable, '-c', code]
        said = subprocess.run(command, env={'PYTHONHASHSEED': seed}, cwd=ROOT, capture_output=True, check=True).stdout
        assert said.count(b'\n') >= 300
        digests.add(hashlib.sha256(said).digest())
    assert len(digests) == 1


def test_the_answer_is_one_call_in_taskmasters_form():
    for _, said, meant, first in requests(300):
        call = toy._answer(grammar.right(meant))
        assert dialog_text.parse_call(call) == ('add_order_item', meant)
        turn = {'role': 'agent', 'api': {'add_order_item': dict(grammar.right(meant))}}
        assert dialog_text.lines([turn]) == [call]
        assert toy._prompt(said) == f'user: {said}\n'
        assert meant['item'] in said
        assert meant['item'] in grammar.ITEMS and set(meant) | set(first) <= set(grammar.ARGUMENTS)


@pytest.mark.parametrize('kind', KINDS)
def test_the_splits_hardly_overlap(kind):
    """Nor do the prompts that a policy is measured on with anything that was learned from."""
    seen = {example['inputs'] for example in EXAMPLES[kind]['train']}
    assert len(seen) > 0.9 * toy.SIZES['train']
    for measured in kind, 'prompts':
        for split in 'validation', 'test':
            said = [example['inputs'] for example in EXAMPLES[measured][split]]
            assert sum(text in seen for text in said) < 0.2 * len(said)


def test_the_tasks_give_the_examples():
    for name, splits in EXAMPLES.items():
        rows = list(seqio.get_mixture_or_task(f'toy_{name}').get_dataset(None, 'test', shuffle=False).take(20))
        for row, example in zip(rows, splits['test'], strict=False):
            for field, value in example.items():
                text = row.get(f'{field}_pretokenized', row[field]).numpy()
                assert text == (value if isinstance(value, float) else value.encode())
            for field in {'targets', 'chosen', 'rejected'} & example.keys():
                assert row[field].numpy().tolist() == [*VOCABULARY.encode(example[field]), VOCABULARY.eos_id]
            assert row['inputs'].numpy().tolist() == VOCABULARY.encode(example['inputs'])


# What is right, and who says so.


def test_truth_is_1_for_the_reference_and_0_for_any_slip():
    for rng, said, meant, _ in requests(300):
        example = {'reference': toy._answer(grammar.right(meant))}
        assert grammar.truth(toy._prompt(said), example['reference'], example) == 1
        assert grammar.mistakes(grammar.right(meant), meant) == 0
        slipped = grammar.slip(rng, grammar.right(meant))
        assert grammar.mistakes(slipped, meant) == 1
        assert grammar.truth(toy._prompt(said), toy._answer(slipped), example) == 0
        for other in '', 'agent: which size?', example['reference'] + ' x', example['reference'][:-1]:
            assert grammar.truth(toy._prompt(said), other, example) == 0


def test_demonstrations_are_right_at_most_60_percent_of_the_time():
    """Else SFT would be good enough, and nothing left for RL to do."""
    right = sum(grammar.demonstrate(rng, *orders) == grammar.right(orders[0]) for rng, _, *orders in requests(5000))
    assert 0.1 < right / 5000 < 0.6


def test_the_most_common_demonstration_is_right_at_most_60_percent_of_the_time():
    """Else decoding greedily would do much of what RL does."""
    common = 0
    for rng, _, meant, first in requests(1000):
        answers = collections.Counter(grammar.demonstrate(rng, meant, first) for _ in range(100))
        common += answers.most_common(1)[0][0] == grammar.right(meant)
    assert common / 1000 < 0.6


def test_a_right_answer_is_demonstrated_now_and_then():
    """The policy has to stumble on it to learn it, whatever was ordered."""
    for rng, _, meant, first in requests(100):
        assert any(grammar.demonstrate(rng, meant, first) == grammar.right(meant) for _ in range(500))


def test_raters_prefer_fewer_mistakes_up_to_the_stated_mix_ups():
    count = 5000
    wrong = 0
    for rng, _, meant, first in requests(count):
        chosen, rejected = (grammar.mistakes(order, meant) for order in grammar.compare(rng, meant, first))
        assert chosen != rejected
        wrong += chosen > rejected
    assert_share(wrong, count, grammar.MIXED_UP)


def test_thumbs_are_up_for_right_answers_up_to_the_stated_mix_ups():
    count = 5000
    wrong = up = 0
    for rng, _, meant, first in requests(count):
        answer, label = grammar.judge(rng, meant, first)
        assert label in (0.0, 1.0)
        wrong += (answer == grammar.right(meant)) != bool(label)
        up += label
    assert_share(wrong, count, grammar.MIXED_UP)
    assert 0.2 < up / count < 0.8, 'both thumbs have to be seen often'


def assert_share(found, count, share):
    """Within four standard deviations."""
    assert abs(found / count - share) < 4 * (share * (1 - share) / count) ** 0.5


# Its vocabulary.


def test_every_text_round_trips_without_unknown_words():
    for text in TEXTS:
        ids = VOCABULARY.encode(text)
        assert min(ids) > VOCABULARY.unk_id and max(ids) < VOCABULARY.vocab_size
        assert VOCABULARY.decode([*ids, VOCABULARY.eos_id]) == text


def test_tensorflow_encodes_as_python_does():
    whole = '\n'.join(TEXTS)  # one call: they take a millisecond each
    assert VOCABULARY.encode_tf(tf.constant(whole)).numpy().tolist() == VOCABULARY.encode(whole)
    for text in TEXTS[::1000]:
        ids = VOCABULARY.encode_tf(tf.constant(text))
        assert ids.dtype == tf.int32 and ids.numpy().tolist() == VOCABULARY.encode(text)
        assert VOCABULARY.decode_tf(ids).numpy() == text.encode()


@pytest.mark.parametrize('text', ['user: a venti latte', 'latte!', 'käffchen latte'])
def test_unknown_words_are_marked_and_tensorflow_agrees(text):
    ids = VOCABULARY.encode(text)
    assert VOCABULARY.unk_id in ids
    assert VOCABULARY.encode_tf(tf.constant(text)).numpy().tolist() == ids


def test_vocabularies_of_equal_words_are_equal():
    assert toy.vocabulary() == VOCABULARY
    assert toy.WordVocabulary(iter(['latte'])) != VOCABULARY


def test_the_toy_model_has_a_row_for_every_word():
    size = int(re.search(r'vocab_size = (\d+)', (ROOT / 'gin/models/toy.gin').read_text())[1])
    assert VOCABULARY.vocab_size <= size


@pytest.mark.parametrize('split', ['train', 'test'])
def test_the_noisy_rater_turns_a_quarter_round(split):
    pairs = list(zip(toy.noisy_pairs(split), EXAMPLES['pairs'][split], strict=True))
    turned = [noisy['chosen'] == plain['rejected'] for noisy, plain in pairs]
    assert all(
        noisy == (plain | {'chosen': plain['rejected'], 'rejected': plain['chosen']} if turn else plain)
        for (noisy, plain), turn in zip(pairs, turned)
    )
    thumbs = list(zip(toy.noisy_thumbs(split), EXAMPLES['thumbs'][split], strict=True))
    flipped = [noisy['label'] != plain['label'] for noisy, plain in thumbs]
    assert all(noisy | {'label': plain['label']} == plain for noisy, plain in thumbs)
    for share in (sum(turned) / len(turned), sum(flipped) / len(flipped)):
        assert abs(share - toy.MIXED_UP) < 0.05


@pytest.mark.parametrize('kind', ['pairs', 'thumbs'])
def test_other_draws_of_noisy_ratings_share_hardly_a_prompt(kind):
    """Rewards of several draws would else be wrong together for what they have in common."""
    task = seqio.get_mixture_or_task(f'toy_noisy_{kind}')
    read = [task.get_dataset(None, split, shuffle=False).take(256) for split in ('train', *toy.OTHER_DRAWS)]
    prompts = [[row['inputs_pretokenized'].numpy() for row in rows] for rows in read]
    assert [len(texts) for texts in prompts] == [256] * 3
    for first, second in itertools.combinations(prompts, 2):
        assert sum(text in first for text in second) < 0.1 * 256
