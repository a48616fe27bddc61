"""Gold truth against proxy reward as a policy moves away from its anchor: one reward, an ensemble, their average.

    python benchmarks/overoptimization.py --sft=SFT_RUN --rewards=RUN,RUN,... --output=DIR [--prompts=256 --samples=256]

Each of --rewards is an ensemble run (tuning/lora_ensemble.gin) on SFT_RUN. Best-of-n against the SFT policy makes the
KL grow, log n - (n - 1) / n nats (Stiennon et al. 2020; Gao et al. 2022, arXiv 2210.10760): one pool of answers serves
every n and every reward. What the best of n would be worth is exact over the pool: of --samples answers ranked by the
proxy, the i-th from below is the best of n drawn without replacement with probability C(i - 1, n - 1) / C(samples, n).

Writes DIR/overoptimization.csv and .png and prints the tables of docs/overoptimization.md. Gold is the grammar's truth:
1 for exactly what was meant, else 0. `gain` is gold less the mean of the run's members, `over_best` less the best of
them at that n (which only the truth can tell), both prompt by prompt.
"""

import argparse
import csv
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from scipy.special import gammaln

import perl_jax.tasks.toy  # noqa: F401 (registers the tasks)
from perl_jax.cli import configure
from perl_jax.data import datasets
from perl_jax.models import averaging, lora
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.rewards import ensembles
from perl_jax.rewards.scoring import member_scores
from perl_jax.rl.sampling import SamplingConfig, sample
from perl_jax.runs import base as bases
from perl_jax.runs import finished
from perl_jax.tasks import toy_grammar

BATCH = 8
AGGREGATES = {
    'mean': ensembles.mean,
    'minimum': ensembles.minimum,
    'median': ensembles.median,
    'mean - variance': functools.partial(ensembles.lower_bound, penalty=0.5),
}
COLORS = {'member': '#5d6b7a', 'mean': '#2166c4', 'minimum': '#1b8a5a', 'median': '#0f8f9c',
          'mean - variance': '#a23bb0', 'weight average': '#d9661f'}  # fmt: skip
