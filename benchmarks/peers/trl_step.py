"""One step of TRL + PEFT on the shapes of reward_step.py and policy_step.py, timed: one line of JSON. CPU only.

    python -m venv TRL && TRL/bin/pip install -r benchmarks/peers/requirements-trl.txt
    TRL/bin/python benchmarks/peers/trl_step.py --work=reward
    TRL/bin/python benchmarks/peers/trl_step.py --work=rl [--algorithm=rloo] [--ends]

reward: RewardTrainer.   rl: GRPOTrainer or RLOOTrainer with model.generate; the reference is the policy without its
adapter, the learned reward a second Llama with LoRA and a scalar head, which the trainer itself calls. LoRA on q, k, v
and o. All is float32, without gradient checkpointing, logging, evaluation or checkpoints.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import statistics
import tempfile
import time
from importlib import metadata

os.environ.setdefault('HF_HUB_OFFLINE', '1')

import datasets
import numpy as np
import peft
import tokenizers
import torch
import transformers
import trl
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

PAD, EOS = 0, 1


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--work', choices=['reward', 'rl'], required=True)
    sizes = {'layers': 4, 'd_model': 256, 'd_ff': 1024, 'heads': 4, 'kv_heads': 0, 'vocab': 8192, 'batch': 8}
    sizes |= {'prompt': 64, 'response': 64, 'responses': 2, 'rank': 8, 'steps': 20, 'seed': 0}
    for name, default in sizes.items():
        parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--ends', action='store_true', help='an EOS is drawn once in R / 3 tokens (rl)')
    parser.add_argument('--algorithm', choices=['grpo', 'rloo'], default='grpo')
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


def eos_of(args: argparse.Namespace) -> int:
    """Without --ends no token that the model can draw."""
    return EOS if args.ends else args.vocab


def tokenizer(args: argparse.Namespace) -> transformers.PreTrainedTokenizerFast:
    """Texts are numbers with spaces between them."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(args.vocab + 1)}, str(PAD)))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=str(PAD), eos_token=str(eos_of(args)), padding_side='left'
    )


def config(args: argparse.Namespace) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=args.vocab, hidden_size=args.d_model, intermediate_size=args.d_ff, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, num_key_value_heads=args.kv_heads or args.heads, rms_norm_eps=1e-5,
        pad_token_id=PAD, bos_token_id=None, eos_token_id=eos_of(args), num_labels=1, dtype='float32',
    )  # fmt: skip


def lora(args: argparse.Namespace, task: str) -> peft.LoraConfig:
    """The scalar head of SEQ_CLS is trained in full."""
    targets = ['q_proj', 'k_proj', 'v_proj', 'o_proj']
    return peft.LoraConfig(r=args.rank, lora_alpha=args.rank, lora_dropout=0.0, target_modules=targets, task_type=task)


def policy(args: argparse.Namespace) -> LlamaForCausalLM:
    model = LlamaForCausalLM(config(args))
    if args.ends:  # as measure.with_eos_probability: one number of every embedding dominates and sets the logit of EOS
        logit = np.log(3 / (args.response - 3) * (args.vocab - 1))
        with torch.no_grad():
            model.model.embed_tokens.weight[:, 0] = 1000.0
            model.lm_head.weight[:, 0] = 0
            model.lm_head.weight[EOS, 0] = logit / args.d_model**0.5
    return model


def settings(args: argparse.Namespace, folder: str, batch: int) -> dict:
    """What all trainers are told: one optimizer step for one batch, and nothing beside it."""
    return {
        'output_dir': folder, 'per_device_train_batch_size': batch, 'max_steps': args.steps + 2, 'seed': args.seed,
        'learning_rate': 1e-4, 'weight_decay': 0.0, 'max_grad_norm': 0.0, 'lr_scheduler_type': 'constant',
        'bf16': False, 'use_cpu': True, 'gradient_checkpointing': False, 'dataloader_pin_memory': False,
        'logging_strategy': 'no', 'save_strategy': 'no', 'report_to': 'none', 'disable_tqdm': True,
    }  # fmt: skip


def numbers(args: argparse.Namespace, seed: int, rows: int, columns: int) -> list[list[int]]:
    return np.random.default_rng(seed).integers(2, args.vocab, (rows, columns)).tolist()


