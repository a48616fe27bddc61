"""The progress bar of a run: speed, the loss from the first step on and the last evaluation, in 80 columns."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping

COLUMNS = 80
_FORMAT = '{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}] {bar}'  # the bar gives way first
# What is shown of a step's metrics and of an evaluation's: the first ones that there are, with a short name.
_OF_STEP = {'loss/nll': 'nll', 'loss/reward': 'loss', 'reward/score': 'score', 'kl/anchor': 'kl'}
_OF_EVALUATION = ('nll', 'auc', 'pairwise_accuracy', 'score')


class Bar:
    """A bar on stderr.

    Attributes:
      evaluation: the metrics of the last evaluation.
    """

    def __init__(self, phase: str, *, first: int, total: int, is_shown: bool) -> None:
        from tqdm import tqdm

        columns = min(COLUMNS, shutil.get_terminal_size((COLUMNS, 24)).columns)
        self._bar = tqdm(
            total=total, initial=first, desc=phase, unit='step', ncols=columns, mininterval=0.5, disable=not is_shown,
            bar_format=_FORMAT,
        )  # fmt: skip
        self._step: dict[str, float] = {}
        self.evaluation: Mapping[str, float] = {}

    def advance(self) -> None:
        """Count a step."""
        self._bar.update()

    def show_step(self, metrics: Mapping[str, float]) -> None:
        """Show the loss of a step, or a policy's score and KL."""
        self._step = {short: metrics[name] for name, short in _OF_STEP.items() if name in metrics}
        self._show(refresh=False)

    def show_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Show the main metric of an evaluation."""
        self.evaluation = metrics
        self._show(refresh=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()

    def _show(self, refresh: bool) -> None:
        main_name = next((name for name in _OF_EVALUATION if name in self.evaluation), None)
        evaluation = {'eval': self.evaluation[main_name]} if main_name else {}
        shown = self._step | evaluation
        self._bar.set_postfix_str(', '.join(f'{name} {value:.3g}' for name, value in shown.items()), refresh=refresh)


def closing_line(phase: str, model_dir: str, evaluation: Mapping[str, float]) -> str:
    """Returns how a finished run ends: its folder, the figures of its last evaluation, the next command."""
    quoted = shlex.quote(model_dir)
    figures = ', '.join(f'{name} {value:.4g}' for name, value in evaluation.items() if '/' not in name)
    return f'{phase}: finished in {model_dir}{f": {figures}" if figures else ""}; next: perl_jax report {quoted}'
