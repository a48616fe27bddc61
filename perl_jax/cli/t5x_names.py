"""T5X's macros that are not read here: the setting to use instead. All others: docs/reference/t5x.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from perl_jax.errors import UserError

PAGE = "T5X's names and ours: docs/reference/t5x.md"

# The values of each that are accepted since they change nothing, and why others are refused.
_OFF: dict[str, tuple[tuple[Any, ...], str]] = {
    'DROPOUT_RATE': ((0.0,), "the base is frozen and runs without T5's dropout; LoRA's is lora.LoraSpec.dropout"),
    'Z_LOSS': ((0.0,), 'the losses here have no z-loss'),
    'LABEL_SMOOTHING': ((0.0,), 'the losses here have no label smoothing'),
    'LOSS_NORMALIZING_FACTOR': (
        (None, 'NUM_REAL_TARGET_TOKENS'), 'losses here are means over the real tokens, whatever their number',
    ),
}  # fmt: skip
_SHIPPED = {'Z_LOSS': 0.0001}  # a default in all of T5X's model files, so accepted too
MACROS = tuple(_OFF)
# Macros that T5X's model files set as well, so in a file that includes one of those they are nobody's choice.
OF_MODEL_FILES = 'MODEL', 'ACTIVATION_DTYPE', 'ACTIVATION_PARTITIONING_DIMS', 'PARAMETER_PARTITIONING_DIMS'
_OUTPUT = 'eval and sample take the folder of a run by --model_dir'
FLAGS = 'run_mode', 'dry_run', 'fdl_config', 'initialization_timeout', 'multiprocess_gpu'
# Where T5X's gin files find its classes and functions: `utils.DatasetConfig`, `partitioning.PjitPartitioner`.
_MODULES = 't5x', 'utils', 'trainer', 'models', 'network', 'train_script', 'eval_script', 'infer_script'
_CLASSES = ('PjitPartitioner',)  # of a module that perl_jax has too
OURS = {
    'MODEL': "use NETWORK, as in --gin_file=models/t5_1_1_base.gin, or T5X's model file with models/from_t5x.gin",
    'MIXTURE_OR_TASK_MODULE': "import the tasks' module by --gin_bindings='import MODULE', or that line in a gin file",
    'TRAIN_STEPS_RELATIVE': 'use TRAIN_STEPS, which counts the steps of this run',
    'EVAL_STEPS': 'use EVAL_EXAMPLES, the number of rows',
    'EVALUATOR_NUM_EXAMPLES': 'use EVAL_EXAMPLES',
    'EVALUATOR_USE_MEMORY_CACHE': 'leave it out: rows of evaluation stay in memory',
    'INFER_EVAL_DATASET': 'use PROMPTS_DATASET (sft) or EVAL_DATASET (policy): the prompts that evaluations answer',
    'JSON_WRITE_N_RESULTS': 'leave it out: all answers are written to samples.jsonl; EVAL_EXAMPLES is their number',
    'SHUFFLE_TRAIN_EXAMPLES': 'leave it out: rows are always shuffled, by RANDOM_SEED',
    'USE_HARDWARE_RNG': 'leave it out: random numbers are a function of RANDOM_SEED',
    'ACTIVATION_DTYPE': "use the network's dtype, decoder.DecoderConfig.dtype or t5.T5Config.dtype",
    'ACTIVATION_PARTITIONING_DIMS': 'use partitioning.Partitioner.logical_axis_rules',
    'PARAMETER_PARTITIONING_DIMS': 'use partitioning.Partitioner.logical_axis_rules',
    'MODEL_PARALLEL_SUBMESH': 'use partitioning.Partitioner.num_partitions',
    'NUM_MODEL_PARTITIONS': 'use partitioning.Partitioner.num_partitions',
    'CHECKPOINT_PERIOD': 'use EVAL_PERIOD: each evaluation saves a checkpoint',
    'SAVING_PERIOD': 'use EVAL_PERIOD: each evaluation saves a checkpoint',
    'CHECKPOINT_PATH': _OUTPUT,
    'INFER_OUTPUT_DIR': _OUTPUT,
    'EVAL_OUTPUT_DIR': _OUTPUT,
}


def check(values: Mapping[str, Any]) -> None:
    """Refuse T5X settings that would have no effect.

    Args:
      values: the values of those `MACROS` that are set.

    Raises:
      UserError: a setting is not off.
    """
    for name, value in values.items():
        off, why = _OFF[name]
        if value not in off and value != _SHIPPED.get(name):
            raise UserError(f'{name} = {value!r} of T5X would change nothing: {why}. Add --gin.{name}={off[0]}; {PAGE}')


def check_unread(macros: Iterable[str]) -> None:
    """Refuse T5X's macros that nothing reads here.

    Args:
      macros: names that are set and not read.

    Raises:
      UserError: one of them is T5X's; the line names the setting to use instead.
    """
    for name in sorted(OURS.keys() & set(macros)):
        raise UserError(f'{name} of T5X is not read here: {OURS[name]}; {PAGE}')


def is_flag(argument: str) -> bool:
    """Returns whether an argument is a flag of T5X that perl_jax does not have."""
    return argument.startswith('--') and argument[2:].partition('=')[0] in FLAGS


def is_configurable(name: str) -> bool:
    """Returns whether a class or function of gin is named as T5X's are: 'utils.DatasetConfig'."""
    module, _, member = name.rpartition('.')
    return module.partition('.')[0] in _MODULES or member in _CLASSES