SHOWN = (1, 4, 8, 16, 64, 256)  # of the n in the tables


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ('--sft', '--rewards', '--output'):
        parser.add_argument(name, required=True)
    parser.add_argument('--prompts', type=int, default=256)
    parser.add_argument('--samples', type=int, default=256)
    args = parser.parse_args()
    os.makedirs(args.output, exist_ok=True)
    folders = args.rewards.split(',')
    config = os.path.join(folders[0], 'config.gin')
    bindings = ['base.BaseConfig.network = %NETWORK', f"base.BaseConfig.path = '{args.sft}'"]
    base = configure.configured('base.BaseConfig', [config], bindings, [])()
    rows = []
    with Partitioner().scope():
        frozen = bases.load(base, Partitioner(), 0)
        members = {folder: read(folder) for folder in folders}
        gold, scores = pool(base.network, frozen, members, args.prompts, args.samples)
    for folder, proxies in scores.items():
        rows += [{'run': folder, **row} for row in compare(proxies, gold)]
    with open(os.path.join(args.output, 'overoptimization.csv'), 'w') as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator='\n')
        writer.writeheader()
        writer.writerows({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    figure(rows).savefig(os.path.join(args.output, 'overoptimization.png'), dpi=90)
    print(*tables(rows), sep='\n')


def read(folder: str) -> list[lora.Adapter]:
    """The members of an ensemble run, and last their weight average."""
    adapters, _ = finished.read_adapters(folder, phase='reward', flag='--rewards')
    members = list(adapters.values())
    return [*members, averaging.concatenate(members, [1 / len(members)] * len(members))]


def pool(network, frozen: bases.Base, members: Mapping[str, list[lora.Adapter]], prompts: int, samples: int):
    """Answers of the SFT policy to test prompts: gold [N, K], and {run: {reward: proxy [N, K]}}."""
    config = datasets.DatasetConfig('toy_prompts', {'inputs': 26}, BATCH, 'test', limit=prompts)
    heldout = datasets.load(config, 'prompts')
    sampling = SamplingConfig(num_samples=samples, max_decode_length=24, temperature=1.0)
    ends = heldout.eos_ids
    draw = jax.jit(lambda params, batch, key: sample(network, {'params': params}, batch, key, ends, sampling))
    judge = jax.jit(functools.partial(member_scores, network))
    gold, found = [], {folder: [] for folder in members}
    for i, (batch, examples, n) in enumerate(heldout.batches(BATCH)):
        rollout = draw(frozen.params, batch, jax.random.fold_in(jax.random.key(0), i))
        texts = datasets.decode(heldout.vocabulary, rollout)
        gold += [[toy_grammar.truth('', text, e) for text in row] for row, e in zip(texts[:n], examples)]
        for folder, adapters in members.items():
            found[folder].append(np.asarray(judge(frozen.params, adapters, rollout))[:, :n])
        print(f'{(i + 1) * BATCH} prompts', flush=True)
    scores = {}
    for folder, parts in found.items():
        every = np.concatenate(parts, axis=1)
        single, average = every[:-1], every[-1]
        scores[folder] = {f'member {m}': single[m] for m in range(len(single))}
        scores[folder] |= {name: np.asarray(aggregate(single)) for name, aggregate in AGGREGATES.items()}
        scores[folder]['weight average'] = average
    return np.array(gold), scores


def compare(proxies: Mapping[str, np.ndarray], gold: np.ndarray) -> list[dict[str, Any]]:
    """The best of n by each reward of one ensemble, beside the best of n by its members on the same answers.

    Args:
      proxies: each reward's scores [N, K]; 'member 0', .. are the members.
      gold: the truth of those answers [N, K].

    Returns:
      For each reward and n: reward, n, kl, the mean proxy, and gold, gain and over_best with their standard errors, all
      over prompts.
    """
    points = {name: best_of_n(proxy, gold) for name, proxy in proxies.items()}
    rows = []
    for name, each in points.items():
        for i, point in enumerate(each):
            members = [points[member][i]['gold'] for member in points if kind(member) == 'member']
            by_prompt = {
                'gold': point['gold'],
                'gain': point['gold'] - np.mean(members, axis=0),
                'over_best': point['gold'] - max(members, key=np.mean),
            }
            row = {'reward': name, 'n': point['n'], 'kl': point['kl'], 'proxy': float(point['proxy'].mean())}
            for key, values in by_prompt.items():
                row |= {key: float(values.mean()), f'{key}_se': float(values.std() / len(values) ** 0.5)}
            rows.append(row)
    return rows


def best_of_n(proxy: np.ndarray, gold: np.ndarray) -> list[dict[str, Any]]:
    """What the best of n by the proxy is worth, n = 1, 2, 4, ...: n, kl, and proxy and gold of each prompt, [N]."""
    K = proxy.shape[1]
    order = np.argsort(proxy, axis=1, kind='stable')
    ranked = {name: np.take_along_axis(x, order, axis=1) for name, x in (('proxy', proxy), ('gold', gold))}
    # Proxies in each prompt's own standard deviations, so that rewards of other scales are drawn on one axis.
    ranked['proxy'] = (ranked['proxy'] - proxy.mean(1, keepdims=True)) / (proxy.std(1, keepdims=True) + 1e-6)
    points, i = [], np.arange(1, K + 1)
    for n in 2 ** np.arange(int(np.log2(K)) + 1):
        with np.errstate(divide='ignore', invalid='ignore'):
            log = gammaln(i) - gammaln(n) - gammaln(i - n + 1) - (gammaln(K + 1) - gammaln(n + 1) - gammaln(K - n + 1))
        weight = np.where(i >= n, np.exp(log), 0.0)
        point = {'n': int(n), 'kl': float(np.log(n) - (n - 1) / n)}
        points.append(point | {name: (x * weight).sum(1) for name, x in ranked.items()})
    return points


def kind(name: str) -> str:
    """A reward's name without its number: 'member 3' is a 'member'."""
    return name.rstrip('0123456789 ')


def tables(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """In Markdown: gold, its mean and range over runs; gain and over_best, in points, their mean and each run's."""
    runs = list(dict.fromkeys(row['run'] for row in rows))
    shown = [n for n in SHOWN if n in {row['n'] for row in rows}]
    # In order of gold the last one stays: of the members the best at that n.
    points = {(kind(row['reward']), row['n'], row['run']): row for row in sorted(rows, key=lambda row: row['gold'])}
    cells = {name: {n: [points[name, n, run] for run in runs] for n in shown} for name in COLORS}
    baseline = {n: [row | {'gold': row['gold'] - row['gain']} for row in cell] for n, cell in cells['mean'].items()}
    best, ensemble, beyond = {'best member': cells.pop('member')}, cells, shown[1:]  # of n = 1 all take any answer
    return [
        *table('exactly right', 'gold', shown, {"members' mean": baseline} | best | ensemble, span),
        *table("points above the members' mean", 'gain', beyond, best | ensemble, apart),
        *table('points above the best member', 'over_best', beyond, ensemble, apart),
    ]


def table(title: str, key: str, shown: Sequence[int], cells: Mapping[str, Any], form: Callable[..., str]) -> list[str]:
    """The lines of one of the tables; `cells` are {reward: {n: [a row of each run]}}."""
    lines = ['', line(title, *(f'n = {n}' for n in shown)), '|---' * (len(shown) + 1) + '|']
    lines += [line(name, *(form([row[key] for row in by_n[n]]) for n in shown)) for name, by_n in cells.items()]
    errors = [100 * row[f'{key}_se'] for by_n in cells.values() for n in shown for row in by_n[n]]
    return [*lines, '', f'Standard error over prompts: {min(errors):.1f} to {max(errors):.1f} points.']


def line(*cells: str) -> str:
    """A row of a table in Markdown."""
    return f'| {" | ".join(cells)} |'


def span(shares: Sequence[float]) -> str:
    """Mean and range."""
    return f'{np.mean(shares):.1%} ({100 * min(shares):.1f}-{100 * max(shares):.1f})'


def apart(shares: Sequence[float]) -> str:
    """Mean and each, in points."""
    return f'{100 * np.mean(shares):+.1f} ({", ".join(f"{100 * share:+.1f}" for share in shares)})'


def figure(rows: Sequence[Mapping[str, Any]]):
    """Proxy, gold and gain against the KL: the mean over runs (and over members), thin lines for each of those."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(14, 4.2), layout='constrained')
    panels = made.subplots(1, 3)
    for panel, what in zip(panels, ('proxy', 'gold', 'gain')):
        for name, color in COLORS.items():
            lines = {}
            for row in rows:
                if kind(row['reward']) == name:
                    lines.setdefault((row['run'], row['reward']), []).append((row['kl'], row[what]))
            if name == 'member' or what == 'gain':
                for line in lines.values():
                    panel.plot(*zip(*line), color=color, alpha=0.35, linewidth=0.8)
            panel.plot(*np.mean(list(lines.values()), axis=0).T, color=color, linewidth=2, marker='o', markersize=3,
                       label={'member': 'one member'}.get(name, name))  # fmt: skip
        panel.set_xlabel('KL to the SFT policy, nats (best of n)')
        panel.spines[['top', 'right']].set_visible(False)
    panels[0].set_title('proxy: the reward that chose, in its own deviations', fontsize=10)
    panels[1].set_title('gold: answers that are exactly right', fontsize=10)
    panels[1].yaxis.set_major_formatter('{x:.0%}')
    panels[2].set_title("gain: points of gold above the ensemble's members", fontsize=10)
    panels[2].yaxis.set_major_formatter(lambda x, _: f'{100 * x:+.0f}')
    panels[0].legend(frameon=False, fontsize=9)
    return made


if __name__ == '__main__':
    main()
