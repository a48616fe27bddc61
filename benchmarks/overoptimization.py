"""Over-optimisation: gold against proxy reward as a policy moves from its anchor, for rewards, ensembles, averages.

    python benchmarks/overoptimization.py --sft=SFT_RUN --rewards=RUN,RUN,... --output=DIR [--prompts=256 --samples=256]

Each of --rewards is an ensemble run (tuning/lora_ensemble.gin) on SFT_RUN. Best-of-n against the SFT policy makes the
KL grow, log n - (n - 1) / n nats (Stiennon et al. 2020; Gao et al. 2022, arXiv 2210.10760). One pool of answers serves
every n and every reward. The expected gold of the best of n is exact over the pool: of --samples answers in ascending
order of the proxy, the i-th is the best of n drawn without replacement with probability
C(i - 1, n - 1) / C(samples, n).

Writes DIR/overoptimization.csv and .png and prints the tables of docs/explanation/overoptimization.md. Gold is the
grammar's truth: 1 for exactly the intended answer, else 0. `gain` is gold minus the mean of the run's members,
`over_best` is gold minus the best member at that n (which only the truth can tell); both are paired by prompt.
"""

import argparse
import csv
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
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
    run_dirs = args.rewards.split(',')
    config = os.path.join(run_dirs[0], 'config.gin')
    bindings = ['base.BaseConfig.network = %NETWORK', f"base.BaseConfig.path = '{args.sft}'"]
    base = configure.configured('base.BaseConfig', [config], bindings, [])()
    rows = []
    with Partitioner().scope():
        loaded_base = bases.load(base, Partitioner(), 0)
        members = {folder: read(folder) for folder in run_dirs}
        gold, scores = sample_pool(base.network, loaded_base, members, args.prompts, args.samples)
    for folder, proxies in scores.items():
        rows += [{'run': folder, **row} for row in compare(proxies, gold)]
    with open(os.path.join(args.output, 'overoptimization.csv'), 'w') as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator='\n')
        writer.writeheader()
        writer.writerows({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    figure(rows).savefig(os.path.join(args.output, 'overoptimization.png'), dpi=90)
    print(*tables(rows), sep='\n')


def read(folder: str) -> list[lora.Adapter]:
    """Read the members of an ensemble run, followed by their weight average."""
    adapters, _ = finished.read_adapters(folder, phase='reward', flag='--rewards')
    members = list(adapters.values())
    return [*members, averaging.concatenate(members, [1 / len(members)] * len(members))]


def sample_pool(
    network, loaded_base: bases.Base, members: Mapping[str, list[lora.Adapter]], prompts: int, samples: int
):
    """Sample answers of the SFT policy to test prompts: returns gold [rows, K] and {run: {reward: proxy [rows, K]}}."""
    config = datasets.DatasetConfig('toy_prompts', {'inputs': 26}, BATCH, 'test', limit=prompts)
    heldout = datasets.load(config, 'prompts')
    sampling = SamplingConfig(num_samples=samples, max_decode_length=24, temperature=1.0)
    eos_ids = heldout.eos_ids
    sample_fn = jax.jit(lambda params, batch, key: sample(network, {'params': params}, batch, key, eos_ids, sampling))
    score_fn = jax.jit(functools.partial(member_scores, network))
    gold, score_batches = [], {folder: [] for folder in members}
    for i, (batch, examples, n) in enumerate(heldout.batches(BATCH)):
        rollout = sample_fn(loaded_base.params, batch, jax.random.fold_in(jax.random.key(0), i))
        texts = datasets.decode(heldout.vocabulary, rollout)
        gold += [[toy_grammar.truth('', text, example) for text in row] for row, example in zip(texts[:n], examples)]
        for folder, adapters in members.items():
            score_batches[folder].append(score_fn(loaded_base.params, adapters, rollout)[:, :n])
        print(f'{(i + 1) * BATCH} prompts', flush=True)
    scores = {}
    for folder, batches in score_batches.items():
        all_scores = jnp.concatenate(batches, axis=1)
        proxies = {f'member {m}': member for m, member in enumerate(all_scores[:-1])}
        proxies |= {name: aggregate(all_scores[:-1]) for name, aggregate in AGGREGATES.items()}
        proxies['weight average'] = all_scores[-1]
        scores[folder] = {name: np.asarray(proxy) for name, proxy in proxies.items()}
    return np.array(gold), scores


def compare(proxies: Mapping[str, np.ndarray], gold: np.ndarray) -> list[dict[str, Any]]:
    """Compare the best of n by each reward of one ensemble with the best of n by its members on the same answers.

    Args:
      proxies: each reward's scores [rows, K]; 'member 0', .. are the members.
      gold: the truth of those answers [rows, K].

    Returns:
      For each reward and n: reward, n, kl, the mean proxy, and gold, gain and over_best with their standard errors, all
      over prompts.
    """
    points = {name: best_of_n(proxy, gold) for name, proxy in proxies.items()}
    rows = []
    for name, reward_points in points.items():
        for i, point in enumerate(reward_points):
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
    """Compute the expected proxy and gold [rows] of the best of n by the proxy, for n = 1, 2, 4, ..., with n and kl."""
    K = proxy.shape[1]
    order = np.argsort(proxy, axis=1, kind='stable')
    ranked = {name: np.take_along_axis(x, order, axis=1) for name, x in (('proxy', proxy), ('gold', gold))}
    # Proxies are standardized by prompt, so that rewards of different scales share an axis.
    ranked['proxy'] = (ranked['proxy'] - proxy.mean(1, keepdims=True)) / (proxy.std(1, keepdims=True) + 1e-6)
    points, ranks = [], np.arange(1, K + 1)
    for n in 2 ** np.arange(int(np.log2(K)) + 1):
        with np.errstate(divide='ignore', invalid='ignore'):
            log_weights = (
                gammaln(ranks)
                - gammaln(n)
                - gammaln(ranks - n + 1)
                - (gammaln(K + 1) - gammaln(n + 1) - gammaln(K - n + 1))
            )
        weights = np.where(ranks >= n, np.exp(log_weights), 0.0)
        point = {'n': int(n), 'kl': float(np.log(n) - (n - 1) / n)}
        points.append(point | {name: (x * weights).sum(1) for name, x in ranked.items()})
    return points


def kind(name: str) -> str:
    """Return a reward's name without its number: 'member' for 'member 3'."""
    return name.rstrip('0123456789 ')


def tables(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Format Markdown tables: gold (mean and range over runs), gain and over_best in points (mean and each run's)."""
    runs = list(dict.fromkeys(row['run'] for row in rows))
    shown_n = [n for n in SHOWN if n in {row['n'] for row in rows}]
    # Later entries overwrite earlier ones, so in order of gold the best member at that n remains.
    points = {(kind(row['reward']), row['n'], row['run']): row for row in sorted(rows, key=lambda row: row['gold'])}
    cells = {name: {n: [points[name, n, run] for run in runs] for n in shown_n} for name in COLORS}
    baseline = {n: [row | {'gold': row['gold'] - row['gain']} for row in cell] for n, cell in cells['mean'].items()}
    best_member, ensemble, beyond_first = (
        {'best member': cells.pop('member')},
        cells,
        shown_n[1:],
    )  # at n = 1 all are equal
    return [
        *table('exactly right', 'gold', shown_n, {"members' mean": baseline} | best_member | ensemble, mean_and_range),
        *table("points above the members' mean", 'gain', beyond_first, best_member | ensemble, mean_and_each),
        *table('points above the best member', 'over_best', beyond_first, ensemble, mean_and_each),
    ]


def table(
    title: str, key: str, shown_n: Sequence[int], cells: Mapping[str, Any], format_cell: Callable[..., str]
) -> list[str]:
    """Return the lines of one table; `cells` are {reward: {n: [a row of each run]}}."""
    lines = ['', line(title, *(f'n = {n}' for n in shown_n)), '|---' * (len(shown_n) + 1) + '|']
    lines += [
        line(name, *(format_cell([row[key] for row in by_n[n]]) for n in shown_n)) for name, by_n in cells.items()
    ]
    errors = [100 * row[f'{key}_se'] for by_n in cells.values() for n in shown_n for row in by_n[n]]
    return [*lines, '', f'Standard error over prompts: {min(errors):.1f} to {max(errors):.1f} points.']


def line(*cells: str) -> str:
    """Return a row of a Markdown table."""
    return f'| {" | ".join(cells)} |'


def mean_and_range(shares: Sequence[float]) -> str:
    """Format the mean and the range of shares."""
    return f'{np.mean(shares):.1%} ({100 * min(shares):.1f}-{100 * max(shares):.1f})'


def mean_and_each(shares: Sequence[float]) -> str:
    """Format the mean and each of the shares, in points."""
    return f'{100 * np.mean(shares):+.1f} ({", ".join(f"{100 * share:+.1f}" for share in shares)})'


def figure(rows: Sequence[Mapping[str, Any]]):
    """Plot proxy, gold and gain against the KL: the mean over runs (and members), with thin lines for each."""
    from matplotlib.figure import Figure

    result = Figure(figsize=(14, 4.2), layout='constrained')
    panels = result.subplots(1, 3)
    for panel, quantity in zip(panels, ('proxy', 'gold', 'gain')):
        for name, color in COLORS.items():
            lines = {}
            for row in rows:
                if kind(row['reward']) == name:
                    lines.setdefault((row['run'], row['reward']), []).append((row['kl'], row[quantity]))
            if name == 'member' or quantity == 'gain':
                for line in lines.values():
                    panel.plot(*zip(*line), color=color, alpha=0.35, linewidth=0.8)
            panel.plot(*np.mean(list(lines.values()), axis=0).T, color=color, linewidth=2, marker='o', markersize=3,
                       label={'member': 'one member'}.get(name, name))  # fmt: skip
        panel.set_xlabel('KL to the SFT policy, nats (best of n)')
        panel.spines[['top', 'right']].set_visible(False)
    panels[0].set_title('proxy: the ranking reward, in standard deviations', fontsize=10)
    panels[1].set_title('gold: answers that are exactly right', fontsize=10)
    panels[1].yaxis.set_major_formatter('{x:.0%}')
    panels[2].set_title("gain: points of gold above the ensemble's members", fontsize=10)
    panels[2].yaxis.set_major_formatter(lambda x, _: f'{100 * x:+.0f}')
    panels[0].legend(frameon=False, fontsize=9)
    return result


if __name__ == '__main__':
    main()
