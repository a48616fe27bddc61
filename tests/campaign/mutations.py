"""Makes a wrong file of a right one, by one mutation that a random number generator chooses and that a text names."""

import copy
import json

# What a value of JSON is replaced by, as it is written in the file.
_VALUES = [
    'null', '[]', '{}', '"x"', '""', '-1', '0', '1', '1e30', '1e999', 'NaN', '-Infinity', 'true', '0.5', '[null]',
    '[1]', '["x"]', '{"x": 1}', '[[]]', '"\\ud800"', '"a\\u0000b"', '"../x"', '"a\\nb"', '1' + '0' * 30, '1' * 400,
    '1' * 5000, '[' * 100_000 + ']' * 100_000, '"' + 'y' * 100_000 + '"',
]  # fmt: skip
_WHOLE = [b'', b'[]', b'{}', b'"x"', b'null', b'1', b'NaN', b'\xff\xfe', b'[' * 100_000, b'\x00' * 64, b'{"a"']
_PLACE = '@VALUE@'


def shorten(text):
    """A text in at most 60 characters."""
    return text if len(text) <= 60 else f'{text[:40]}.. ({len(text)} characters)'


def mutate(content, suffix, rng):
    """Returns (content, description) of a file with one mutation.

    Args:
      content: bytes of a right file.
      suffix: of its name, which tells the kind.
      rng: random.Random.
    """
    kinds = {
        '.json': [mutate_json] * 8 + [replace_whole, mutate_bytes],
        '.jsonl': [mutate_line] * 8 + [replace_whole, mutate_bytes],
        '.safetensors': [mutate_header] * 3 + [replace_whole] + [mutate_bytes] * 2,
    }
    if suffix not in kinds and content[:1] == b'{':  # the metadata of checkpoints have no suffix
        suffix = '.json'
    return rng.choice(kinds.get(suffix, [mutate_bytes] * 9 + [replace_whole]))(content, rng)


def replace_whole(content, rng):
    content = rng.choice(_WHOLE)
    return content, f'whole file -> {shorten(repr(content))}'


def mutate_bytes(content, rng):
    """Truncate, flip a bit, write over a byte, or insert or repeat some bytes; the first kilobyte comes more often."""
    place = rng.randrange(min(len(content), rng.choice([64, 1024, 2**40]))) if content else 0
    kind = rng.choice(['truncated', 'flipped', 'byte', 'inserted', 'eight'])
    if kind == 'truncated':
        return content[:place], f'truncated to {place} bytes'
    if kind == 'flipped':
        bit = 1 << rng.randrange(8)
        return content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :], f'byte {place} ^ {bit}'
    filler = {'byte': b'\xff', 'inserted': b'\x80', 'eight': rng.choice([b'\xff', b'\x00', b'\x7f']) * 8}[kind]
    behind = place if kind == 'inserted' else place + len(filler)
    return content[:place] + filler + content[behind:], f'{kind} {filler!r} at {place}'


def mutate_json(content, rng):
    """Replace one value, at any depth, or remove it."""
    tree = json.loads(content)
    places = list(_places(tree))
    if not places:
        return replace_whole(content, rng)
    shallow = [path for path in places if len(path) == 1] or places
    path = rng.choice(rng.choice([places, shallow]))  # a vocabulary would else have all the mutations
    tree = copy.deepcopy(tree)
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    name = '.'.join(map(str, path))
    if rng.random() < 0.1:
        del parent[path[-1]]
        return json.dumps(tree).encode(), f'{name} removed'
    value = rng.choice(_VALUES)
    parent[path[-1]] = _PLACE
    return json.dumps(tree).replace(f'"{_PLACE}"', value, 1).encode(), f'{name} -> {shorten(value)}'


def mutate_line(content, rng):
    """Mutate the JSON of one line, or put another in its place."""
    lines = content.splitlines(keepends=True)
    number = rng.randrange(len(lines))
    if rng.random() < 0.3:
        line, how = replace_whole(b'', rng)
    else:
        line, how = mutate_json(lines[number], rng)
    lines[number] = line + b'\n'
    return b''.join(lines), f'line {number + 1}: {how}'


def mutate_header(content, rng):
    """Mutate the JSON header of a safetensors file, or its length."""
    length = int.from_bytes(content[:8], 'little')
    header, rest = content[8 : 8 + length], content[8 + length :]
    if rng.random() < 0.25:
        length = rng.choice([0, 1, length - 1, length + 1, len(content), 2**31, 2**63, 2**64 - 1])
        return length.to_bytes(8, 'little') + header + rest, f'header length -> {length}'
    if rng.random() < 0.25:
        table = json.loads(header)
        name = rng.choice([name for name in table if name != '__metadata__'])
        offsets = rng.choice([[-8, 8], [8, 0], [0, 10**30], [0, 8], [10**9, 10**9 + 8], [0], [0.0, 8.0], ['0', '8']])
        table[name]['data_offsets'] = offsets
        header, how = json.dumps(table).encode(), f'{name}: data_offsets -> {offsets}'
    else:
        header, how = mutate_json(header, rng)
    return len(header).to_bytes(8, 'little') + header + rest, f'header: {how}'


def _places(tree, path=()):
    """Yields the path of every value inside a tree; of a long list only the first and last."""
    items = list(tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else [])
    for key, value in items if len(items) <= 60 else [*items[:5], *items[-5:]]:
        yield (*path, key)
        yield from _places(value, (*path, key))
