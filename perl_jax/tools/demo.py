"""`perl_jax demo`: the whole pipeline on the offline toy task, in any folder: SFT, a reward, a policy, a report."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

from perl_jax.errors import UserError

TEXTS = {
    'sft': 'SFT: a small decoder learns to take coffee orders from demonstrations, most of them wrong.',
    'reward': 'Reward: a LoRA adapter and a head learn what raters preferred and liked.',
    'policy': 'Policy: another adapter learns from that reward alone.',
}
_SHORT = ('--gin.TRAIN_STEPS=4',)


def run(folder: str, short: bool) -> None:
    """Train the three phases in turn, each by the command that a user would type, and write the report.

    If it is interrupted, the same command resumes it.

    Args:
      folder: where the runs are written.
      short: a few steps of each phase, as a smoke test.

    Raises:
      UserError: a command failed; its own message is above.
    """
    model_dirs = {phase: os.path.join(folder, phase) for phase in TEXTS}
    base = f'--gin.INITIAL_CHECKPOINT_PATH={model_dirs["sft"]!r}'
    flags = {'sft': [], 'reward': [base], 'policy': [base, f'--gin.REWARD_MODEL_DIR={model_dirs["reward"]!r}']}
    for number, (phase, text) in enumerate(TEXTS.items(), start=1):
        print(f'\n{number}/{len(TEXTS)}  {text}', flush=True)
        recipe = [f'--gin_file=recipes/toy_{phase}.gin', f'--gin.MODEL_DIR={model_dirs[phase]!r}']
        _command(phase, *recipe, *(_SHORT if short else ()), *flags[phase])
    print('\nThe report, for a browser: ', end='', flush=True)
    _command('report', *model_dirs.values())
    next_commands = {
        f'perl_jax sample --model_dir={shlex.quote(model_dirs["policy"])}': 'read some answers',
        'perl_jax inspect --task=toy_pairs': 'see what the reward learned from',
        'perl_jax inspect --data=rows.jsonl': 'see how your own rows are read',
        'perl_jax --help': 'the commands that just ran, to change and run',
        f'rm -r {shlex.quote(folder)}': 'to start over; otherwise the same command resumes here',
    }
    print('\nNext:', *(f'  {command:60} {text}' for command, text in next_commands.items()), sep='\n')


def _command(*argv: str) -> None:
    """Run a command in a process of its own, as a user's would be: its memory is free when it ends."""
    code = subprocess.run([sys.executable, '-m', 'perl_jax', *argv], check=False).returncode
    if code:
        raise UserError(f'demo: perl_jax {argv[0]} ended with exit code {code}; the same command resumes here')
