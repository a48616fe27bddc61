"""One step of Tunix on the shapes of reward_step.py and policy_step.py, timed: one line of JSON.

    python -m venv TUNIX && TUNIX/bin/pip install -r benchmarks/peers/requirements-tunix.txt
    JAX_PLATFORMS=cpu TUNIX/bin/python benchmarks/peers/tunix_step.py --work=reward
    JAX_PLATFORMS=cpu TUNIX/bin/python benchmarks/peers/tunix_step.py --work=rl [--ends]

reward: its PeftTrainer with a Bradley-Terry loss and a scalar head written here, for it has neither.
rl: its GRPO learner and its own sampler; the reference shares the policy's base, and so does the learned reward, a
function written here. LoRA on q, k, v and o by qwix. All is float32; of perl_jax nothing is imported.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import statistics
import time
import types
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from flax import nnx
from tunix.models.llama3 import model as llama
from tunix.rl import rl_cluster
from tunix.rl import utils as rl_utils
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout
from tunix.sft import peft_trainer
from tunix.sft import utils as sft

PAD, EOS, NEVER = 0, 1, 10**9
ADAMW = optax.adamw(1e-4, weight_decay=0.0)


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--work', choices=['reward', 'rl'], required=True)
    sizes = {'layers': 4, 'd_model': 256, 'd_ff': 1024, 'heads': 4, 'kv_heads': 0, 'vocab': 8192, 'batch': 8}
    sizes |= {'prompt': 64, 'response': 64, 'responses': 2, 'rank': 8, 'steps': 20, 'seed': 0}
    for name, default in sizes.items():
        parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--ends', action='store_true', help='an EOS is drawn once in R / 3 tokens (rl)')
    parser.add_argument('--arrays', help='a file of benchmarks/taskmaster/prepare.py: rows of real lengths')
    return parser.parse_args()


def real(args: argparse.Namespace) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Rows of --arrays: prompts, and the answers to each if it has any. Tokens are folded into the vocabulary."""
    file = np.load(args.arrays)
    rows = np.random.default_rng(args.seed).permutation(len(file['inputs']))[: args.batch * (args.steps + 2)]
    fold = lambda tokens, mask: (2 + tokens[mask] % (args.vocab - 2)).tolist()  # noqa: E731
    prompts = [fold(file['inputs'][i], file['inputs_mask'][i]) for i in rows]
    if 'targets' not in file:
        return prompts, []
    return prompts, [[fold(*each) for each in zip(file['targets'][i], file['targets_mask'][i])] for i in rows]


def base_model(args: argparse.Namespace) -> llama.Llama3:
    """A Llama of random weights; its MLPs too, which Tunix leaves at 0."""
    config = llama.ModelConfig(
        num_layers=args.layers, vocab_size=args.vocab, embed_dim=args.d_model, hidden_dim=args.d_ff,
        num_heads=args.heads, head_dim=args.d_model // args.heads, num_kv_heads=args.kv_heads or args.heads,
        rope_theta=10000, norm_eps=1e-5,
    )  # fmt: skip
    model, keys = llama.Llama3(config, rngs=nnx.Rngs(params=args.seed)), nnx.Rngs(params=args.seed + 1)
    for layer in model.layers:
        for dense in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            dense.kernel[...] = 0.02 * jax.random.normal(keys.params(), dense.kernel.shape)
    if args.ends:  # as measure.with_eos_probability: one number of every embedding dominates and sets the logit of EOS
        logit = np.log(3 / (args.response - 3) * (args.vocab - 1))
        table, kernel = model.embedder.input_embedding, model.lm_head.w
        table[...] = table[...].at[:, 0].set(1000.0)
        kernel[...] = kernel[...].at[0].set(0).at[0, EOS].set(logit / args.d_model**0.5)
    return model


def with_lora(args: argparse.Namespace, base: llama.Llama3) -> llama.Llama3:
    provider = qwix.LoraProvider(module_path='.*(q_proj|k_proj|v_proj|o_proj)', rank=args.rank, alpha=float(args.rank))
    return qwix.apply_lora_to_model(base, provider, **base.get_model_input(), rngs=nnx.Rngs(args.seed))


class Head(nnx.Module):
    """A scalar for the logits [B, T, 1]. Tunix trains nnx.LoRAParam alone, so its weights are one."""

    def __init__(self, D: int, key: jax.Array):
        self.w = nnx.LoRAParam(jax.random.normal(key, (D, 1)) / D)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.w[...]


