"""Which vocabulary a run reads its tasks with: decided here, by `choose`, for every command and caller of `train`.

run.json names it, so that it goes along from SFT to reward and policy, and to eval, sample,
judge and inspect.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from perl_jax.data import lexicon, providers, rows
from perl_jax.data.datasets import DatasetConfig
from perl_jax.errors import UserError
from perl_jax.interop import hf
from perl_jax.runs import lineage, rundir
from perl_jax.tasks import chat as formats
from perl_jax.tokenizers import vocabularies
from perl_jax.tokenizers.chat import template

NAMED = ('vocabulary', 'vocabulary_fingerprint')  # in run.json
_TOKENS = 4096  # so many of a vocabulary are looked at
_RANDOM = 'random:'  # how base.py names weights that no file holds
_TEXTS = (  # read by another vocabulary, most of them become other tokens
    'The quick brown fox jumps over the lazy dog, and 1,234.5 of them (that is 42%) do not.\n\n\tdef f(x): x ** 2',
    "naïve café — Ελληνικά, русский, 日本語, 한국어, العربية, हिन्दी 👩‍👩‍👧  two  spaces; it's WE'LL ﬁ e\u0301",
)
_READ = ('inputs', 'targets', 'chosen', 'rejected')  # the features that a model reads


@dataclasses.dataclass(frozen=True)
class RunVocabulary:
    """A SeqIO vocabulary, and the name by which VOCABULARY would give the same one."""

    name: str
    vocabulary: Any

    def __str__(self) -> str:
        """'PATH (49,152 tokens, EOS '<|im_end|>')', for a run's first line."""
        ends = ' or '.join(repr(rows.piece(self.vocabulary, i)) for i in lexicon.eos_ids(self.vocabulary))
        return f'{self.name} ({self.vocabulary.vocab_size:,} tokens, EOS {ends})'

    @functools.cached_property
    def tokens(self) -> str:
        """Differs where size, EOS, BOS, tokens or the way in which texts become tokens do, wherever the file lies."""
        v = self.vocabulary
        tokens = [v.decode([int(i)]) for i in np.linspace(0, v.vocab_size - 1, min(v.vocab_size, _TOKENS))]
        texts = [[int(i) for i in v.encode(text)] for text in _TEXTS]
        return _digest(v.vocab_size, v.eos_id, lexicon.bos_id(v), tokens, texts)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Differs where `tokens` do, or what ends an answer."""
        return _digest(self.tokens, lexicon.eos_ids(self.vocabulary))

    @property
    def about(self) -> dict[str, str]:
        """What run.json says of it; of one that cannot be read, as an import may bring, its name alone."""
        try:
            return dict(zip(NAMED, (self.name, self.fingerprint), strict=True))
        except UserError:
            return {NAMED[0]: self.name}

    def alike(self, name: str) -> bool:
        """Whether the vocabulary of a name has the same tokens.

        Raises:
          UserError: that one cannot be read.
        """
        return name == self.name or RunVocabulary(name, lexicon.named(name)).tokens == self.tokens

    def format(self, chat: str) -> Callable[[str], str]:
        """The chat format that a name means: one of tasks/chat.py, or 'own', the template that lies with the tokenizer.

        Raises:
          UserError: none lies there, or the vocabulary has not its control tokens.
        """
        own = template.Template(self.name.partition(lexicon.EOS)[0]) if chat == 'own' else None
        form = own or getattr(formats, chat)
        rows.check_controls(form('a message'), self.vocabulary)
        return form

    @property
    def setting(self) -> str | None:
        """What VOCABULARY is to be in config.gin: None where the task's own is read."""
        return None if self.name.startswith(lexicon.TASK) else self.name

    def read(self, config: DatasetConfig) -> DatasetConfig:
        """The config of a data set, read with this vocabulary."""
        return dataclasses.replace(config, vocabulary=self.vocabulary)


