"""Gold truth against proxy reward as a policy moves away from its anchor: one reward, an ensemble, their average.

    python benchmarks/overoptimization.py --sft=SFT_RUN --rewards=RUN,RUN,... --output=DIR [--prompts=256 --samples=256]

Each of --rewards is an ensemble run (tuning/lora_ensemble.gin). Best-of-n against the SFT policy makes the KL grow,
log n - (n - 1) / n nats (Stiennon et al. 2020; Gao et al. 2022, arXiv 2210.10760): one pool of answers serves every n
and every reward. What the best of n would be worth is exact over the pool: of --samples answers ranked by the proxy,
the i-th from below is the best of n drawn without replacement with probability C(i - 1, n - 1) / C(samples, n).

Writes DIR/overoptimization.csv and .png. Gold is the grammar's truth: 1 for exactly what was meant, else 0.
"""

import argparse
import csv
import functools
import os
from collections.abc import Mapping

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
COLORS = {'one reward': '#5d6b7a', 'mean': '#2166c4', 'minimum': '#1b8a5a', 'median': '#0f8f9c',
          'mean - variance': '#a23bb0', 'weight average': '#d9661f'}  # fmt: skip


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
        for name, proxy in proxies.items():
            rows += [{'run': folder, 'reward': name, **row} for row in best_of_n(proxy, gold)]
    with open(os.path.join(args.output, 'overoptimization.csv'), 'w') as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator='\n')
        writer.writeheader()
        writer.writerows({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    figure(rows).savefig(os.path.join(args.output, 'overoptimization.png'), dpi=90)


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
        scores[folder] = {f'one reward {m}': single[m] for m in range(len(single))}
        scores[folder] |= {name: np.asarray(aggregate(single)) for name, aggregate in AGGREGATES.items()}
        scores[folder]['weight average'] = average
    return np.array(gold), scores


def best_of_n(proxy: np.ndarray, gold: np.ndarray) -> list[dict[str, float]]:
    """Proxy and gold of the best of n by the proxy, mean over prompts, with the KL; n is 1, 2, 4, ..."""
    N, K = proxy.shape
    order = np.argsort(proxy, axis=1, kind='stable')
    ranked = [np.take_along_axis(x, order, axis=1) for x in (proxy, gold)]
    # Proxies in each prompt's own standard deviations, so that rewards of other scales are drawn on one axis.
    ranked[0] = (ranked[0] - proxy.mean(1, keepdims=True)) / (proxy.std(1, keepdims=True) + 1e-6)
    rows, i = [], np.arange(1, K + 1)
    for n in 2 ** np.arange(int(np.log2(K)) + 1):
        with np.errstate(divide='ignore', invalid='ignore'):
            log = gammaln(i) - gammaln(n) - gammaln(i - n + 1) - (gammaln(K + 1) - gammaln(n + 1) - gammaln(K - n + 1))
        weight = np.where(i >= n, np.exp(log), 0.0)
        of_prompt = [(x * weight).sum(1) for x in ranked]
        kl = float(np.log(n) - (n - 1) / n)
        error = float(of_prompt[1].std() / N**0.5)
        rows.append({'n': int(n), 'kl': kl, 'proxy': float(of_prompt[0].mean()), 'gold': float(of_prompt[1].mean()),
                     'gold_se': error})  # fmt: skip
    return rows


def figure(rows: list[dict]):
    """Proxy and gold against the KL: the mean over runs (and over single rewards), a thin line for each of those."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(9.6, 4), layout='constrained')
    panels = made.subplots(1, 2)
    for panel, what in zip(panels, ('proxy', 'gold')):
        for name, color in COLORS.items():
            lines = {}
            for row in rows:
                if row['reward'].rstrip('0123456789 ') == name:
                    lines.setdefault((row['run'], row['reward']), []).append((row['kl'], row[what]))
            if name == 'one reward':
                for line in lines.values():
                    panel.plot(*zip(*line), color=color, alpha=0.25, linewidth=0.8)
            panel.plot(*np.mean(list(lines.values()), axis=0).T, color=color, linewidth=2, marker='o', markersize=3,
                       label=name)  # fmt: skip
        panel.set_xlabel('KL to the SFT policy, nats (best of n)')
        panel.spines[['top', 'right']].set_visible(False)
    panels[0].set_title('proxy: the reward that chose, in its own deviations', fontsize=10)
    panels[1].set_title('gold: answers that are exactly right', fontsize=10)
    panels[1].yaxis.set_major_formatter('{x:.0%}')
    panels[0].legend(frameon=False, fontsize=9)
    return made


if __name__ == '__main__':
    main()
