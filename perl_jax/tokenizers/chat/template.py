"""A checkpoint's own chat template (Jinja) as a chat format like those of tasks/chat.py.

    add('mine_sft', 'sft', examples, preprocessors=[chat(Template('Llama-3.2-1B-Instruct'))])

It is rendered as transformers' apply_chat_template does with add_generation_prompt, in Jinja's sandbox. A BOS that the
template puts in front is not added a second time. Only the template's own control tokens are read as such; the contents
of messages are text (controls.py).
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
    """The chat template beside a tokenizer, read at first use.

    Attributes:
      path: a folder, hf://OWNER/NAME, a tokenizer.json, a .model or a .gguf (`package:NAME/FILE` too); a MODEL_DIR, for
        the template of its run's vocabulary.
      name: which of several templates, such as tool_use.
    """

    path: str
    name: str = 'default'

    def __call__(self, conversation: str | Sequence[Mapping[str, Any]]) -> Formatted:
        """Returns the text of a conversation, up to where the answer begins.

        Raises:
          UserError: there is no template, or it refuses the conversation.
        """
        if isinstance(conversation, str):
            conversation = [{'role': 'user', 'content': conversation}]
        metadata, control = _loaded(self.path)
        if self.name not in metadata.templates:
            available = f'only those called {", ".join(metadata.templates)}' if metadata.templates else 'none'
            raise UserError(
                f'{self.path}: has no chat template {self.name!r}, {available}; use chatml, llama3 or gemma '
                '(perl_jax/tasks/chat.py)'
            )
        return Formatted(render.render(metadata, control, conversation, add_generation_prompt=True, name=self.name))


    def seam(self) -> tuple[Formatted, str]:
        """Returns what the template writes between a prompt and its answer, where it is nothing for most.

        Returns:
          A header that the template does not write for `add_generation_prompt`, for the end of the prompt; white space
          before the answer, as of `[/INST] Hello`, for its start.
        """
        metadata, control = _loaded(self.path)
        question, answer = {'role': 'user', 'content': 'x'}, {'role': 'assistant', 'content': 'ANSWER'}
        rendered = functools.partial(render.render, metadata, control, name=self.name)
        try:
            prompt, dialog = self([question]).marked, rendered([question, answer], add_generation_prompt=False)
            has_header = rendered([question], add_generation_prompt=False) != prompt
        except UserError:  # one that refuses so short a dialog
            return Formatted(''), ''
        between, is_found, _ = dialog.removeprefix(prompt).partition(answer['content'])
        if not dialog.startswith(prompt) or not is_found:  # one that rewrites earlier turns
            return Formatted(''), ''
        if between.isspace():
            return Formatted(''), between
        return Formatted('' if has_header else between), ''


def exists(path: str) -> bool:
    """Returns whether a model or tokenizer has a chat template.

    Args:
      path: as in Template, or of weights without a tokenizer, which have none.
    """
    try:
        return bool(_loaded(path)[0].templates)
    except UserError:  # no tokenizer, or none that is a file
        return False


def file_of(path: str) -> pathlib.Path:
    """Returns the tokenizer's file at a path or in a folder; it may not exist."""
    path = _of_run(path)
    hub = path.startswith(hf.HUB)
    folder = hf.resolve(path, weights=False) if hub else pathlib.Path(path).expanduser()
    return vocabularies.file_in(folder) or folder / 'tokenizer.json' if folder.is_dir() else paths.resolve(path)


def _of_run(path: str) -> str:
    """Returns for a MODEL_DIR the path of its vocabulary, or of its base; other paths unchanged."""
    original_path = path
    while not path.startswith((hf.HUB, paths.PREFIX)) and path and (run_info := rundir.read(path)) is not None:
        path = (run_info.get('vocabulary') or run_info['base']['path']).partition(paths.EOS)[0]
    if path in ('', 'byt5') or path.startswith(('task:', 'random:')):
        raise UserError(
            f"'{original_path}': '{path}' has no chat template; name the folder of a tokenizer that has one"
        )
    return path


@functools.lru_cache(maxsize=8)
def _loaded(path: str) -> tuple[tokenizer_files.TokenizerMetadata, tuple[str, ...]]:
    """Returns the tokenizer's metadata and its control tokens."""
    file = file_of(path)
    metadata = tokenizer_files.read_metadata(file)
    if not file.is_file():
        return metadata, ()
    if file.suffix == '.model':
        return metadata, sentencepiece_tokens.read(str(file)).spelled
    return metadata, loaded_tokenizer.control_tokens(file, path)
