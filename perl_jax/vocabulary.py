"""Which vocabulary a run reads its tasks with: decided here, by `choose`, for every command and caller of `train`.

run.json names it, so that it goes along from SFT to reward and policy, and to eval, sample,
judge and inspect.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from perl_jax import data, lineage, rundir
from perl_jax.data import DatasetConfig
from perl_jax.errors import UserError
from perl_jax.interop import chat_template, hf, vocabularies
from perl_jax.tasks import chat as formats

_RANDOM = 'random:'  # how base.py names weights that no file holds
_READ = ('inputs', 'targets', 'chosen', 'rejected')  # the features that a model reads


@dataclasses.dataclass(frozen=True)
class RunVocabulary:
    """A SeqIO vocabulary, and the name by which VOCABULARY would give the same one."""

    name: str
    vocabulary: Any

    def __str__(self) -> str:
        """'PATH (49,152 tokens, EOS '<|im_end|>')', for a run's first line."""
        ends = ' or '.join(_token(self.vocabulary, i) for i in data.eos_ids(self.vocabulary))
        return f'{self.name} ({self.vocabulary.vocab_size:,} tokens, EOS {ends})'

    @functools.cached_property
    def fingerprint(self) -> str:
        """Differs where size, EOS, BOS or tokens do, wherever the file lies."""
        v = self.vocabulary
        tokens = [v.decode([int(i)]) for i in np.linspace(0, v.vocab_size - 1, 256)]
        return hashlib.sha256(repr((v.vocab_size, v.eos_id, data.bos_id(v), tokens)).encode()).hexdigest()[:16]

    def alike(self, name: str) -> bool:
        """Whether the vocabulary of a name is the same.

        Raises:
          UserError: that one cannot be read.
        """
        return name == self.name or RunVocabulary(name, data.named(name)).fingerprint == self.fingerprint

    def format(self, chat: str) -> Callable[[str], str]:
        """The chat format that a name means: one of tasks/chat.py, or 'own', the template that lies with the tokenizer.

        Raises (at its first use):
          UserError: none lies there.
        """
        if chat == 'own':
            return chat_template.Template(self.name.partition(data.EOS)[0])
        return getattr(formats, chat)

    @property
    def setting(self) -> str | None:
        """What VOCABULARY is to be in config.gin: None where the task's own is read."""
        return None if self.name.startswith(data.TASK) else self.name

    def read(self, config: DatasetConfig | None) -> DatasetConfig | None:
        """The config of a data set, read with this vocabulary."""
        return config and dataclasses.replace(config, vocabulary=self.vocabulary)


def choose(
    configs: Sequence[DatasetConfig | None], base: str | None, model_dir: str
) -> tuple[RunVocabulary, list[DatasetConfig | None]]:
    """Decide on the vocabulary of a run that starts, or goes on. The first of these that there is:

    1. VOCABULARY, which is DatasetConfig.vocabulary of any of its data sets.
    2. Where the base is a MODEL_DIR, the vocabulary that its run.json names, or that of a run behind it.
    3. The tokenizer that the base's weights bring, even where a task names another: a Hugging Face folder's, a .gguf's.
    4. The task's own. Of loaded weights it is taken only if somebody named it, as T5X's tasks do: the bytes that
       `registration.add` puts where none is named would train a real model on nonsense. Random weights take either.

    A MODEL_DIR that an older version began, whose run.json names none, goes on with 1 or 4 as it did.

    Args:
      configs: all data sets of the run.
      base: BaseConfig.path.
      model_dir: where the run writes.

    Returns:
      The vocabulary, and the configs as they are read with it.

    Raises:
      UserError: there is none of these; data sets or tasks that want different ones; `model_dir` began with another.
    """
    present, before = [config for config in configs if config is not None], rundir.read(model_dir)
    if before is not None and 'vocabulary' not in before:
        base = None
    given = _given(present)
    chosen = given or (base and of_base(base)) or of_tasks(_names(present), base)
    recorded = (before or {}).get('vocabulary')
    try:
        same = recorded is None or chosen.alike(recorded)
    except UserError:
        same = given is None  # not there any more: the base lies elsewhere now, and its own fingerprint is looked at
    if not same:
        raise UserError(
            f"MODEL_DIR '{model_dir}' is a run with another vocabulary ({recorded}, now {chosen.name}); set VOCABULARY "
            'as it was, name another folder, or delete it to start over'
        )
    return chosen, [chosen.read(config) for config in configs]


def of_run(model_dir: str, configs: Sequence[DatasetConfig | None] = (), now: str | None = None) -> RunVocabulary:
    """The vocabulary of a finished run, to measure or ask it.

    Args:
      configs: its data sets, if it has some; their `vocabulary`, where set to another than the run's, comes first.
      now: where its base lies if no longer where it was; the tokenizer may have moved along.

    Raises:
      UserError: it cannot be read, is no longer the same, or there is none.
    """
    configs = [config for config in configs if config is not None]
    about = rundir.read(model_dir) or {}
    name = about.get('vocabulary')
    given = _given(c for c in configs if not isinstance(c.vocabulary, str) or _absolute(c.vocabulary) != name)
    if given is not None:
        return given
    if name is not None:
        return _recorded(model_dir, name, now)
    if configs and 'imported' not in about:  # as it was trained, by an older version
        return of_tasks(_names(configs))
    return of_base(model_dir) or named(lineage.origin(model_dir))


