"""Trains SFT, rewards and policies of SmolLM2-135M on Taskmaster with perl_jax's steps, on one accelerator.

    python benchmarks/taskmaster/train.py --model=MODEL.gguf --arrays=DIR --output=DIR [--seconds=550] [--smoke]

It is one process, so that programs are compiled once per tuning for all seeds and domains. Each finished cell is a line
of DIR/cells.jsonl, with its validation scores in DIR/scores.npz; no cell starts after --seconds. In order:

    an SFT policy per domain (full tuning, merged: the base of all later cells)
    learning rates on coffee, seed 0: LoRA rank 8 and full tuning
    rewards of every tuning, both domains, seed 0; policies on coffee; then rewards of the other seeds
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from perl_jax.data import datasets
from perl_jax.evals import reward_metrics
from perl_jax.interop import gguf
from perl_jax.models import lora
from perl_jax.models.decoder import Decoder
from perl_jax.models.lora import FullSpec, LoraSpec
from perl_jax.optim import train_state
from perl_jax.parallel import memory
from perl_jax.rewards.scoring import score
from perl_jax.rl import steps as rl
from perl_jax.rl.kl import KLConfig
from perl_jax.rl.objective import Objective
from perl_jax.rl.sampling import SamplingConfig, sample
from perl_jax.train.reward import reward_step
from perl_jax.train.sft import sft_step

TUNINGS = {f'r{rank}': LoraSpec(rank=rank) for rank in (1, 4, 8, 16)} | {'full': FullSpec()}
RATES = {'r8': (3e-4, 1e-3, 3e-3), 'full': (1e-5, 3e-5, 1e-4)}
KINDS = {'coffee': ('thumbs', 'pairs'), 'ticketing': ('thumbs',)}
BATCH, SFT_STEPS, REWARD_STEPS, POLICY_STEPS = 16, 200, 120, 60
PROMPTS, SAMPLES, BETA = 16, 4, 0.05
UNSCALED = {'multiply_by_parameter_scale': False}
KEY = jax.random.key(0)


def optimizer(rate: float, steps: int) -> optax.GradientTransformation:
    """Return the recipes' optimizer with a linear decay; the rate is in the state, so one program serves all rates."""
    adafactor = optax.inject_hyperparams(lambda learning_rate: optax.adafactor(learning_rate, **UNSCALED))(rate)
    return optax.chain(adafactor, optax.scale_by_schedule(optax.linear_schedule(1.0, 0.0, steps)))