def reward_model(args: argparse.Namespace, base: llama.Llama3) -> llama.Llama3:
    model = nnx.merge(*nnx.split(base))  # the same arrays
    model.lm_head = Head(args.d_model, jax.random.key(args.seed))
    return with_lora(args, model)


def inputs(tokens: jax.Array) -> dict[str, jax.Array]:
    """What the model reads besides a cache."""
    is_token = tokens != PAD
    positions, mask = sft.build_positions_from_mask(is_token), sft.make_causal_attn_mask(is_token)
    return {'input_tokens': tokens, 'positions': positions, 'attention_mask': mask}


def reward(args: argparse.Namespace, model: llama.Llama3) -> tuple[list[float], dict[str, float]]:
    """Marks of time before the first step and after each, and what else is known."""
    marks, losses = [], []

    class Timed(peft_trainer.PeftTrainer):
        def _post_process_train_step(self, aux: object) -> None:  # runs right after a step is dispatched
            losses.extend(jax.block_until_ready(self._buffered_train_metrics.losses))
            marks.append(time.perf_counter())

    def loss(model: nnx.Module, input_tokens: jax.Array, positions: jax.Array, attention_mask: jax.Array) -> jax.Array:
        chosen, rejected = jnp.split(model(input_tokens, positions, None, attention_mask)[0][:, -1, 0], 2)
        return -jax.nn.log_sigmoid(chosen - rejected).mean()

    trainer = Timed(model, ADAMW, peft_trainer.TrainingConfig(eval_every_n_steps=NEVER))
    trainer = trainer.with_loss_fn(loss).with_gen_model_input_fn(lambda batch: inputs(batch['tokens']))
    if args.arrays:  # padded on the left to the longest of all, so that every step has one shape
        pairs = [[prompt + answer for answer in answers] for prompt, answers in zip(*real(args))]
        width = max(len(row) for pair in pairs for row in pair)
        padded = np.array([[[PAD] * (width - len(row)) + row for row in pair] for pair in pairs], np.int32)
        padded = padded.reshape(-1, args.batch, 2, width)
        batches = [{'tokens': np.concatenate([pairs[:, 0], pairs[:, 1]])} for pairs in padded]
    else:
        shape = (2 * args.batch, args.prompt + args.response)
        tokens = np.random.default_rng(args.seed).integers(2, args.vocab, shape, dtype=np.int32)
        tokens[args.batch :, : args.prompt] = tokens[: args.batch, : args.prompt]
        batches = [{'tokens': tokens}] * (args.steps + 2)
    marks.append(time.perf_counter())
    trainer.train(batches)
    return marks, {'loss': float(losses[-1]), 'updates': trainer.train_steps, 'pairs': args.batch}


def tokenizer(eos: int) -> types.SimpleNamespace:
    """Texts are numbers with spaces between. Tunix takes a BOS of 0 for none."""
    return types.SimpleNamespace(
        encode=lambda text: [int(word) for word in text.split()], decode=lambda ids: ' '.join(map(str, ids)),
        bos_id=lambda: 0, eos_id=lambda: eos, pad_id=lambda: PAD,
    )  # fmt: skip


def learned(args: argparse.Namespace, base: llama.Llama3, lengths: list[int]):
    """A reward for GRPOLearner: the scalar at the last token of prompt and completion. Notes the lengths."""
    graph, state = nnx.split(reward_model(args, base))

    @jax.jit
    def score(state: nnx.State, tokens: jax.Array, last: jax.Array) -> jax.Array:
        return nnx.merge(graph, state)(cache=None, **inputs(tokens))[0][jnp.arange(len(tokens)), last, 0]

    def reward(prompts: list[str], completions: list[str], **_: object) -> list[float]:
        rows = [f'{prompt} {text}'.split() for prompt, text in zip(prompts, completions)]
        lengths.extend(len(text.split()) for text in completions)
        last = np.array([len(row) - 1 for row in rows])
        rows = [row + [PAD] * (args.prompt + args.response - len(row)) for row in rows]
        return np.asarray(score(state, np.array(rows).astype(np.int32), last)).tolist()

    return reward


