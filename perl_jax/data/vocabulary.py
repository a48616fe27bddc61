"""Which vocabulary a run reads its tasks with: `choose` decides, for every command and caller of `train`.

run.json records it, so that reward, policy, eval, sample, judge and inspect use the same one as the SFT run.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
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

RUN_FIELDS = ('vocabulary', 'vocabulary_fingerprint')  # in run.json
_COMPARED_TOKENS = 4096  # tokens of a vocabulary that enter its fingerprint, at most
_RANDOM = 'random:'  # how base.py names random weights
_COMPARED_TEXTS = (  # texts that most other vocabularies encode differently
    'The quick brown fox jumps over the lazy dog, and 1,234.5 of them (that is 42%) do not.\n\n\tdef f(x): x ** 2',
    "naïve café — Ελληνικά, русский, 日本語, 한국어, العربية, हिन्दी 👩‍👩‍👧  two  spaces; it's WE'LL ﬁ e\u0301",
)
_TOKEN_FEATURES = ('inputs', 'targets', 'chosen', 'rejected')  # the features that a model reads as tokens


@dataclasses.dataclass(frozen=True)
class RunVocabulary:
    """A SeqIO vocabulary, and the name from which VOCABULARY loads the same one."""

    name: str
    vocabulary: Any

    def __str__(self) -> str:
        """Returns "PATH (49,152 tokens, EOS '<|im_end|>')", for a run's first line."""
        ends = ' or '.join(repr(rows.token_text(self.vocabulary, i)) for i in lexicon.eos_ids(self.vocabulary))
        return f'{self.name} ({self.vocabulary.vocab_size:,} tokens, EOS {ends})'

    @functools.cached_property
    def token_fingerprint(self) -> str:
        """A hash of size, EOS, BOS, tokens and the encoding of sample texts, wherever the file is."""
        v = self.vocabulary
        tokens = [v.decode([int(i)]) for i in np.linspace(0, v.vocab_size - 1, min(v.vocab_size, _COMPARED_TOKENS))]
        texts = [[int(i) for i in v.encode(text)] for text in _COMPARED_TEXTS]
        return _digest(v.vocab_size, v.eos_id, lexicon.bos_id(v), tokens, texts)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of `token_fingerprint` and of the tokens that end an answer."""
        return _digest(self.token_fingerprint, lexicon.eos_ids(self.vocabulary))

    @property
    def run_fields(self) -> dict[str, str]:
        """The vocabulary's fields of run.json; only the name if the vocabulary cannot be read, as after an import."""
        try:
            return dict(zip(RUN_FIELDS, (self.name, self.fingerprint), strict=True))
        except UserError:
            return {RUN_FIELDS[0]: self.name}

    def has_same_tokens(self, name: str) -> bool:
        """Returns whether the vocabulary of a name has the same tokens.

        Raises:
          UserError: that vocabulary cannot be read.
        """
        return (
            name == self.name
            or RunVocabulary(name, lexicon.from_name(name)).token_fingerprint == self.token_fingerprint
        )

    def format(self, chat: str) -> Callable[[str], str]:
        """Returns a chat format: one of tasks/chat.py by name, or for 'own' the template beside the tokenizer.

        Raises:
          UserError: there is no template, or the vocabulary lacks the format's control tokens.
        """
        template_of_tokenizer = template.Template(self.name.partition(lexicon.EOS)[0]) if chat == 'own' else None
        chat_format = template_of_tokenizer or getattr(formats, chat)
        rows.check_controls(chat_format('a message'), self.vocabulary)
        return chat_format

    @property
    def setting(self) -> str | None:
        """The value of VOCABULARY in config.gin: None if the task's own vocabulary is used."""
        return None if self.name.startswith(lexicon.TASK) else self.name

    def apply_to(self, config: DatasetConfig) -> DatasetConfig:
        """Returns the config of a data set, read with this vocabulary."""
        return dataclasses.replace(config, vocabulary=self.vocabulary)


