"""Reads AndroidControl's TFRecords as text: a screen is lines of its elements, an action names the element it touches.

android_control-000xx-of-00020 (GZIP) and splits.json, as gs://gresearch/android_control has them; screenshots are
passed over. A screen's line is `[number] Class "label" checked selected`, for every visible element of the app's
windows that has a text or can be touched. A click's x and y become `element`, the smallest such element around them,
and stay where there is none.

Source: Li et al., On the Effects of Data Scale on UI Control Agents, arXiv 2406.03679; github.com/google-research/
google-research/tree/master/android_control. The accessibility tree's protobuf is google-deepmind/android_env's
android_env/proto/a11y, of which _MESSAGES are the fields needed here.
"""

import functools
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from perl_jax import json_files

_Field = descriptor_pb2.FieldDescriptorProto
_INT, _BOOL, _TEXT, _MESSAGE = _Field.TYPE_INT32, _Field.TYPE_BOOL, _Field.TYPE_STRING, _Field.TYPE_MESSAGE
_MESSAGES = {
    'Forest': [('windows', 1, 'Window', True)],
    'Window': [('window_type', 6, _INT, False), ('tree', 11, 'Tree', False)],
    'Tree': [('nodes', 1, 'Node', True)],
    'Node': [
        ('bounds_in_screen', 2, 'Rect', False), ('class_name', 3, _TEXT, False),
        ('content_description', 4, _TEXT, False), ('hint_text', 5, _TEXT, False), ('text', 7, _TEXT, False),
        ('is_checked', 13, _BOOL, False), ('is_clickable', 14, _BOOL, False), ('is_editable', 15, _BOOL, False),
        ('is_long_clickable', 19, _BOOL, False), ('is_scrollable', 21, _BOOL, False),
        ('is_selected', 22, _BOOL, False), ('is_visible_to_user', 23, _BOOL, False),
        ('tooltip_text', 31, _TEXT, False),
    ],
    'Rect': [(side, number, _INT, False) for number, side in enumerate(('left', 'top', 'right', 'bottom'), start=1)],
}  # fmt: skip
_APPLICATION = 1  # window_type; the others are the keyboard, the status bar ..


def episodes(file: pathlib.Path) -> Iterator[Mapping | str]:
    """The episodes of one TFRecord as android_control.py wants its rows; one that is not such a record as a text.

    Raises:
      OSError: the file is no whole GZIP TFRecord.
      UserError: splits.json is not beside it, or has other fields.
    """
    import tensorflow as tf

    splits = _splits(file.parent / 'splits.json')
    try:
        for record in tf.data.TFRecordDataset(str(file), compression_type='GZIP').as_numpy_iterator():
            try:
                yield Episode(tf.train.Example.FromString(record).features.feature, splits)
            except (ValueError, LookupError) as error:
                yield f'not an episode: {error!r}'
    except tf.errors.OpError as error:
        raise OSError(error.message) from None


@functools.cache
def _splits(file: pathlib.Path) -> dict[int, str]:
    """Which split an episode is in; {"train": [episode_id, ..], "validation": .., "test": ..}."""
    numbers_by_split = json_files.read(file)
    json_files.check(numbers_by_split, file, dict.fromkeys(numbers_by_split, list[int]))
    return {number: split for split, numbers in numbers_by_split.items() for number in numbers}


class Episode(Mapping):
    """A record as android_control.py wants its rows; its screens are unpacked only if they are asked for."""

    def __init__(self, features: Mapping, splits: Mapping[int, str]) -> None:
        self._features = features
        self._number = features['episode_id'].int64_list.value[0]
        self._split = splits[self._number]

    def __getitem__(self, key: str) -> Any:
        match key:
            case 'episode_id':
                return self._number
            case 'split':
                return self._split
            case 'goal':
                return self._bytes('goal')[0].decode()
            case 'step_instructions':
                return [text.decode() for text in self._bytes('step_instructions')]
            case 'accessibility_trees':
                return ['\n'.join(line for line, _ in screen) for screen in self._screens]
            case 'actions':
                actions = map(json.loads, self._bytes('actions'))
                return [_on_element(action, screen) for action, screen in zip(actions, self._screens)]
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return iter(('episode_id', 'split', 'goal', 'step_instructions', 'accessibility_trees', 'actions'))

    def __len__(self) -> int:
        return 6

    @functools.cached_property
    def _screens(self) -> list[list[tuple[str, tuple[int, int, int, int]]]]:
        return [elements(tree) for tree in self._bytes('accessibility_trees')]

    def _bytes(self, key: str) -> Any:
        return self._features[key].bytes_list.value


def elements(tree: bytes) -> list[tuple[str, tuple[int, int, int, int]]]:
    """The lines of a serialised AndroidAccessibilityForest, each with its left, top, right, bottom in pixels.

    Raises ValueError where it is none.
    """
    try:
        windows = _forest().FromString(tree).windows
    except Exception as error:  # protobuf's DecodeError depends on its backend
        raise ValueError(f'an accessibility tree cannot be read: {error}') from None
    elements = []
    for window in [w for w in windows if w.window_type == _APPLICATION] or windows:
        for node in window.tree.nodes:
            label = ' '.join((node.text or node.content_description or node.hint_text or node.tooltip_text).split())
            useful = label or node.is_clickable or node.is_editable or node.is_long_clickable or node.is_scrollable
            if node.is_visible_to_user and useful:
                rect = node.bounds_in_screen
                line = f'[{len(elements)}] {node.class_name.rpartition(".")[2]}' + (f' "{label}"' if label else '')
                line += ' checked' * node.is_checked + ' selected' * node.is_selected
                elements.append((line, (rect.left, rect.top, rect.right, rect.bottom)))
    return elements


def _on_element(action: dict, screen: list[tuple[str, tuple[int, int, int, int]]]) -> dict:
    if not {'x', 'y'} <= action.keys():
        return action
    x, y = action['x'], action['y']
    around = [
        ((right - left) * (bottom - top), number)
        for number, (_, (left, top, right, bottom)) in enumerate(screen)
        if left <= x < right and top <= y < bottom
    ]
    if not around:
        return action
    return {key: value for key, value in action.items() if key not in ('x', 'y')} | {'element': min(around)[1]}


@functools.cache
def _forest() -> type:
    """The message class of AndroidAccessibilityForest, with the fields of _MESSAGES; protobuf skips the others."""
    file = descriptor_pb2.FileDescriptorProto(name='perl_jax_a11y.proto', package='perl_jax_a11y', syntax='proto3')
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, number, kind, repeated in fields:
            added = message.field.add(name=field, number=number, label=3 if repeated else 1)
            if isinstance(kind, str):
                added.type, added.type_name = _MESSAGE, f'.perl_jax_a11y.{kind}'
            else:
                added.type = kind
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName('perl_jax_a11y.Forest'))
