"""SeqIO feature converters: from a task's token features to the arrays of one row of a batch (types.py).

Each turns ragged 1-D features into fixed shapes, padded on the right, with masks that are true at real tokens. The
worked examples use P = inputs 4 and R = targets 3; 1 is the EOS. This module imports seqio, which takes seconds:
datasets.py imports it where it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import seqio
import tensorflow as tf

from perl_jax.errors import UserError

FeatureSpec = seqio.FeatureConverter.FeatureSpec
Features = Mapping[str, tf.Tensor]


_TOKENS = FeatureSpec(tf.int32)
_PROMPT = {'inputs': _TOKENS, 'inputs_mask': FeatureSpec(tf.bool)}
_RESPONSES = {
    'targets': FeatureSpec(tf.int32, rank=2, sequence_dim=1),
    'targets_mask': FeatureSpec(tf.bool, rank=2, sequence_dim=1),
}


def with_dtypes(ds: tf.data.Dataset, task_features: Mapping[str, FeatureSpec], task_name: str) -> Any:
    """Returns a task's rows, a tf.data.Dataset, with the features of a converter in its types: TFDS has int64.

    Args:
      ds: the rows.
      task_features: TASK_FEATURES of the converter.
      task_name: for messages.

    Raises:
      UserError: tokens that are not integers, or a label that is no number.
    """
    element_spec: Any = ds.element_spec
    for name, spec in task_features.items():
        dtype = element_spec[name].dtype
        if not (dtype.is_integer or (spec.dtype.is_floating and (dtype.is_floating or dtype.is_bool))):
            kind = 'numbers' if spec.dtype.is_floating else 'integers'
            raise UserError(f"task '{task_name}': feature '{name}' is {dtype.name}; give {kind}, as {spec.dtype.name}")
    cast: Any = lambda row: row | {name: tf.cast(row[name], spec.dtype) for name, spec in task_features.items()}  # noqa: E731
    return ds.map(cast, num_parallel_calls=tf.data.AUTOTUNE)


def _pad(x: tf.Tensor, length: int) -> tf.Tensor:
    return tf.ensure_shape(tf.pad(x, [[0, length - tf.size(x)]]), [length])


class _Converter(seqio.FeatureConverter):
    """Base class. `RESPONSES` lists the features that become the K rows of `targets`, in order."""

    RESPONSES: tuple[str, ...] = ()
    PACKING_FEATURE_DTYPES: Any = None  # nothing is packed

    def __init__(self) -> None:
        super().__init__(pack=False)

    def _convert_features(self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]) -> tf.data.Dataset:
        def convert(features: Features) -> Features:
            mask = lambda name: _pad(tf.ones_like(features[name], tf.bool), task_feature_lengths[name])  # noqa: E731
            pad = lambda name: _pad(features[name], task_feature_lengths[name])  # noqa: E731
            row = {'inputs': pad('inputs'), 'inputs_mask': mask('inputs')}
            if self.RESPONSES:
                row['targets'] = tf.stack([pad(name) for name in self.RESPONSES])
                row['targets_mask'] = tf.stack([mask(name) for name in self.RESPONSES])
            if 'labels' in self.MODEL_FEATURES:
                row['labels'] = features['label'][None]
            if 'weights' in self.MODEL_FEATURES:
                row['weights'] = features['weight']
            return row

        return ds.map(convert, num_parallel_calls=tf.data.AUTOTUNE)

    def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> Mapping[str, int]:
        lengths = {name: task_feature_lengths['inputs'] for name in ('inputs', 'inputs_mask')}
        if self.RESPONSES:
            lengths |= {name: task_feature_lengths[self.RESPONSES[0]] for name in ('targets', 'targets_mask')}
        return lengths | {name: 1 for name in ('labels', 'weights') if name in self.MODEL_FEATURES}


class PromptsFeatureConverter(_Converter):
    """inputs [7, 8]  ->  inputs [7, 8, 0, 0], inputs_mask [1, 1, 0, 0]"""

    TASK_FEATURES = {'inputs': _TOKENS}
    MODEL_FEATURES = _PROMPT


class SftFeatureConverter(_Converter):
    """inputs [7, 8], targets [5, 1]  ->  inputs, inputs_mask as above; targets [[5, 1, 0]], targets_mask [[1, 1, 0]]"""

    RESPONSES = ('targets',)
    TASK_FEATURES = {'inputs': _TOKENS, 'targets': _TOKENS}
    MODEL_FEATURES = _PROMPT | _RESPONSES


class PairsFeatureConverter(_Converter):
    """inputs [7, 8], chosen [5, 1], rejected [6, 9, 1]  ->  targets [[5, 1, 0], [6, 9, 1]], the chosen one first"""

    RESPONSES = ('chosen', 'rejected')
    TASK_FEATURES = {'inputs': _TOKENS, 'chosen': _TOKENS, 'rejected': _TOKENS}
    MODEL_FEATURES = _PROMPT | _RESPONSES


class WeightedPairsFeatureConverter(PairsFeatureConverter):
    """As above, weight 0.5  ->  weights 0.5, where rows have one; see pair_weights.py"""

    TASK_FEATURES = {**PairsFeatureConverter.TASK_FEATURES, 'weight': FeatureSpec(tf.float32, rank=0)}
    MODEL_FEATURES = {**PairsFeatureConverter.MODEL_FEATURES, 'weights': FeatureSpec(tf.float32, rank=0)}


class ThumbsFeatureConverter(_Converter):
    """inputs [7, 8], targets [5, 1], label 1.0  ->  targets [[5, 1, 0]], labels [1.0]"""

    RESPONSES = ('targets',)
    TASK_FEATURES = {'inputs': _TOKENS, 'targets': _TOKENS, 'label': FeatureSpec(tf.float32, rank=0)}
    MODEL_FEATURES = _PROMPT | _RESPONSES | {'labels': FeatureSpec(tf.float32)}
