"""A checkpoint's own chat template, which is Jinja, as a format like those of tasks/chat.py.

    add('mine_sft', 'sft', examples, preprocessors=[chat(Template('Llama-3.2-1B-Instruct'))])

It is rendered as transformers' apply_chat_template does with add_generation_prompt, in Jinja's sandbox; a BOS that it
puts in front is the one that a run would put there. Control tokens are the template's own; what stands in a message is
text (controls.py).
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from perl_jax.errors import UserError
from perl_jax.interop import hf, paths
from perl_jax.runs import rundir
from perl_jax.tokenizers import loaded_tokenizer, sentencepiece_tokens, tokenizer_files, vocabularies
from perl_jax.tokenizers.chat import render
from perl_jax.tokenizers.chat.controls import Formatted


@dataclasses.dataclass(frozen=True)
class Template:
    """The template that lies with a tokenizer; it is read when it is first used.

    path: a folder, hf://OWNER/NAME, a tokenizer.json, a .model or a .gguf (`package:NAME/FILE` too);
      a MODEL_DIR, for that of the vocabulary that its run reads with.
    name: of a checkpoint with several templates, such as tool_use.
    """

    path: str
    name: str = 'default'

    def __call__(self, conversation: str | Sequence[Mapping[str, Any]]) -> Formatted:
        """The text of a conversation, which ends where the answer begins.

        Raises:
          UserError: there is no template, or what it says of this conversation.
        """
        if isinstance(conversation, str):
            conversation = [{'role': 'user', 'content': conversation}]
        said, control = _loaded(self.path)
        if self.name not in said.templates:
            there = f'only those called {", ".join(said.templates)}' if said.templates else 'none'
            raise UserError(
                f'{self.path}: brings no chat template {self.name!r}, {there}; use chatml, llama3 or gemma '
                '(perl_jax/tasks/chat.py)'
            )
        return Formatted(render.render(said, control, conversation, add_generation_prompt=True, name=self.name))


def file_of(path: str) -> pathlib.Path:
    """The tokenizer's file that a path names, or one in its folder, which need not be there."""
    path = _of_run(path)
    hub = path.startswith(hf.HUB)
    folder = hf.resolve(path, weights=False) if hub else pathlib.Path(path).expanduser()
    return vocabularies.file_in(folder) or folder / 'tokenizer.json' if folder.is_dir() else paths.resolve(path)


def _of_run(path: str) -> str:
    """Of a MODEL_DIR the path of its vocabulary, or of its base; other paths as they are."""
    asked = path
    while not path.startswith((hf.HUB, paths.PREFIX)) and path and (about := rundir.read(path)) is not None:
        path = (about.get('vocabulary') or about['base']['path']).partition(paths.EOS)[0]
    if path in ('', 'byt5') or path.startswith(('task:', 'random:')):
        raise UserError(f"'{asked}': '{path}' brings no chat template; name the folder of a tokenizer that does")
    return path


@functools.lru_cache(maxsize=8)
def _loaded(path: str) -> tuple[tokenizer_files.Beside, tuple[str, ...]]:
    """What lies with the tokenizer, and its control tokens."""
    file = file_of(path)
    said = tokenizer_files.beside(file)
    if not file.is_file():
        return said, ()
    if file.suffix == '.model':
        return said, sentencepiece_tokens.read(str(file)).spelled
    return said, loaded_tokenizer.control_tokens(file, path)
