"""The share of the returns' variance that a policy run's value explains, and its upper bounds, for toy policies.

    python benchmarks/value_ceiling.py --sft=SFT_RUN --reward=RUN --policies=RUN,RUN,... [--prompts=256 --samples=64]

The policy of each run answers test prompts many times. No function of the prompt can explain the returns' variance
within a prompt, and no function of the tokens so far the variance within a prompt and prefix. Both are estimated
without bias (n - 1) and give upper bounds; a value learned from few answers explains less. Intervals: 95%, from a
bootstrap over prompts.

The report also has the share of the squared deviations that the 5% of answers farthest from the mean contribute. All
figures are relative to the pool's mean. The metric `value/explained` is relative to each batch's mean, and is lower by
0.02 to 0.05 for batches of 128 answers.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

from perl_jax.cli import configure
from perl_jax.data import datasets
from perl_jax.models import lora
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.rewards.scoring import score
from perl_jax.rl import advantages, steps
from perl_jax.rl.objective import Objective
from perl_jax.rl.sampling import SamplingConfig, sample
from perl_jax.runs import base as bases
from perl_jax.runs import finished

BATCH = 16
COLUMNS = ('value', 'prompt', 'prefix')


def main() -> None:
    import perl_jax.tasks.toy  # noqa: F401 (registers the tasks, and brings TensorFlow)

    parser = argparse.ArgumentParser()
    for name in ('--sft', '--reward', '--policies'):
        parser.add_argument(name, required=True)
    for name, default in (('--prompts', 256), ('--samples', 64)):
        parser.add_argument(name, type=int, default=default)
    args = parser.parse_args()
    bindings = ['base.BaseConfig.network = %NETWORK', f"base.BaseConfig.path = '{args.sft}'"]
    config = configure.configured('base.BaseConfig', [f'{args.reward}/config.gin'], bindings, [])()
    with Partitioner().scope():
        base = bases.load(config, Partitioner(), 0)
        (reward_adapter,) = finished.read_adapters(args.reward, phase='reward', flag='--reward')[0].values()
        for folder in args.policies.split(','):
            roles = finished.read_adapters(folder, phase='policy', flag='--policies')[0]
            pooled = sample_pool(config.network, base.params, roles, reward_adapter, args.prompts, args.samples)
            print(folder, report(*pooled), flush=True)


def sample_pool(network, base, roles, reward_adapter, prompts: int, samples: int):
    """Return returns, values, tokens and mask [B, K, R] of sampled answers, rewarded as in recipes/toy_policy.gin."""
    heldout = datasets.load(
        datasets.DatasetConfig('toy_prompts', {'inputs': 26}, BATCH, 'test', limit=prompts), 'prompts'
    )
    sampling = SamplingConfig(num_samples=samples, max_decode_length=24, temperature=0.7)
    eos_ids, objective, batches = heldout.eos_ids, Objective(sampling=sampling), []

    @jax.jit
    def sample_and_score(batch, key):
        policy, bind = (base, roles['policy']), functools.partial(lora.bind, base)
        rollout = sample(network, bind(policy[1]), batch, key, eos_ids, sampling)
        experience, _ = steps.experience(
            network, objective, policy=policy, anchor=(base, None), rollout=rollout,
            scores=score(network, bind(reward_adapter), rollout), beta=jnp.float32(0.1), eos_ids=eos_ids,
        )  # fmt: skip
        returns = advantages.returns(experience.rewards)
        return (
            returns,
            steps.values(network, base, roles['value'], experience),
            experience.targets,
            experience.targets_mask,
        )

    for i, (batch, _, n) in enumerate(heldout.batches(BATCH)):
        batches.append([np.asarray(x)[:n] for x in sample_and_score(batch, jax.random.fold_in(jax.random.key(0), i))])
    return [np.concatenate(x) for x in zip(*batches, strict=True)]


def report(returns, values, tokens, mask, draws: int = 1000) -> str:
    """Format one line: each share with its interval, and the share of the farthest answers."""
    prompt_sums = np.array([sums(*x) for x in zip(returns, values, tokens, mask, strict=True)])
    rng, B = np.random.default_rng(0), len(prompt_sums)
    draw_shares = [explained(prompt_sums[rng.integers(B, size=B)]) for _ in range(draws)]
    low, high = np.percentile(draw_shares, [2.5, 97.5], axis=0)
    cells = [f'{k} {x:.3f} ({a:.3f} to {b:.3f})' for k, x, a, b in zip(COLUMNS, explained(prompt_sums), low, high)]
    squares = np.sort((returns[..., 0] - returns[..., 0].mean()).ravel() ** 2)[::-1]
    farthest_share = squares[: len(squares) // 20].sum() / squares.sum()
    return f'{", ".join(cells)}; the farthest 5% of answers have {farthest_share:.2f}; {B} prompts x {returns.shape[1]}'


def explained(prompt_sums: np.ndarray) -> np.ndarray:
    """Return the shares of the variance that value, prompt and prefix explain, from a row of `sums` per prompt."""
    count, total, squares, *unexplained = prompt_sums.sum(0)
    return 1 - np.array(unexplained) / (squares - total**2 / count)


def sums(returns, values, tokens, mask) -> list[float]:
    """Return sums over one prompt's K answers [K, R]: count, sum and sum of squares of the returns, residual squares.

    The residuals are those of value, prompt and prefix. The prompt's are computed by position (the best function of
    prompt and position). A group of a single answer has no variance estimate: it counts as unexplained, which lowers
    the bound.
    """
    real_returns = returns[mask].astype(np.float64)
    total_variance, residual_squares = real_returns.var(), [((returns - values)[mask].astype(np.float64) ** 2).sum()]
    for prefixes in (False, True):
        groups = {}
        for k, t in zip(*np.nonzero(mask), strict=True):
            groups.setdefault((t, tuple(tokens[k, :t]) if prefixes else ()), []).append(returns[k, t])
        residual_squares.append(
            sum(len(g) * np.var(g, ddof=1) if len(g) > 1 else total_variance for g in groups.values())
        )
    return [len(real_returns), real_returns.sum(), (real_returns**2).sum(), *residual_squares]


if __name__ == '__main__':
    main()