def choose(
    configs: Sequence[DatasetConfig | None], base_path: str | None, model_dir: str
) -> tuple[RunVocabulary, list[Any]]:
    """Choose the vocabulary of a run that starts or resumes: the first of these that exists.

    1. VOCABULARY, which is DatasetConfig.vocabulary of any of its data sets.
    2. If the base is a MODEL_DIR, the vocabulary in its run.json, or in that of a run before it.
    3. The tokenizer that comes with the base's weights (of a Hugging Face folder or a .gguf), whatever the task's is.
    4. The task's own. For loaded weights only if it was set explicitly, as T5X's tasks do: the bytes that
       `registration.add` uses by default would train a real model on meaningless tokens. Random weights take either.

    A MODEL_DIR of an older version, whose run.json has no vocabulary, resumes with 1 or 4 as it did.

    Args:
      configs: all data sets of the run.
      base_path: BaseConfig.path.
      model_dir: where the run writes.

    Returns:
      The vocabulary, and the configs with it; None stays None.

    Raises:
      UserError: there is none of these; data sets or tasks have different ones; or `model_dir` began with another, or
        with the same before its file changed.
    """
    present, run_info = [config for config in configs if config is not None], rundir.read(model_dir)
    if run_info is not None and 'vocabulary' not in run_info:
        base_path = None
    explicit = _explicit_vocabulary(config.vocabulary for config in present if config.vocabulary is not None)
    chosen = explicit or (base_path and of_base(base_path)) or of_tasks(_names(present), base_path)
    recorded_name, fingerprint = ((run_info or {}).get(key) for key in RUN_FIELDS)
    if recorded_name == chosen.name:
        _check_unchanged(chosen, model_dir)
    try:
        if recorded_name is None:
            is_same = True
        elif fingerprint:
            is_same = chosen.fingerprint == fingerprint
        else:
            is_same = chosen.has_same_tokens(recorded_name)
    except UserError:
        is_same = explicit is None  # the recorded file is gone: the base was moved, and its fingerprint is checked
    if not is_same:
        raise UserError(
            f"MODEL_DIR '{model_dir}' is a run with another vocabulary ({recorded_name}, now {chosen.name}); set "
            'VOCABULARY as it was, name another folder, or delete it to start over'
        )
    return chosen, [config and chosen.apply_to(config) for config in configs]


def of_run(
    model_dir: str, configs: Sequence[DatasetConfig | None] = (), base_path: str | None = None, vocabulary: Any = None
) -> RunVocabulary:
    """Returns the vocabulary of a finished run, to evaluate or sample from it.

    Args:
      model_dir: the run's.
      configs: its data sets, if any; their `vocabulary` has precedence if it differs from the run's.
      base_path: where the run's base is, if it was moved; the tokenizer may have moved with it.
      vocabulary: likewise VOCABULARY, where no data set specifies it.

    Raises:
      UserError: it cannot be read, has changed, or there is none.
    """
    configs = [config for config in configs if config is not None]
    run_info = rundir.read(model_dir) or {}
    recorded_name = run_info.get('vocabulary')
    explicit_values = [value for value in [*(config.vocabulary for config in configs), vocabulary] if value is not None]
    explicit = _explicit_vocabulary(
        v for v in explicit_values if not isinstance(v, str) or lexicon.absolute_name(v) != recorded_name
    )
    if explicit is not None and explicit.name != recorded_name:
        return explicit
    if recorded_name is not None:
        return _recorded_vocabulary(model_dir, recorded_name, base_path)
    if configs and 'imported' not in run_info:  # of an older version, which trained with the tasks' vocabulary
        return of_tasks(_names(configs))
    if (chosen := of_base(model_dir)) is None and configs:
        chosen = of_tasks(_names(configs), model_dir)
    return chosen or _vocabulary_beside(lineage.origin(model_dir))


def of_base(path: str) -> RunVocabulary | None:
    """Returns the vocabulary of a base: a MODEL_DIR's, or the tokenizer of weights; None if it has neither."""
    *model_dirs, weights = lineage.chain(path)
    for model_dir in model_dirs:
        if name := (rundir.read(model_dir) or {}).get('vocabulary'):
            return _recorded_vocabulary(model_dir, name)
    name = None if weights.startswith(_RANDOM) else vocabularies.of_base(weights)
    return None if name is None else from_name(name)


def of_tasks(names: Sequence[str], base_path: str | None = None) -> RunVocabulary:
    """Returns the one vocabulary that these tasks and mixtures are registered with.

    Raises:
      UserError: they have several; or it is the default, and `base_path` names weights from a file.
    """
    from perl_jax.tasks import registration

    tasks = {task.name: task.output_features for name in names for task in providers.members(providers.find(name))}
    features_read = [
        (name, features[key].vocabulary)
        for name, features in tasks.items()
        for key in _TOKEN_FEATURES
        if key in features
    ]
    (first_name, vocabulary), *rest = features_read
    first_vocabulary = RunVocabulary(lexicon.name_of(vocabulary, first_name), vocabulary)
    for name, vocabulary in rest:
        other = RunVocabulary(lexicon.name_of(vocabulary, name), vocabulary)
        if vocabulary is not first_vocabulary.vocabulary and other.fingerprint != first_vocabulary.fingerprint:
            raise UserError(
                f"task '{first_name}' is registered with the vocabulary {first_vocabulary}, task '{name}' "
                f"with {other}; a model needs one for all: set VOCABULARY to the base model's"
            )
    origin = None if base_path is None else lineage.origin(base_path)
    if first_vocabulary.vocabulary is registration.DEFAULT and origin is not None and not origin.startswith(_RANDOM):
        raise UserError(
            f"'{origin}' has no tokenizer, and task '{first_name}' was registered without a vocabulary; "
            "set VOCABULARY to the base model's tokenizer (ByT5: VOCABULARY = 'byt5')"
        )
    return first_vocabulary


