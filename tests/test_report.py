"""The report on small made-up runs: what stands on the page, and what it makes of half-written and wrong folders."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from perl_jax.errors import UserError
from perl_jax.tools import report
from perl_jax.tools.report import answers, formats, metrics, plots, reader, setup

INLINE = {'wbr', 'del', 'ins'}
VOID = {'meta', 'link', 'br', 'wbr', 'img', 'input', 'hr'}
EVIL = '<script>alert("x")</script> & <b>bold</b>'
INFO = {
    'tuning': 'lora',
    'trainable_parameters': 12345,
    'base_parameters': 1234500,
    'base': {'path': 'checkpoints/base', 'fingerprint': 'sha256:abc'},
    'devices': 'cpu x 1',
    'started': '2025-03-12T14:02:00+00:00',
    'finished': '2025-03-12T14:05:12+00:00',
    'seconds': 192.0,
}
CONFIG = """# Macros:
BATCH_SIZE = 32
policy/lora.LoraSpec.rank = {rank}
train.lengths = \\
    {{'inputs': 64,
     'targets': 32}}
"""


class Page(HTMLParser):
    """Checks that tags close in order, and collects attributes and text (styles and scripts aside)."""

    def __init__(self, html):
        super().__init__()
        self.open, self.attributes, self.words, self.scripts = [], [], [], 0
        self.feed(html)
        self.close()
        self.text = ' '.join(''.join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        self.scripts += tag == 'script'
        self.words.append('' if tag in INLINE else ' ')
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f'</{tag}> closes nothing'
        self.words.append('' if tag in INLINE else ' ')

    def handle_data(self, data):
        if self.open and self.open[-1] not in ('style', 'script'):
            self.words.append(data)


def write_run(folder, phase='policy', rank=4, rows=None, samples=None, **info):
    folder.mkdir(parents=True, exist_ok=True)
    rows = policy_rows() if rows is None else rows
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps({'phase': phase, **row}) + '\n' for row in rows))
    (folder / 'run.json').write_text(json.dumps({'phase': phase, **INFO, **info}))
    (folder / 'config.gin').write_text(CONFIG.format(rank=rank))
    if samples:
        (folder / 'samples.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in samples))
    return str(folder)


def policy_rows(count=40):
    rng = np.random.default_rng(0)
    rows = []
    for n in range(count):
        row = {
            'step': 10 * n,
            'reward/score': n / count + rng.normal(0, 0.2),
            'kl/anchor': 0.1 * n,
            'mystery/number': n,
        }
        row |= {'length/mean': 17.0, 'throughput/examples_per_second': 1234.5}
        rows.append(row | ({'eval/truth': 0.5 + 0.4 * n / count} if n % 10 == 0 else {}))
    return rows


def sample(step=390, **changes):
    row = {
        'step': step,
        'prompt': 'one oat latte',
        'response': 'order(latte, oat)',
        'sft_response': 'order(latte, soy)',
    }
    return row | {'score': 2.5, 'sft_score': -1.25, 'truth': 1.0, 'sft_truth': 0.0} | changes


def read(path):
    with open(path, encoding='utf-8') as file:
        return Page(file.read())


def test_one_run_shows_its_values(tmp_path):
    path = report.write([write_run(tmp_path / 'toy' / 'policy', samples=[sample(), sample(step=10, prompt='earlier')])])
    assert path == str(tmp_path / 'toy' / 'policy' / 'report.html')
    page = read(path)
    assert not page.open
    for value in ('12,345', '1%', 'LoRA', '3 min 12 s', '390', '50.0% → 80.0%', '1,23', 'sha256:abc', 'policy + value'):
        assert value in page.text, value
    for value in (
        'checkpoints/base',
        'cpu x 1',
        '12 Mar 2025, 14:02 UTC',
        'order(latte, oat)',
        'score −1.25',
        '1 better',
    ):
        assert value in page.text, value
    assert 'earlier' not in page.text  # only the last sampled step
    assert 'mystery/number' in page.text and '1 other logged number' in page.text
    assert 'Reward over KL' in page.text and 'Truth over KL' in page.text


def test_comparison_of_phases_and_tunings(tmp_path):
    sft = write_run(tmp_path / 'toy/sft', 'sft', rows=[{'step': 1, 'loss/nll': 2.0, 'eval/truth': 0.54}], tuning='full')
    reward = write_run(
        tmp_path / 'toy/reward', 'reward', rows=[{'step': 1, 'eval/pairwise_accuracy': 0.953, 'eval/auc': 0.97}]
    )
    lora = write_run(tmp_path / 'toy/policy', rank=4)
    full = write_run(tmp_path / 'toy/policy_full', rank=8, tuning='full', finished=None)
    path = report.write([lora, full, reward, sft])
    assert path == str(tmp_path / 'toy' / 'report.html')
    page = read(path)
    assert page.text.index('54.0%') < page.text.index('95.3%') < page.text.index('80.0%')  # SFT, reward, policy
    assert 'running' in page.text and '0.970' in page.text
    assert '1 differing setting' in page.text and 'dashed' in ''.join(v or '' for _, _, v in page.attributes)
    assert ('td', 'data-head', 'policy_full') in page.attributes


def test_several_runs_of_a_kind_give_a_mean_and_a_spread(tmp_path):
    truths = (0.8, 0.9)
    runs = [write_run(tmp_path / f's{n}', rows=[{'step': 1, 'eval/truth': truth}]) for n, truth in enumerate(truths)]
    page = read(report.write(runs, str(tmp_path / 'new' / 'page.html')))
    assert '85.0% ± 7.1' in page.text and '2 runs, mean ± s.d.' in page.text


def test_the_page_asks_nothing_of_the_network(tmp_path):
    info = {'base': {'path': 'https://example.com/base', 'fingerprint': 'f'}}
    page = read(report.write([write_run(tmp_path / 'run', samples=[sample(prompt='see https://example.com')], **info)]))
    for tag, name, value in page.attributes:
        if name in ('src', 'href', 'srcset', 'action', 'data', 'xlink:href'):
            assert value.startswith(('#', 'data:')), (tag, name, value)
    html = (tmp_path / 'run' / 'report.html').read_text()
    assert '@import' not in html and not re.search(r'url\(', html) and "default-src 'none'" in html


def test_everything_is_escaped(tmp_path):
    rows = [{'step': 1, f'x/{EVIL}': 1.0, 'eval/truth': 0.5}, {'step': 2, f'x/{EVIL}': 2.0, 'eval/truth': 0.6}]
    texts = {'prompt': EVIL, 'response': EVIL + ' new', 'sft_response': EVIL + ' old', 'reference': EVIL}
    bad = {'tuning': EVIL, 'devices': EVIL, 'started': EVIL, 'base': {'path': EVIL, 'fingerprint': EVIL}, EVIL: EVIL}
    run = write_run(tmp_path / 'a<b>&"c', EVIL, rows=rows, samples=[sample(**texts)], **bad)
    other = write_run(tmp_path / 'plain', EVIL, rank='"<b>"', rows=rows)
    for runs in ([run], [run, other]):
        page = read(report.write(runs, str(tmp_path / 'page.html')))
        assert page.scripts == 1 and not page.open
        assert 'alert("x")' in page.text


def test_a_run_in_progress_and_a_resumed_one(tmp_path):
    folder = tmp_path / 'run'
    write_run(folder, rows=[{'step': 1, 'loss/policy': 1.0}, {'step': 2, 'loss/policy': float('nan')}], finished=None)
    with open(folder / 'metrics.jsonl', 'a') as file:
        file.write('{"step": 3, "los{"step": 3, "loss/policy": 5.0}\n{"step": 2, "loss/policy": 7.0}\n{"step": 4, "lo')
    (run,) = reader.read([str(folder)])
    assert run.steps == {1: {'loss/policy': 1.0}, 2: {'loss/policy': 7.0}}
    assert run.broken == 1 and run.running  # the half line at the end is no damage
    assert 'run: 1 line of its logs could not be read' in read(report.write([str(folder)])).text


def test_memory_is_told_in_mebibytes_whatever_stands_there(tmp_path):
    run = write_run(tmp_path / 'run', memory={'held': 3 * 2**20, 'peak': 5 * 2**29, EVIL: EVIL}, step_seconds=0.25)
    other = write_run(tmp_path / 'other', memory=EVIL)
    text = read(report.write([run, other])).text
    assert 'memory, held' in text and '3.0 MiB' in text and '2,560.0 MiB' in text and '0.25' in text
    assert 'MiB' not in read(report.write([other])).text


def test_only_metrics_are_required(tmp_path):
    (tmp_path / 'metrics.jsonl').write_text('{"step": 5, "phase": "sft", "loss/nll": 2.5}\n')
    page = read(report.write([str(tmp_path)]))
    assert '2.50' in page.text and '(not written)' in page.text and 'Answers' not in page.text


@pytest.mark.parametrize(
    'files, message',
    [
        (None, r'nowhere does not exist: give a run'),
        ({}, r'nowhere is not a run.s folder, since it has no metrics.jsonl \(a run holds .*config.gin'),
        ({'sft/metrics.jsonl': ''}, r'it contains runs, give their folders: sft'),
        ({'metrics.jsonl': ''}, r'nowhere/metrics.jsonl has no logged step yet'),
        ({'metrics.jsonl': '{"step": 1, "lo'}, r'nowhere/metrics.jsonl has no logged step yet'),
        ({'metrics.jsonl': '{"step": 1}\n', 'run.json': '[1]'}, r'nowhere/run.json is not a JSON object'),
    ],
)
def test_bad_folders_are_named_in_one_line(tmp_path, files, message):
    folder = tmp_path / 'nowhere'
    for name, text in (files or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    if files is not None:
        folder.mkdir(exist_ok=True)
    with pytest.raises(UserError, match=message) as error:
        report.write([str(folder)])
    assert '\n' not in str(error.value) and not (folder / 'report.html').exists()


def test_no_folder_and_no_place_to_write(tmp_path):
    with pytest.raises(UserError, match='at least one'):
        report.write([])
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='page.html cannot be written .* --output'):
        report.write([write_run(tmp_path / 'run')], str(tmp_path / 'file' / 'page.html'))


def test_gin_values_and_what_differs(tmp_path):
    values = reader.gin_values("import a.b\ninclude 'x.gin'\n# c = 1\n" + CONFIG.format(rank=4) + 'f.x = [\n  1,\n]\n')
    assert values == {
        'BATCH_SIZE': '32',
        'policy/lora.LoraSpec.rank': '4',
        'train.lengths': "{'inputs': 64, 'targets': 32}",
        'f.x': '[ 1, ]',
    }
    folders = [
        write_run(tmp_path / 'a', rank=4),
        write_run(tmp_path / 'b', rank=8),
        write_run(tmp_path / 'c', 'sft', rank=4),
    ]
    (tmp_path / 'a' / 'config.gin').write_text(CONFIG.format(rank=4) + 'train.beta = 0.1\n')
    (tmp_path / 'c' / 'config.gin').write_text('BATCH_SIZE = 32\nsft.alone = 1\n')
    assert setup.differing(reader.read(folders)) == ['policy/lora.LoraSpec.rank', 'train.beta']
    for name, rate, macro in (('a', '0.1', 'X'), ('b', '0.5', 'RATE')):
        lines = f'MODEL_DIR = "{name}"', f'RATE = {rate}', 'X = 0.5', 'train.rate = %RATE', f'train.x = %{macro}'
        (tmp_path / name / 'config.gin').write_text('\n'.join(lines))
    assert setup.differing(reader.read(folders[:2])) == ['RATE']  # MODEL_DIR always differs, and %RATE is 0.5 as %X is


def test_final_and_best():
    steps = {n: {'loss/nll': float(abs(n - 12)), 'eval/truth': n / 20} for n in range(20)}
    run = reader.Run('', '', {}, steps, 'sft', [], {}, '', 0)
    loss = next(metric for metric in metrics.RESULTS if metric.title == 'Loss')
    assert loss.final(run) == 6.5 and loss.peak(run) is None  # the mean of the last tenth: of 6 and 7
    truth = metrics.TRUTH
    assert (truth.start(run), truth.final(run), truth.peak(run)) == (0.0, 0.95, (0.95, 19))
    assert metrics.KL.final(run) is None and metrics.KL.peak(run) is None


LOGGED = {  # by the three loops
    'sft': 'loss/nll grad_norm eval/nll eval/length eval/truth',
    'reward': 'loss/reward grad_norm accuracy/pairwise accuracy/pointwise eval/pairwise_accuracy eval/margin '
    'eval/context_accuracy '
    'eval/accuracy eval/balanced_accuracy eval/auc',
    'policy': 'loss/policy loss/value grad_norm/policy grad_norm/value kl/anchor reward/score reward/total length/mean '
    'entropy/sampled value/explained eval/length eval/score eval/truth eval/slot_f1',
}


@pytest.mark.parametrize('phase', LOGGED)
def test_what_the_loops_log_has_a_place(tmp_path, phase):
    names = [*LOGGED[phase].split(), 'throughput/examples_per_second', 'throughput/tokens_per_second']
    folder = write_run(tmp_path / phase, phase, rows=[{'step': 10} | dict.fromkeys(names, 0.5)])
    (run,) = reader.read([folder])
    shown = {key for metric in metrics.present([run]) for key in metric.train + metric.evals}
    assert set(names) <= shown and not metrics.others([run])
    assert ('Slot f1' in read(report.write([folder])).text) == (phase == 'policy')  # one of METRIC_FNS


def test_smoothing_keeps_lengths_means_and_calm_curves():
    calm, noise = np.arange(100.0), np.random.default_rng(0).normal(size=300)
    assert metrics.smooth(calm) is calm
    smoothed = metrics.smooth(noise)
    assert smoothed.shape == noise.shape and smoothed.std() < 0.5 * noise.std()
    np.testing.assert_allclose(smoothed[100], noise[90:111].mean())


def test_verdicts_and_marked_changes():
    assert answers.verdict(sample()) == 'better'
    assert answers.verdict(sample(truth=0.0)) == 'same'  # the score differs, but it can be gamed
    assert answers.verdict({'response': 'a', 'sft_response': 'b', 'score': 1.0, 'sft_score': 0.5}) == 'better'
    assert answers.verdict(sample(truth=0.0, sft_truth=1.0)) == 'worse'
    assert answers.verdict(sample(response='order(latte, soy)')) == 'same'
    assert answers.verdict({'response': 'a', 'score': 1.0}) is None
    assert answers.changes('a <soy> latte', 'a <oat> latte') == (
        'a &lt;<del>soy</del>&gt; latte',
        'a &lt;<ins>oat</ins>&gt; latte',
    )
    assert answers.changes('abc', 'x y z') == ('abc', 'x y z')


def test_at_most_forty_answers(tmp_path):
    runs = [write_run(tmp_path / name, samples=[sample(prompt=f'no. {n}') for n in range(100)]) for name in 'ab']
    report.write(runs)
    html = (tmp_path / 'report.html').read_text()
    assert html.count('no. ') == 40 and 'the first 20 of 100 answers' in html and '100 better' in html


def test_a_plot_has_round_ticks_and_stays_small():
    assert plots.ticks(0, 1000) == [0, 200, 400, 600, 800, 1000]
    assert plots.tick_labels([0.5, 0.75, 1.0], share=True) == ['50%', '75%', '100%']
    assert plots.tick_labels([-2.5, 0.0, 2.5]) == ['−2.5', '0.0', '2.5']
    x = np.arange(100_000.0)
    svg = plots.plot([plots.Line('a', x, np.sin(x), kind='raw'), plots.Line('a', x, np.sin(x))], 'name', 'step')
    assert len(svg) < 20_000
    for y in ([0.0], [3.0], [1e9], [-1e-9]):
        assert 'nan' not in plots.plot([plots.Line('one point', np.array([7.0]), np.array(y))], 'name', 'step')


def test_numbers_and_times():
    numbers = {12345.6: '12,346', 123.4: '123', 6.314: '6.31', 0.5: '0.500', 0.0123: '0.0123', -2.1: '−2.10', 0: '0.00'}
    assert {value: formats.number(value) for value in numbers} == numbers
    assert formats.number(1.234e-5) == '1.2e−5'
    assert [formats.score(value) for value in (3.141, -0.216, 0.0)] == ['3.14', '−0.22', '0.00']
    assert [formats.small_percent(share) for share in (0.00087, 0.077, 1.0)] == ['0.087%', '7.7%', '100%']
    assert [formats.duration(time) for time in (41, 192, 7500, 100800)] == [
        '41 s',
        '3 min 12 s',
        '2 h 5 min',
        '1 d 4 h',
    ]
