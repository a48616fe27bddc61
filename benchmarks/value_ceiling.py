"""How much of the returns' variance a policy run's value explains, and how much any value could: toy policies.

    python benchmarks/value_ceiling.py --sft=SFT_RUN --reward=RUN --policies=RUN,RUN,... [--prompts=256 --samples=64]

The policy of each run answers test prompts many times. What answers that begin alike differ by later, nobody can know
before: the returns' variance within one prompt, and within one prompt and the same tokens so far, both without bias
(n - 1), say what share no function of the prompt and no function of all that was read can explain. A value that has
to learn that function from few answers explains less. Intervals: 95%, from a bootstrap over prompts.

Beside these the share of the squares that the 5% of answers farthest from the mean have. All are of a pool, not of one
batch's own mean; `value/explained` is, and is lower by 0.02 to 0.05 where a batch has 128 answers.
"""

import argparse
import functools

import jax
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
        frozen = bases.load(config, Partitioner(), 0)
        (judge,) = finished.read_adapters(args.reward, phase='reward', flag='--reward')[0].values()
        for folder in args.policies.split(','):
            roles = finished.read_adapters(folder, phase='policy', flag='--policies')[0]
            pooled = pool(config.network, frozen.params, roles, judge, args.prompts, args.samples)
            print(folder, report(*pooled), flush=True)


def pool(network, base, roles, judge, prompts: int, samples: int):
    """Returns, values, tokens and mask [N, K, R] of answers to test prompts, judged as recipes/toy_policy.gin does."""
    heldout = datasets.load(
        datasets.DatasetConfig('toy_prompts', {'inputs': 26}, BATCH, 'test', limit=prompts), 'prompts'
    )
    sampling = SamplingConfig(num_samples=samples, max_decode_length=24, temperature=0.7)
    ends, objective, parts = heldout.eos_ids, Objective(sampling=sampling), []

    @jax.jit
    def answer(batch, key):
        policy, bound = (base, roles['policy']), functools.partial(lora.bind, base)
        rollout = sample(network, bound(policy[1]), batch, key, ends, sampling)
        exp, _ = steps.experience(
            network, objective, policy=policy, anchor=(base, None), rollout=rollout,
            scores=score(network, bound(judge), rollout), beta=0.1, eos_ids=ends,
        )  # fmt: skip
        returns = advantages.returns(exp.rewards)
        return returns, steps.values(network, base, roles['value'], exp), exp.targets, exp.targets_mask

    for i, (batch, _, n) in enumerate(heldout.batches(BATCH)):
        parts.append([np.asarray(x)[:n] for x in answer(batch, jax.random.fold_in(jax.random.key(0), i))])
    return [np.concatenate(x) for x in zip(*parts, strict=True)]


def report(returns, values, tokens, mask, draws: int = 1000) -> str:
    """One line: each share with its interval, and where the variance lies."""
    of_prompt = np.array([sums(*x) for x in zip(returns, values, tokens, mask, strict=True)])
    rng, N = np.random.default_rng(0), len(of_prompt)
    drawn = [explained(of_prompt[rng.integers(N, size=N)]) for _ in range(draws)]
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    cells = [f'{k} {x:.3f} ({a:.3f} to {b:.3f})' for k, x, a, b in zip(COLUMNS, explained(of_prompt), low, high)]
    squares = np.sort((returns[..., 0] - returns[..., 0].mean()).ravel() ** 2)[::-1]
    far = squares[: len(squares) // 20].sum() / squares.sum()
    return f'{", ".join(cells)}; the farthest 5% of answers have {far:.2f}; {N} prompts x {returns.shape[1]}'


def explained(of_prompt: np.ndarray) -> np.ndarray:
    """Of `sums`, a row a prompt: the share of the tokens' variance that value, prompt and prefix explain."""
    count, total, squares, *unexplained = of_prompt.sum(0)
    return 1 - np.array(unexplained) / (squares - total**2 / count)


def sums(returns, values, tokens, mask) -> list[float]:
    """Of one prompt's K answers [K, R]: count, sum and squares of the returns; squares left by value, prompt, prefix.

    The prompt's is of each place apart (the best function of prompt and place). A place that one answer alone reached,
    with its prefix, has no variance to estimate: it counts as not explained at all, which lowers the ceiling.
    """
    real = returns[mask].astype(np.float64)
    unknown, left = real.var(), [((returns - values)[mask].astype(np.float64) ** 2).sum()]
    for prefixes in (False, True):
        groups = {}
        for k, t in zip(*np.nonzero(mask), strict=True):
            groups.setdefault((t, tuple(tokens[k, :t]) if prefixes else ()), []).append(returns[k, t])
        left.append(sum(len(g) * np.var(g, ddof=1) if len(g) > 1 else unknown for g in groups.values()))
    return [len(real), real.sum(), (real**2).sum(), *left]


if __name__ == '__main__':
    main()