def reward(args: argparse.Namespace, folder: str) -> trl.RewardTrainer:
    rows = args.batch * (args.steps + 2)
    if args.arrays:
        prompts, answers = real(args)
    else:
        prompts = numbers(args, args.seed, rows, args.prompt)
        answers = list(zip(*(numbers(args, args.seed + i, rows, args.response) for i in (1, 2))))
    pairs = {
        name: [prompt + answer[i] for prompt, answer in zip(prompts, answers)]
        for i, name in enumerate(('chosen_ids', 'rejected_ids'))
    }
    return trl.RewardTrainer(
        model=LlamaForSequenceClassification(config(args)),
        args=trl.RewardConfig(max_length=None, **settings(args, folder, args.batch)),
        train_dataset=datasets.Dataset.from_dict(pairs),
        processing_class=tokenizer(args),
        peft_config=lora(args, 'SEQ_CLS'),
    )


def rl(args: argparse.Namespace, folder: str) -> transformers.Trainer:
    words = tokenizer(args)
    rows = numbers(args, args.seed, args.batch * (args.steps + 2), args.prompt)
    if args.arrays:
        rows, _ = real(args)
    prompts = [' '.join(map(str, row)) + ' ' for row in rows]  # a completion follows without a space of its own
    sampling = {'num_generations': args.responses, 'max_completion_length': args.response, 'temperature': 1.0}
    if args.algorithm == 'grpo':
        trainer, options = trl.GRPOTrainer, trl.GRPOConfig
        sampling['loss_type'] = 'grpo'
    else:
        trainer, options = trl.RLOOTrainer, trl.RLOOConfig
    judge = peft.get_peft_model(LlamaForSequenceClassification(config(args)), lora(args, 'SEQ_CLS')).eval()
    return trainer(
        model=policy(args),
        reward_funcs=judge,
        reward_processing_classes=words,
        args=options(beta=0.05, **sampling, **settings(args, folder, args.batch * args.responses)),
        train_dataset=datasets.Dataset.from_dict({'prompt': prompts}),
        processing_class=words,
        peft_config=lora(args, 'CAUSAL_LM'),
    )


class Clock(transformers.TrainerCallback):
    """Marks of time before the first step and after each optimizer step."""

    def __init__(self):
        self.marks = []

    def on_train_begin(self, *_, **__):
        self.marks.append(time.perf_counter())

    def on_step_end(self, *_, **__):
        self.marks.append(time.perf_counter())


def since_start() -> float:
    """Seconds since this process started, imports included (Linux)."""
    ticks = int(pathlib.Path('/proc/self/stat').read_text().rsplit(')', 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf('SC_CLK_TCK')


def main() -> None:
    args, clock = flags(), Clock()
    torch.manual_seed(args.seed)
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        trainer = reward(args, folder) if args.work == 'reward' else rl(args, folder)
        trainer.add_callback(clock)
        trainer.remove_callback(transformers.PrinterCallback)
        trained = {name: x for name, x in trainer.model.named_parameters() if x.requires_grad}
        before = {name: x.detach().clone() for name, x in trained.items()}
        loss = trainer.train().training_loss
    moved = sum(not torch.equal(before[name], x) for name, x in trained.items())
    logs = trainer.state.log_history[-1]
    more = {'loss': loss, 'updates': trainer.state.global_step}
    if args.work == 'rl':
        lengths = {f'{x}_length': logs[f'completions/{x}_length'] for x in ('mean', 'min')}
        more |= {'episodes': args.batch * args.responses} | lengths
    steps = args.steps + 2
    min_moved = len(trained) // (2 if args.ends else 1)  # with --ends all tokens look alike, and q and k hardly learn
    early = not args.ends and more.get('min_length', args.response) < args.response
    if early or moved < min_moved or not np.isfinite(loss) or not more['updates'] == len(clock.marks) - 1 == steps:
        raise SystemExit(f'trl_step: not the stated work: {moved} of {len(trained)} leaves moved, {more}')
    first, _, *rest = np.diff(clock.marks).tolist()
    seconds = statistics.mean(rest) if args.arrays else statistics.median(rest)
    result = {
        'seconds': seconds, 'seconds_min': min(rest), 'compile_seconds': first - seconds,
        'command_seconds': since_start() - (time.perf_counter() - clock.marks[1]),
        'process_peak_bytes': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        'device': 'cpu', 'threads': torch.get_num_threads(),
        'versions': {name: metadata.version(name) for name in ('trl', 'peft', 'transformers', 'torch')},
    }  # fmt: skip
    print(json.dumps(result | more | {'leaves': len(trained), 'moved': moved} | vars(args)))


if __name__ == '__main__':
    main()
