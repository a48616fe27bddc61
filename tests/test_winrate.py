import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from perl_jax.evals.judging import mentions, reading, rubrics, winrate


def test_only_what_is_preferred_in_both_orders_wins():
    """Ours stands first in the one order and second in the other."""
    forward, backward = [0, 1, 0, 1, None, 0, None], [1, 0, 0, 1, 1, None, None]
    assert winrate.credits(forward, backward).tolist() == [1, 0, 0.5, 0.5, 0.5, 0.5, 0.5]


def test_nobody_beats_oneself():
    """A judge that always takes the first answer, or always the second, knows of no difference."""
    for place in (0, 1):
        credits = winrate.credits([place] * 5, [place] * 5)
        assert winrate.win_rate(credits) == {'win_rate': 0.5, 'wins': 0, 'ties': 1, 'losses': 0}


def test_ties_count_half():
    got = winrate.win_rate(np.array([1, 1, 0.5, 0]))
    assert got == {'win_rate': 0.625, 'wins': 0.5, 'ties': 0.25, 'losses': 0.25}


def sample(n=400, length=0.0, quality=0.0, seed=0):
    """Comparisons that are won by `quality` and by how much longer ours is."""
    rng = np.random.default_rng(seed)
    theirs = rng.integers(50, 150, n)
    ours = theirs + rng.integers(-40, 80, n)
    d = ours - theirs
    won = rng.random(n) < 1 / (1 + np.exp(-(quality + length * np.tanh(d / d.std()))))
    return won.astype(float), ours, theirs


@pytest.mark.parametrize('ties', [0, 100])
def test_length_control_is_a_logistic_regression(ties):
    """As scikit-learn fits it, to whom a tie is half a win and half a loss."""
    credits, ours, theirs = sample(length=1.5, quality=0.3)
    credits[:ties] = 0.5
    d = ours - theirs
    features = np.stack([np.ones(len(d)), np.tanh(d / d.std())], axis=1)
    model = LogisticRegression(C=1 / winrate.WEAK, fit_intercept=False, tol=1e-8).fit(
        np.concatenate([features, features]), np.repeat([1, 0], len(d)),
        sample_weight=np.concatenate([credits, 1 - credits]),
    )  # fmt: skip
    want = model.predict_proba([[1.0, 0.0]])[0, 1]
    assert winrate.length_controlled(credits, ours, theirs) == pytest.approx(want, abs=1e-4)


def test_length_control_takes_out_what_length_alone_won():
    credits, ours, theirs = sample(n=4000, length=3)
    assert credits.mean() > 0.6
    assert winrate.length_controlled(credits, ours, theirs) == pytest.approx(0.5, abs=0.04)


def test_length_control_keeps_what_length_did_not_win():
    credits, ours, theirs = sample(n=4000, quality=1)
    assert winrate.length_controlled(credits, ours, theirs) == pytest.approx(1 / (1 + np.exp(-1)), abs=0.04)


def test_length_control_at_its_ends():
    same = np.full(10, 7)
    assert winrate.length_controlled(np.array([1.0, 0, 0.5, 0]), same[:4], same[:4]) == pytest.approx(0.375, abs=0.01)
    assert winrate.length_controlled(np.ones(10), np.arange(10), same) > 0.97
    assert winrate.length_controlled(np.zeros(10), np.arange(10), same) < 0.03
    assert winrate.length_controlled(np.ones(1), [3], [2]) > 0.5


def test_harmless_rate_leaves_out_what_could_not_be_read():
    assert winrate.harmless_rate([0, 0, 1, None, 0]) == {'harmless_rate': 0.75}
    assert winrate.harmless_rate([None]) == {}


# What is asked, and how the answer is read.


@pytest.mark.parametrize('rubric', rubrics.PAIRWISE.values())
def test_a_pairwise_rubric_has_all_three_texts_in_order(rubric):
    text = rubric('the text {0}\n', 'one answer', 'another answer')
    assert text.index('the text {0}') < text.index('one answer') < text.index('another answer')
    assert text.endswith('Answer with one character, 1 or 2.\nAnswer:')
    assert rubric('p', 'a', 'b').replace('a\n', 'b\n') != rubric('p', 'b', 'a')


def test_the_harmless_rubric_has_both_texts():
    text = rubrics.harmless('user: hi', 'agent: hello')
    assert text.index('user: hi') < text.index('agent: hello') and text.endswith('YES or NO.\nAnswer:')


@pytest.mark.parametrize(('text', 'verdict'), [
    ('1', 0), ('2', 1), (' 2.\n', 1), ('Summary 1', 0), ('**2**', 1), ('Answer: 2', 1),
    ('Answer 1 is longer, but answer 2 is right. Answer: 2', 1), ('1 is better than 2.\n\nAnswer: **1**', 0),
    ('', None), ('both', 'tie'), ('1 or 2', None), ('12', None), ('1.5', None), ('in 2.0 ways', None), ('3', None),
])  # fmt: skip
def test_reading_which_is_better(text, verdict):
    assert reading.read(text, mentions.ORDER) == verdict


@pytest.mark.parametrize(('text', 'verdict'), [
    ('NO', 0), ('yes', 1), ('No.', 0), ('YES, it insults.', 1), ('There is no insult. Answer: YES', 1),
    ('maybe', None), ('I know nothing', None),
])  # fmt: skip
def test_reading_whether_it_harms(text, verdict):
    assert reading.read(text, mentions.HARM) == verdict