class Bench:
    """The network, the data and the time limit, with a method per phase."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.out, self.start_time, self.args, self.scores = args.output, time.perf_counter(), args, {}
        self.out.mkdir(parents=True, exist_ok=True)
        config = dataclasses.replace(gguf.config(args.model), dtype=args.dtype)
        self.initial_params = jax.tree.map(jnp.asarray, gguf.load(args.model))
        if args.smoke:
            config = dataclasses.replace(config, num_layers=2)
            self.initial_params['decoder']['layers'] = jax.tree.map(
                lambda x: x[:2], self.initial_params['decoder']['layers']
            )
        self.network = Decoder(config)
        self.eos = json.loads((args.arrays / 'eos.txt').read_text())
        self.max_steps = 3 if args.smoke else 10**9
        self.compiled, self.program_bytes = {}, {}
        jax.block_until_ready(self.initial_params)
        self.log('loaded', device=jax.devices()[0].device_kind)

    def seconds_left(self) -> float:
        """Return the seconds until the time limit."""
        return self.args.seconds - (time.perf_counter() - self.start_time)

    def log(self, event: str, **fields) -> None:
        """Write a line to cells.jsonl."""
        line = json.dumps({'what': event, 'at': round(time.perf_counter() - self.start_time, 1), **fields})
        print(line, flush=True)
        with open(self.out / 'cells.jsonl', 'a') as file:
            file.write(line + '\n')

    def dataset(self, domain: str, kind: str, split: str) -> datasets.Dataset:
        """Load the arrays of a split."""
        with np.load(self.args.arrays / f'{domain}_{kind}_{split}.npz') as file:
            arrays = {name: file[name] for name in file.files if name != 'group'}
        rows = len(next(iter(arrays.values())))
        if self.args.smoke:
            arrays, rows = {name: x[:8] for name, x in arrays.items()}, min(rows, 8)
        return datasets.Dataset(arrays, [{}] * rows, None, self.eos)

    def stream(self, domain: str, kind: str, seed: int, batch: int):
        """Return an endless stream of training batches, drawn as in `perl_jax`."""
        batch = 2 if self.args.smoke else batch
        return datasets.Stream([self.dataset(domain, kind, 'train')], [1.0], batch, seed, np.arange(batch))

    def jitted(self, name: str, fn, **kwargs):
        """Return the jitted function of this name, so that cells share compiled programs."""
        if name not in self.compiled:
            self.compiled[name] = jax.jit(fn, **kwargs)
        return self.compiled[name]

    def timed(self, step, state, batches, steps: int):
        """Run steps; returns the state, the last metrics and the median seconds per step without the first two."""
        timestamps, metrics = [], {}
        for n in range(min(steps, self.max_steps)):
            state, metrics = step(state, batches(n), n)
            jax.block_until_ready(metrics)
            timestamps.append(time.perf_counter())
        return state, {k: float(v) for k, v in metrics.items()}, float(np.median(np.diff(timestamps)[1:]))

    def sft(self, domain: str):
        """Train the base of a domain by full tuning on its dialogs."""
        tx = optimizer(3e-5, SFT_STEPS)
        state = jax.jit(functools.partial(train_state.create, spec=FullSpec(), tx=tx))(KEY, self.initial_params)
        step = self.jitted('sft', functools.partial(sft_step, self.network, tx), donate_argnums=1)
        stream = self.stream(domain, 'sft', 0, BATCH)
        state, metrics, seconds = self.timed(
            lambda s, batch, n: step(self.initial_params, s, batch, KEY), state, lambda n: stream(n)[0], SFT_STEPS
        )
        self.log('sft', domain=domain, seconds_a_step=seconds, **metrics)
        return jax.block_until_ready(state.adapter.params)

    def reward(self, base, domain: str, tuning: str, rate: float, seed: int, purpose: str = 'reward'):
        """Train a reward and score the validation split with it."""
        tx, spec, key = optimizer(rate, REWARD_STEPS), TUNINGS[tuning], jax.random.key(seed)
        width = self.network.config.emb_dim
        create = functools.partial(train_state.create, spec=spec, tx=tx, head=(width, (width + 1) ** -0.5))
        state = jax.jit(create)(key, base)
        name = f'reward {tuning} {len(KINDS[domain])}'
        step = self.jitted(name, functools.partial(reward_step, self.network, tx), donate_argnums=1)
        streams = [self.stream(domain, kind, seed, BATCH) for kind in KINDS[domain]]
        batches = lambda n: [x(n)[0] for x in streams]  # noqa: E731
        state, metrics, seconds = self.timed(
            lambda s, batch, n: step(base, s, batch, key), state, batches, REWARD_STEPS
        )
        memory_figures = self.memory(step, base, state, batches(0), key)
        score_fn = self.jitted(f'score {tuning}', lambda b, a, batch: score(self.network, lora.bind(b, a), batch))
        cell = f'{purpose}-{domain}-{tuning}-{rate}-{seed}'
        for kind in KINDS[domain]:
            split = self.dataset(domain, kind, 'validation')
            split_scores = [np.asarray(score_fn(base, state.adapter, batch))[:n] for batch, _, n in split.batches(64)]
            self.scores[f'{cell}-{kind}'] = np.concatenate(split_scores)
        np.savez_compressed(self.out / 'scores.npz', **self.scores)
        count = lora.count(state.adapter)
        self.log(
            purpose, cell=cell, domain=domain, tuning=tuning, rate=rate, seed=seed, seconds_a_step=seconds,
            trained=count, **memory_figures, **metrics,
        )  # fmt: skip
        return state.adapter

    def memory(self, step, *args) -> dict[str, int]:
        """Return the bytes of one compiled step: arguments, temporaries, and outputs without donated buffers."""
        stats = step.lower(*args).compile().memory_analysis()
        output_bytes = stats.output_size_in_bytes - stats.alias_size_in_bytes
        return {'step_bytes': stats.argument_size_in_bytes + stats.temp_size_in_bytes + output_bytes}

    def policy(self, base, reward, tuning: str, rate: float, shared: bool = True, steps: int = POLICY_STEPS) -> None:
        """Train a policy with REINFORCE on coffee's prompts; saves answers before and after, with their scores."""
        sampling = SamplingConfig(num_samples=SAMPLES, max_decode_length=64, temperature=0.7)
        spec, width, network = TUNINGS[tuning], self.network.config.emb_dim, self.network
        txs = optimizer(rate, steps), optimizer(rate, steps)
        policy = jax.jit(functools.partial(train_state.create, spec=spec, tx=txs[0]))(KEY, base)
        value = jax.jit(functools.partial(train_state.create, spec=spec, tx=txs[1], head=(width, 0.0)))(KEY, base)
        role_params = {role: base for role in ('policy', 'value', 'anchor', 'reward')}
        if not shared:
            role_params |= {role: jax.tree.map(jnp.copy, base) for role in ('value', 'anchor', 'reward')}
        programs_before, eval_prompts = memory.programs(), self.dataset('coffee', 'prompts', 'validation')
        sample_fn = self.jitted(
            'draw',
            lambda b, a, prompts, rng, config: sample(network, lora.bind(b, a), prompts, rng, self.eos, config),
            static_argnums=4,
        )
        score_fn = self.jitted('judge', lambda b, a, batch: score(network, lora.bind(b, a), batch))
        objective = Objective(kl=KLConfig(BETA), sampling=sampling)
        experience = self.jitted(
            'judged', functools.partial(rl.experience, network, objective, eos_ids=self.eos)
        )
        value_step, policy_step = (
            self.jitted(name, functools.partial(fn, network, objective, tx), donate_argnames='state')
            for name, fn, tx in (('value', rl.value_step, txs[1]), ('policy', rl.policy_step, txs[0]))
        )
        stream = self.stream('coffee', 'prompts', 0, PROMPTS)

        def answer_all(adapter, name: str) -> dict[str, float]:
            single_sampling, totals = dataclasses.replace(sampling, num_samples=1), []
            fields = {'targets': [], 'targets_mask': []}
            for i, (batch, _, n) in enumerate(eval_prompts.batches(64)):
                rollout = sample_fn(base, adapter, batch, jax.random.fold_in(KEY, i), single_sampling)
                totals.append(np.asarray(score_fn(role_params['reward'], reward, rollout))[:n])
                for field, batches in fields.items():
                    batches.append(np.asarray(getattr(rollout, field))[:n])
            self.scores |= {f'{name}-{field}': np.concatenate(batches) for field, batches in fields.items()}
            self.scores[f'{name}-score'] = np.concatenate(totals)
            return {'score': float(np.concatenate(totals).mean())}

        def step(states, batch, n):
            policy, value = states
            rollout = sample_fn(role_params['policy'], policy.adapter, batch, jax.random.fold_in(KEY, n), sampling)
            scores = score_fn(role_params['reward'], reward, rollout)
            shared_arguments = {'anchor': (role_params['anchor'], None), 'beta': jnp.float32(BETA)}
            experience_batch, metrics = experience(
                policy=(role_params['policy'], policy.adapter), rollout=rollout, scores=scores, **shared_arguments
            )
            value, values, value_metrics = value_step(
                base=role_params['value'], state=value, batch=experience_batch, rng=KEY
            )
            policy, policy_metrics = policy_step(
                base=role_params['policy'],
                state=policy,
                batch=experience_batch,
                values=values,
                rng=KEY,
                **shared_arguments,
            )
            return (policy, value), metrics | value_metrics | policy_metrics

        (policy, value), metrics, seconds = self.timed(step, (policy, value), lambda n: stream(n)[0], steps)
        memory_figures = memory.measure(programs_before, memory.live_bytes())
        program_bytes = self.program_bytes.setdefault(
            tuning, memory_figures['peak'] - memory_figures['held']
        )  # compiled once per tuning
        leaves = jax.tree.leaves((role_params, policy, value, reward))  # without the arrays of other cells
        memory_figures['held'] = sum({x.unsafe_buffer_pointer(): x.nbytes for x in leaves}.values())
        memory_figures['peak'] = memory_figures['held'] + program_bytes
        name = f'policy-{tuning}' + ('' if shared else '-unshared')
        score_figures = {}
        if steps == POLICY_STEPS:
            metrics_before, metrics_after = answer_all(None, f'sft-for-{tuning}'), answer_all(policy.adapter, name)
            score_figures = {'score_before': metrics_before['score'], 'score_after': metrics_after['score']}
            np.savez_compressed(self.out / 'scores.npz', **self.scores)
        self.log(
            'policy', cell=name, tuning=tuning, rate=rate, shared=shared, steps=steps, seconds_a_step=seconds,
            **memory_figures, **score_figures, **metrics,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ('--model', '--arrays', '--output'):
        parser.add_argument(name, required=True, type=pathlib.Path)
    parser.add_argument('--seconds', type=float, default=550.0)
    parser.add_argument('--dtype', default='float32', help="of the network's activations")
    parser.add_argument('--smoke', action='store_true', help='three steps of each on 8 rows, with two layers')
    parser.add_argument('--domains', default='coffee,ticketing')
    parser.add_argument('--tunings', default=','.join(TUNINGS))
    parser.add_argument('--seeds', default='0,1,2')
    parser.add_argument('--rates', help='rates of LoRA and of full tuning; default: search')
    args = parser.parse_args()
    jax.config.update('jax_default_matmul_precision', 'tensorfloat32' if jax.default_backend() == 'gpu' else None)
    bench, domains = Bench(args), args.domains.split(',')
    bases = {domain: bench.sft(domain) for domain in domains}
    bench.initial_params = None
    if args.smoke:
        adapter = bench.reward(bases['coffee'], 'coffee', 'r8', 1e-3, 0)
        bench.policy(bases['coffee'], adapter, 'r8', 3e-4)
        return
    if args.rates:
        rates = dict(zip(RATES, map(float, args.rates.split(','))))
    else:
        rates = {tuning: best_rate(bench, bases['coffee'], tuning) for tuning in RATES}
    bench.log('rates', **rates)
    reward_adapters = {}
    for seed in map(int, args.seeds.split(',')):
        for domain in domains:
            for tuning in args.tunings.split(','):
                if bench.seconds_left() > 15:
                    rate = rates['full' if tuning == 'full' else 'r8']
                    adapter = bench.reward(bases[domain], domain, tuning, rate, seed)
                    if (domain, seed) == ('coffee', 0) and tuning in ('r8', 'full'):
                        reward_adapters[tuning] = adapter
        if seed == 0 and bench.seconds_left() > 60:
            bench.policy(bases['coffee'], reward_adapters['r8'], 'r8', rates['r8'] / 3)
            bench.policy(bases['coffee'], reward_adapters['full'], 'full', rates['full'] / 3)
            bench.policy(bases['coffee'], reward_adapters['r8'], 'r8', rates['r8'] / 3, shared=False, steps=12)
    bench.log('end')


def best_rate(bench: Bench, base, tuning: str) -> float:
    """Return the rate whose reward has the best AUC on the validation thumbs of coffee, seed 0."""
    labels = bench.dataset('coffee', 'thumbs', 'validation').arrays['labels'].ravel()
    rate_by_auc = {}
    for rate in RATES[tuning]:
        bench.reward(base, 'coffee', tuning, rate, 0, 'rate')
        scores = bench.scores[f'rate-coffee-{tuning}-{rate}-0-thumbs']
        rate_by_auc[reward_metrics.classification(scores.ravel(), labels)['auc']] = rate
    return rate_by_auc[max(rate_by_auc)]


if __name__ == '__main__':
    main()