def choose(
    configs: Sequence[DatasetConfig | None], base: str | None, model_dir: str
) -> tuple[RunVocabulary, list[Any]]:
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
      The vocabulary, and the configs as they are read with it; None stays None.

    Raises:
      UserError: there is none of these; data sets or tasks that want different ones; `model_dir` began with another,
        or with the same before it was changed.
    """
    present, before = [config for config in configs if config is not None], rundir.read(model_dir)
    if before is not None and 'vocabulary' not in before:
        base = None
    given = _given(config.vocabulary for config in present if config.vocabulary is not None)
    chosen = given or (base and of_base(base)) or of_tasks(_names(present), base)
    recorded, fingerprint = ((before or {}).get(key) for key in NAMED)
    if recorded == chosen.name:
        _check_unchanged(chosen, model_dir)
    try:
        same = recorded is None or (chosen.fingerprint == fingerprint if fingerprint else chosen.alike(recorded))
    except UserError:
        same = given is None  # not there any more: the base lies elsewhere now, and its own fingerprint is looked at
    if not same:
        raise UserError(
            f"MODEL_DIR '{model_dir}' is a run with another vocabulary ({recorded}, now {chosen.name}); set VOCABULARY "
            'as it was, name another folder, or delete it to start over'
        )
    return chosen, [config and chosen.read(config) for config in configs]


def of_run(
    model_dir: str, configs: Sequence[DatasetConfig | None] = (), now: str | None = None, given: Any = None
) -> RunVocabulary:
    """The vocabulary of a finished run, to measure or ask it.

    Args:
      configs: its data sets, if it has some; their `vocabulary`, where set to another than the run's, comes first.
      now: where its base lies if no longer where it was; the tokenizer may have moved along.
      given: likewise what VOCABULARY is, where there may be no data set that says so.

    Raises:
      UserError: it cannot be read, is no longer the same, or there is none.
    """
    configs = [config for config in configs if config is not None]
    about = rundir.read(model_dir) or {}
    name = about.get('vocabulary')
    values = [value for value in [*(config.vocabulary for config in configs), given] if value is not None]
    chosen = _given(v for v in values if not isinstance(v, str) or lexicon.absolute(v) != name)
    if chosen is not None and chosen.name != name:
        return chosen
    if name is not None:
        return _recorded(model_dir, name, now)
    if configs and 'imported' not in about:  # as it was trained, by an older version
        return of_tasks(_names(configs))
    if (chosen := of_base(model_dir)) is None and configs:
        chosen = of_tasks(_names(configs), model_dir)
    return chosen or _beside(lineage.origin(model_dir))


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

    tasks = {task.name: task.output_features for name in names for task in providers.members(providers.find(name))}
    read = [(name, features[key].vocabulary) for name, features in tasks.items() for key in _READ if key in features]
    (first, vocabulary), *others = read
    chosen = RunVocabulary(lexicon.name_of(vocabulary, first), vocabulary)
    for name, vocabulary in others:
        other = RunVocabulary(lexicon.name_of(vocabulary, name), vocabulary)
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


def _beside(weights: str) -> RunVocabulary:
    """A tokenizer that somebody put to weights which bring none, as T5X's."""
    try:
        if not weights.startswith(_RANDOM):
            return named(weights)
    except UserError:
        pass
    raise UserError(f"'{weights}' brings no tokenizer; set VOCABULARY (ByT5: VOCABULARY = 'byt5')")


def named(name: str) -> RunVocabulary:
    """What VOCABULARY = `name` means: see lexicon.named; a MODEL_DIR means its own.

    Raises:
      UserError: it cannot be read.
    """
    if name and not name.startswith((hf.HUB, lexicon.TASK)) and rundir.read(name) is not None:
        return of_run(name)
    return RunVocabulary(lexicon.absolute(name), lexicon.named(name))


def check_rewards(model_dirs: Iterable[str | Sequence[str]], policy: RunVocabulary) -> None:
    """Rewards score the policy's tokens, so those have to be theirs; without a tokenizer none is named."""
    for folder in itertools.chain.from_iterable([x] if isinstance(x, str) else x for x in model_dirs):
        if (about := rundir.read(folder)) is None:
            continue  # no run: rewards/scoring.py says so
        name, fingerprint = (about.get(key) for key in NAMED)
        if name is None:
            logging.getLogger('perl_jax').warning(
                f"LearnedReward.model_dir: '{folder}' names no vocabulary; it is given the tokens of '{policy.name}'"
            )
        if name is None or fingerprint == policy.fingerprint or (name == policy.name and fingerprint is None):
            continue
        if not policy.alike(_recorded(folder, name).name):
            raise UserError(
                f"LearnedReward.model_dir: '{folder}' was trained with the vocabulary '{name}', and the policy reads "
                f"with '{policy.name}'; start both from one SFT run"
            )


def _given(values: Iterable[Any]) -> RunVocabulary | None:
    """The one that is set: names or vocabularies."""
    found = [named(v) if isinstance(v, str) else RunVocabulary(lexicon.name_of(v), v) for v in values]
    for other in found[1:]:
        if not (other.name == found[0].name or other.fingerprint == found[0].fingerprint):
            raise UserError(
                f"DatasetConfig.vocabulary: '{found[0].name}' for one data set and '{other.name}' for another; "
                'a model reads all with one: set VOCABULARY'
            )
    return found[0] if found else None


def _recorded(model_dir: str, name: str, now: str | None = None) -> RunVocabulary:
    """The vocabulary that run.json names; if it is not there any more, what the base has brought to `now`."""
    try:
        found = RunVocabulary(name, lexicon.named(name))
        found.fingerprint  # noqa: B018 (a file is only read when needed)
    except UserError as error:
        found = None if now is None else of_base(now)
        if found is None:
            raise UserError(f"{error}; '{model_dir}' was trained with it: put it back, or set VOCABULARY") from error
    _check_unchanged(found, model_dir)
    return found


def _check_unchanged(words: RunVocabulary, model_dir: str) -> None:
    """Refuse the vocabulary of a run whose file has changed since; runs of older versions do not say what it was."""
    fingerprint = (rundir.read(model_dir) or {}).get(NAMED[1])
    if fingerprint not in (None, words.fingerprint):
        raise UserError(
            f"the vocabulary '{words.name}' is not what it was when '{model_dir}' was trained with it ({fingerprint}, "
            f'now {words.fingerprint}): its tokens, or what ends an answer; put it back, or set VOCABULARY'
        )


def _digest(*values: Any) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def _names(configs: Iterable[DatasetConfig]) -> list[str]:
    return [each.task_name for config in configs for each in config.each()]