def _vocabulary_beside(weights: str) -> RunVocabulary:
    """Returns the tokenizer that a user put beside weights that come without one, as T5X's."""
    try:
        if not weights.startswith(_RANDOM):
            return from_name(weights)
    except UserError:
        pass
    raise UserError(f"'{weights}' has no tokenizer; set VOCABULARY (ByT5: VOCABULARY = 'byt5')")


def from_name(name: str) -> RunVocabulary:
    """Returns the vocabulary that VOCABULARY = `name` means (lexicon.from_name); of a MODEL_DIR its run's.

    Raises:
      UserError: it cannot be read.
    """
    if name and not name.startswith((hf.HUB, lexicon.TASK)) and rundir.read(name) is not None:
        return of_run(name)
    return RunVocabulary(lexicon.absolute_name(name), lexicon.from_name(name))


def check_rewards(model_dirs: Iterable[str], policy: RunVocabulary) -> None:
    """Check that learned rewards have the policy's vocabulary, since they score its tokens.

    A reward without a recorded vocabulary only causes a warning.

    Raises:
      UserError: a reward was trained with another vocabulary.
    """
    for folder in model_dirs:
        if (run_info := rundir.read(folder)) is None:
            continue  # not a run: rewards/scoring.py reports it
        name, fingerprint = (run_info.get(key) for key in RUN_FIELDS)
        if name is None:
            logging.getLogger('perl_jax').warning(
                f"LearnedReward.model_dir: '{folder}' records no vocabulary; it is given the tokens of '{policy.name}'"
            )
        if name is None or fingerprint == policy.fingerprint or (name == policy.name and fingerprint is None):
            continue
        if not policy.has_same_tokens(_recorded_vocabulary(folder, name).name):
            raise UserError(
                f"LearnedReward.model_dir: '{folder}' was trained with the vocabulary '{name}', and the policy reads "
                f"with '{policy.name}'; start both from one SFT run"
            )


def _explicit_vocabulary(values: Iterable[Any]) -> RunVocabulary | None:
    """Returns the vocabulary that names or vocabularies set, None if there are none; they have to agree."""
    chosen = [from_name(v) if isinstance(v, str) else RunVocabulary(lexicon.name_of(v), v) for v in values]
    for other in chosen[1:]:
        if not (other.name == chosen[0].name or other.fingerprint == chosen[0].fingerprint):
            raise UserError(
                f"DatasetConfig.vocabulary: '{chosen[0].name}' for one data set and '{other.name}' for another; "
                'a model needs one for all: set VOCABULARY'
            )
    return chosen[0] if chosen else None


def _recorded_vocabulary(model_dir: str, name: str, base_path: str | None = None) -> RunVocabulary:
    """Returns the vocabulary in run.json; if its file is gone, the one of the base at `base_path`."""
    try:
        chosen = RunVocabulary(name, lexicon.from_name(name))
        chosen.fingerprint  # noqa: B018 (reads the file, which is lazy)
    except UserError as error:
        chosen = None if base_path is None else of_base(base_path)
        if chosen is None:
            raise UserError(f"{error}; '{model_dir}' was trained with it: put it back, or set VOCABULARY") from error
    _check_unchanged(chosen, model_dir)
    return chosen


def _check_unchanged(vocabulary: RunVocabulary, model_dir: str) -> None:
    """Refuse a run's vocabulary whose file has changed since; older versions recorded no fingerprint."""
    fingerprint = (rundir.read(model_dir) or {}).get(RUN_FIELDS[1])
    if fingerprint not in (None, vocabulary.fingerprint):
        raise UserError(
            f"the vocabulary '{vocabulary.name}' is not what it was when '{model_dir}' was trained with it "
            f'({fingerprint}, now {vocabulary.fingerprint}): its tokens, or what ends an answer; put it back, or '
            'set VOCABULARY'
        )


def _digest(*values: Any) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def _names(configs: Iterable[DatasetConfig]) -> list[str]:
    return [each.task_name for config in configs for each in config.each()]