def of_base(path: str) -> RunVocabulary | None:
    """What `choose` finds behind a base: a MODEL_DIR's vocabulary, or the tokenizer of weights; None if neither."""
    *model_dirs, weights = lineage.chain(path)
    for model_dir in model_dirs:
        if name := (rundir.read(model_dir) or {}).get('vocabulary'):
            return _recorded(model_dir, name)
    name = None if weights.startswith(_RANDOM) else vocabularies.of_base(weights)
    return None if name is None else named(name)


def of_tasks(names: Sequence[str], base: str | None = None) -> RunVocabulary:
    """The one vocabulary that these tasks and mixtures are registered with.

    Raises:
      UserError: they have several; or it is the default, where `base` names weights that a file holds.
    """
    from perl_jax.tasks import registration

    tasks = {task.name: task.output_features for name in names for task in data.members(data.find(name))}
    read = [(name, features[key].vocabulary) for name, features in tasks.items() for key in _READ if key in features]
    (first, vocabulary), *others = read
    chosen = RunVocabulary(data.name_of(vocabulary, first), vocabulary)
    for name, vocabulary in others:
        other = RunVocabulary(data.name_of(vocabulary, name), vocabulary)
        if vocabulary is not chosen.vocabulary and other.fingerprint != chosen.fingerprint:
            raise UserError(
                f"task '{first}' is registered with the vocabulary {chosen}, task '{name}' with {other}; "
                "a model reads all with one: set VOCABULARY to the base model's"
            )
    origin = None if base is None else lineage.origin(base)
    if chosen.vocabulary is registration.DEFAULT and origin is not None and not origin.startswith(_RANDOM):
        raise UserError(
            f"'{origin}' brings no tokenizer, and task '{first}' was registered without a vocabulary; "
            "set VOCABULARY to the base model's tokenizer (ByT5: VOCABULARY = 'byt5')"
        )
    return chosen


def named(name: str) -> RunVocabulary:
    """What VOCABULARY = `name` means: see data.named; a MODEL_DIR means its own.

    Raises:
      UserError: it cannot be read.
    """
    if not name.startswith((hf.HUB, data.TASK)) and rundir.read(name) is not None:
        return of_run(name)
    return RunVocabulary(_absolute(name), data.named(name))


def check_rewards(model_dirs: Iterable[str | Sequence[str]], policy: RunVocabulary) -> None:
    """Rewards score the policy's tokens, so those have to be theirs; an older run does not say what its were."""
    for folder in itertools.chain.from_iterable([x] if isinstance(x, str) else x for x in model_dirs):
        name = (rundir.read(folder) or {}).get('vocabulary')
        if name is not None and name != policy.name and not policy.alike(_recorded(folder, name).name):
            raise UserError(
                f"LearnedReward.model_dir: '{folder}' was trained with the vocabulary '{name}', and the policy reads "
                f"with '{policy.name}'; start both from one SFT run"
            )


def _given(configs: Iterable[DatasetConfig]) -> RunVocabulary | None:
    """The one that is set."""
    values = [config.vocabulary for config in configs if config.vocabulary is not None]
    found = [named(v) if isinstance(v, str) else RunVocabulary(data.name_of(v), v) for v in values]
    for other in found[1:]:
        if not (other.name == found[0].name or other.fingerprint == found[0].fingerprint):
            raise UserError(
                f"DatasetConfig.vocabulary: '{found[0].name}' for one data set and '{other.name}' for another; "
                'a model reads all with one: set VOCABULARY'
            )
    return found[0] if found else None


def _recorded(model_dir: str, name: str, now: str | None = None) -> RunVocabulary:
    """The vocabulary that run.json names; if it is not there any more, what the base has brought to `now`."""
    found = RunVocabulary(name, data.named(name))
    try:
        found.fingerprint  # noqa: B018 (a file is only read when needed)
        return found
    except UserError as error:
        if now is not None and (moved := of_base(now)) is not None:
            return moved
        raise UserError(f"{error}; '{model_dir}' was trained with it: put it back, or set VOCABULARY") from error


def _names(configs: Iterable[DatasetConfig]) -> list[str]:
    return [each.mixture_or_task_name for config in configs for each in config.each()]


def _absolute(name: str) -> str:
    """A path that can be followed from any folder; other names as they are."""
    path, eos, token = name.partition(data.EOS)
    if '://' in path or path == 'byt5' or path.startswith(('package:', data.TASK)):
        return name
    return os.path.abspath(os.path.expanduser(path)) + eos + token


def _token(vocabulary: Any, i: int) -> str:
    if hasattr(vocabulary, 'piece'):
        return repr(vocabulary.piece(i))
    model = getattr(vocabulary, 'tokenizer', None)
    for name in ('id_to_token', 'id_to_piece'):
        if hasattr(model, name):
            return repr(getattr(model, name)(i))
    return str(i)