def rl(args: argparse.Namespace, base: llama.Llama3, policy: llama.Llama3) -> tuple[list[float], dict[str, float]]:
    """As reward()."""
    marks, lengths, rng = [], [], np.random.default_rng(args.seed)
    prompts = rng.integers(2, args.vocab, (args.batch, args.prompt)).tolist() * (args.steps + 2)
    if args.arrays:
        prompts, _ = real(args)
        args.prompt = max(len(row) for row in prompts)
    rollout = base_rollout.RolloutConfig(args.response, temperature=1.0, top_p=1.0, max_prompt_length=args.prompt)
    rollout.kv_cache_size = args.prompt + args.response
    training = rl_cluster.RLTrainingConfig(actor_optimizer=ADAMW, eval_every_n_steps=NEVER, max_steps=NEVER)
    meshes = dict.fromkeys(rl_cluster.Role, jax.sharding.Mesh(np.empty((), object), ()))  # none: one device
    config = rl_cluster.ClusterConfig(role_to_mesh=meshes, training_config=training, rollout_config=rollout)
    words = tokenizer(EOS if args.ends else args.vocab)  # which is no token
    cluster = rl_cluster.RLCluster(actor=policy, reference=base, tokenizer=words, cluster_config=config)
    if not rl_utils.is_sharing_backbone(cluster.inference_worker.get_model('reference'), cluster.actor_trainer.model):
        raise SystemExit('tunix_step: the reference does not share the base')
    algorithm = grpo_learner.GRPOConfig(num_generations=args.responses, beta=0.05, kl_loss_mode='low_var_kl')
    texts = np.array([words.decode(row) for row in prompts]).reshape(-1, args.batch)

    class Timed(grpo_learner.GRPOLearner):
        def _run_global_step(self, *rest: object) -> None:  # reads a batch, generates, scores, learns
            jax.block_until_ready(nnx.state(self.rl_cluster.actor_trainer.model, nnx.LoRAParam))
            marks.append(time.perf_counter())  # of the step before; the last one finds no batch
            rollout.seed = len(marks)  # left alone, the sampler draws the same noise at every step
            super()._run_global_step(*rest)

    Timed(cluster, algorithm, learned(args, base, lengths)).train([{'prompts': row} for row in texts])
    loss = float(cluster.actor_trainer.metrics_logger.get_metric_history('actor', 'loss', 'train')[-1])
    more = {'loss': loss, 'updates': cluster.actor_trainer.train_steps, 'episodes': len(lengths) // (args.steps + 2)}
    return marks, more | {'mean_length': statistics.mean(lengths), 'min_length': min(lengths)}


def since_start() -> float:
    """Seconds since this process started, imports included (Linux)."""
    ticks = int(pathlib.Path('/proc/self/stat').read_text().rsplit(')', 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf('SC_CLK_TCK')


def main() -> None:
    args = flags()
    base = base_model(args)
    model = reward_model(args, base) if args.work == 'reward' else with_lora(args, base)
    before = [np.array(x) for x in jax.tree.leaves(nnx.state(model, nnx.LoRAParam))]
    marks, more = reward(args, model) if args.work == 'reward' else rl(args, base, model)
    after = jax.tree.leaves(nnx.state(model, nnx.LoRAParam))
    moved, steps = sum(bool(np.any(x != y)) for x, y in zip(before, after)), args.steps + 2
    min_moved = len(after) // (2 if args.ends else 1)  # with --ends all tokens look alike, and q and k hardly learn
    early = not args.ends and more.get('min_length', args.response) < args.response
    if early or moved < min_moved or not np.isfinite(more['loss']) or not more['updates'] == len(marks) - 1 == steps:
        raise SystemExit(f'tunix_step: not the stated work: {moved} of {len(after)} leaves moved, {more}')
    first, _, *rest = np.diff(marks).tolist()
    middle = statistics.mean if args.arrays else statistics.median
    seconds, peak = middle(rest), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = {
        'seconds': seconds, 'seconds_min': min(rest), 'compile_seconds': first - seconds,
        'command_seconds': since_start() - (time.perf_counter() - marks[1]), 'process_peak_bytes': peak,
        'device': jax.devices()[0].device_kind,
        'versions': {name: metadata.version(name) for name in ('google-tunix', 'qwix', 'flax', 'jax')},
    }  # fmt: skip
    print(json.dumps(result | more | {'leaves': len(after), 'moved': moved} | vars(args)))


if __name__ == '__main__':
    main()
