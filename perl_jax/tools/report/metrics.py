"""The report's metrics: titles, units, whether higher is better, and how a curve is summarized by one number."""

import dataclasses
from collections.abc import Callable

import numpy as np

from perl_jax.tools.report.formats import number, percent
from perl_jax.tools.report.reader import Run


@dataclasses.dataclass(frozen=True)
class Metric:
    """One quantity of the report: a column of the summary and a panel of curves.

    Attributes:
      title: the panel's title.
      train: keys of training metrics in metrics.jsonl; the first that a run has is used.
      evals: keys of evaluation metrics; likewise.
      unit: the unit, for the panel.
      best: max or min, whichever is better; None if neither is.
      column: the summary's heading; '' for no column.
      zero: whether the axis starts at 0.
      note: an explanation for newcomers.
    """

    title: str
    train: tuple[str, ...] = ()
    evals: tuple[str, ...] = ()
    unit: str = ''
    best: Callable | None = None
    column: str = ''
    zero: bool = False
    note: str = ''

    @property
    def share(self) -> bool:
        """Tell whether the metric is a share between 0 and 1, shown in percent."""
        return self.unit.startswith('share of')

    def show(self, value: float) -> str:
        """Format a value, without its unit."""
        return percent(value) if self.share else number(value)

    def curves(self, run: Run) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return {'train': (steps, values), 'eval': (steps, values)}, each only if the run logged it."""
        curves = {}
        for kind, keys in (('train', self.train), ('eval', self.evals)):
            candidates = (run.series(key) for key in keys)
            points = next((points for points in candidates if len(points[0])), None)
            if points:
                curves[kind] = points
        return curves

    def final(self, run: Run) -> float | None:
        """Return the last evaluation, else the mean over the last tenth of the logged steps; None without either."""
        curves = self.curves(run)
        if 'eval' in curves:
            return float(curves['eval'][1][-1])
        if 'train' in curves:
            values = curves['train'][1]
            return float(values[-max(len(values) // 10, 1) :].mean())
        return None

    def start(self, run: Run) -> float | None:
        """Return the evaluation at step 0, of the model that a policy starts from; None without one."""
        steps, values = self.curves(run).get('eval', (np.zeros(0), np.zeros(0)))
        return float(values[0]) if len(steps) and steps[0] == 0 else None

    def peak(self, run: Run) -> tuple[float, int] | None:
        """Return the best evaluation and its step; None without evaluations or if neither direction is better."""
        steps, values = self.curves(run).get('eval', (np.zeros(0), np.zeros(0)))
        if self.best is None or not len(steps):
            return None
        index = int(np.argmax(values) if self.best is max else np.argmin(values))
        return float(values[index]), int(steps[index])


# fmt: off
TRUTH = Metric(
    'Truth', (), ('eval/truth',), 'share of answers that are right', max, 'Truth',
    note="The task's own check of an answer, which nothing in training sees.",
)
REWARD = Metric(
    'Reward', ('reward/score',), ('eval/score',), 'score of an answer', max, 'Reward',
    note="The reward of the policy's answers. It is the training objective, so unlike the truth it can be gamed.",
)
KL = Metric(
    'KL to the anchor', ('kl/anchor',), (), 'nats per answer', None, 'KL, nats/answer', zero=True,
    note="How far the policy has moved from its start: log π − log anchor, summed over an answer's tokens, "
    'as a mean over sampled answers.',
)
RESULTS = (
    TRUTH,
    Metric(
        'Pairwise accuracy', ('accuracy/pairwise',), ('eval/pairwise_accuracy',), 'share of pairs', max,
        'Pairwise acc.', note='How often the preferred answer of a pair gets the higher score; chance is 50%.',
    ),
    Metric(
        'Accuracy by context', (), ('eval/context_accuracy',), 'share of pairs, each prompt once', max, 'By context',
        note='The same, where a prompt with many pairs counts no more than one with a single pair.',
    ),
    Metric(
        'Margin', (), ('eval/margin',), 'score, mean over pairs', None, 'Margin',
        note='By how much the preferred answer of a pair scores above the other.',
    ),
    Metric(
        'Accuracy', ('accuracy/pointwise',), ('eval/accuracy',), 'share of answers', max, 'Accuracy',
        note='How often thumbs up or down is predicted correctly.',
    ),
    Metric(
        'Balanced accuracy', (), ('eval/balanced_accuracy',), 'share of answers', max, 'Balanced acc.',
        note='The mean of the accuracies on good and on bad answers; chance is 50%.',
    ),
    Metric(
        'AUC', (), ('eval/auc',), 'area under the ROC curve', max, 'AUC',
        note='How often a good answer gets a higher score than a bad one; chance is 0.5.',
    ),
    Metric(
        'Loss', ('loss/nll',), ('eval/nll',), 'nats per token', min, 'Loss, nats/token',
        note='Negative log-likelihood of the demonstrations.',
    ),
    Metric(
        'Reward loss', ('loss/reward',), (), 'nats per example', min, 'Loss, nats',
        note='Negative log-likelihood of the preferences; of pairs and thumbs together, the sum.',
    ),
    REWARD,
)
PROGRESS = (
    Metric(
        'Reward less KL penalty', ('reward/total',), (), 'score of an answer', max,
        note='(1 − β) reward − β KL: what the policy is trained to raise.',
    ),
    KL,
    Metric(
        'Answer length', ('length/mean',), ('eval/length',), 'tokens, mean', None, 'Length, tokens',
        note='In reinforcement learning a jump often means that the policy games the reward.',
    ),
    Metric(
        'Entropy', ('entropy/sampled',), (), 'nats per token', zero=True,
        note='The mean −log π of the sampled tokens; near 0 the policy has one answer to each prompt.',
    ),
    Metric(
        'Explained by the value', ('value/explained',), (), "of the returns' variance",
        note='1: the baseline foresees every return; 0: no better than a constant; below 0: worse. '
        'Where few answers still differ it is near 0, and a short run may never leave it.',
    ),
    Metric('Policy loss', ('loss/policy',), note='Noisy by nature: the reward and the KL tell more.'),
    Metric(
        'Value loss', ('loss/value',), (), 'squared score, sum over an answer', zero=True,
        note='The error of the baseline that steadies the policy gradient.',
    ),
    Metric('Gradient norm', ('grad_norm',), zero=True, note='Spikes mean unstable training.'),
    Metric('Gradient norm, policy', ('grad_norm/policy',), zero=True, note='Spikes mean unstable training.'),
    Metric('Gradient norm, value', ('grad_norm/value',), zero=True, note='Of the value baseline.'),
    Metric(
        'Throughput', ('throughput/examples_per_second',), (), 'examples per second', None, 'Examples/s', zero=True,
        note='Of demonstrations, pairs and thumbs, or sampled answers. The first logged step includes compilation.',
    ),
    Metric('Token throughput', ('throughput/tokens_per_second',), (), 'tokens per second', zero=True),
)
KNOWN = {key for metric in RESULTS + PROGRESS for key in metric.train + metric.evals}
# fmt: on


def present(runs: list[Run]) -> list[Metric]:
    """Return the metrics that at least one run logged: results, other evaluations (METRIC_FNS), progress."""
    results, progress = ([m for m in group if any(m.curves(run) for run in runs)] for group in (RESULTS, PROGRESS))
    names = dict.fromkeys(key[5:] for key in _unknown(runs) if key.startswith('eval/'))
    titles = {name: name[:1].upper() + name[1:].replace('_', ' ') for name in names}
    return results + [Metric(title, (n,), (f'eval/{n}',), column=title) for n, title in titles.items()] + progress


def others(runs: list[Run]) -> list[Metric]:
    """Return a metric for every other key that training logged."""
    names = _unknown(runs)
    return [Metric(name, (name,)) for name in names if not name.startswith('eval/') and f'eval/{name}' not in names]


def _unknown(runs):
    return dict.fromkeys(key for run in runs for key in run.keys if key not in KNOWN)


def smooth(values: np.ndarray) -> np.ndarray:
    """Smooth values [n] by a centred mean over about a fifteenth of the points, over fewer at the ends.

    Fewer than 15 points, or smooth ones (second differences under 2% of the range), are returned unchanged.
    """
    count, half_width = len(values), max(len(values) // 30, 1)
    value_range = np.ptp(values) if count else 0.0
    if count < 15 or not value_range or np.abs(np.diff(values, 2)).mean() < 0.02 * value_range:
        return values
    cumulative = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(count)
    low, high = np.maximum(index - half_width, 0), np.minimum(index + half_width + 1, count)
    return (cumulative[high] - cumulative[low]) / (high - low)
