"""A judge behind HTTP: whatever speaks OpenAI's chat completions (OpenAI, vLLM, llama.cpp, Ollama ..).

Answers are kept in a SQLite file by a hash of their request, so a killed run goes on and a second one asks nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import http.client
import json
import random
import sqlite3
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent import futures
from typing import Any

from perl_jax.errors import UserError, check_count

RETRIED = (408, 429, 500, 502, 503, 504)


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """url: the base, as in http://localhost:8000/v1. cache: the SQLite file. key: a bearer token, stored nowhere.

    timeout and backoff are in seconds; retry n = 0, 1 .. waits backoff * 2^n, at random up to a half more or less, or
    as long as Retry-After says. At most `concurrency` requests are under way. max_tokens is the room of an answer.
    """

    url: str
    model: str
    cache: str
    key: str | None = None
    timeout: float = 60.0
    retries: int = 5
    backoff: float = 1.0
    concurrency: int = 8
    max_tokens: int = 16

    def __post_init__(self) -> None:
        for name, value, least in (
            ('concurrency', self.concurrency, 1), ('tokens', self.max_tokens, 1), ('retries', self.retries, 0),
        ):  # fmt: skip
            check_count(f'--judge_{name}', value, least)
        if not self.timeout > 0:
            raise UserError(f'--judge_timeout = {self.timeout}: give a number of seconds above 0')

    def ask(self, prompts: Sequence[str]) -> list[str]:
        """The greedy answer to each prompt, in order; equal prompts are asked once.

        Raises:
          UserError: it cannot be reached, refuses the key, has no such model, or speaks something else.
        """
        from tqdm import tqdm

        bodies = {prompt: self._body(prompt) for prompt in prompts}
        keys = {prompt: hashlib.sha256(f'{self.url}\n{body}'.encode()).hexdigest() for prompt, body in bodies.items()}
        db = sqlite3.connect(self.cache)
        pool = futures.ThreadPoolExecutor(self.concurrency)
        try:
            db.execute('CREATE TABLE IF NOT EXISTS answers (request TEXT PRIMARY KEY, answer TEXT)')
            stored = dict(db.execute('SELECT request, answer FROM answers'))
            answers = {prompt: stored[key] for prompt, key in keys.items() if key in stored}
            asked = {pool.submit(self._post, body): prompt for prompt, body in bodies.items() if prompt not in answers}
            for done in tqdm(futures.as_completed(asked), total=len(asked), desc='judge', disable=not asked):
                prompt = asked[done]
                answers[prompt] = done.result()
                with db:
                    db.execute('INSERT OR REPLACE INTO answers VALUES (?, ?)', (keys[prompt], answers[prompt]))
        except sqlite3.DatabaseError as error:
            raise UserError(f"'{self.cache}' cannot hold the judge's answers ({error}); delete it") from error
        finally:
            pool.shutdown(cancel_futures=True)  # one that fails for good would only be followed by others
            db.close()
        return [answers[prompt] for prompt in prompts]

    def _body(self, prompt: str) -> str:
        messages = [{'role': 'user', 'content': prompt}]
        return json.dumps(
            {'model': self.model, 'messages': messages, 'temperature': 0, 'max_tokens': self.max_tokens}
        )

    def _post(self, body: str) -> str:
        """One answer, after as many tries as it takes."""
        for attempt in range(self.retries + 1):
            wait = self.backoff * 2**attempt * random.uniform(0.5, 1.5)
            try:
                return self._once(body)
            except urllib.error.HTTPError as error:
                why = f'HTTP {error.code}'
                with error:
                    if error.code not in RETRIED:
                        raise UserError(self._refusal(error)) from error
                after = error.headers.get('Retry-After', '')
                wait = float(after) if after.isdigit() else wait
            except (OSError, http.client.HTTPException) as error:  # no connection, a time-out, or half an answer
                why = str(getattr(error, 'reason', error)) or type(error).__name__
            if attempt < self.retries:
                time.sleep(wait)
        raise UserError(
            f"--judge: no answer from '{self.url}' after {self.retries + 1} tries ({why}); look after the server, "
            'then run the same command again: what was answered is kept'
        )

    def _once(self, body: str) -> str:
        headers = {'Content-Type': 'application/json'} | ({'Authorization': f'Bearer {self.key}'} if self.key else {})
        request = urllib.request.Request(f'{self.url.rstrip("/")}/chat/completions', body.encode(), headers)
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            text = response.read()
        try:
            return _content(json.loads(text))
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"--judge: '{self.url}' answers, but not as OpenAI's chat completions do; is it the base, "
                'such as http://localhost:8000/v1?'
            ) from error

    def _refusal(self, error: urllib.error.HTTPError) -> str:
        if error.code in (401, 403):
            return (
                f"--judge: '{self.url}' refuses the key (HTTP {error.code}); put one into an environment variable and "
                'give its name with --judge_key'
            )
        if error.code == 404:
            return (
                f"--judge: '{self.url}' knows no chat/completions or no model '{self.model}' (HTTP 404); "
                'mend --judge or --judge_model'
            )
        said = ' '.join(error.read(300).decode(errors='replace').split())
        return f"--judge: '{self.url}' refuses the request (HTTP {error.code}): {said}"


def _content(reply: Any) -> str:
    content = reply['choices'][0]['message']['content'] or ''  # none, where reasoning took up all the room
    if isinstance(content, list):  # some servers give a list of parts, reasoning among them
        content = ''.join(part['text'] for part in content if part['type'] == 'text')
    if not isinstance(content, str):
        raise TypeError(content)
    return content
