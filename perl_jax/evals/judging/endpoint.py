"""A judge behind HTTP: any server of OpenAI's chat completions API (OpenAI, vLLM, llama.cpp, Ollama ..).

Replies are cached in a SQLite file under a hash of their request, so a killed run resumes and a repeated one sends
nothing. The server is not trusted: no redirect is followed, replies have a maximum size and duration, and the key is
masked in all that it sends back.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import random
import sqlite3
import threading
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any

from perl_jax import settings
from perl_jax.errors import UserError
from perl_jax.evals.judging.replies import CUT

RETRIED = (408, 429, 500, 502, 503, 504)
MAX_REPLY = 2**22  # bytes, decompressed
MAX_WAIT = 600.0  # seconds that a server may ask to wait

# SQLite's codes of a full, failing, read-only, missing or locked place.
_PLACE_ERRORS = (
    sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_BUSY,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """A chat completions server and how it is called.

    Attributes:
      url: the base URL, as in http://localhost:8000/v1.
      model: the server's name of its model.
      cache: the SQLite file of replies.
      key: a bearer token. It is sent to `url` alone, and never stored or printed.
      timeout: seconds for a whole request: to connect, to send it and to receive the reply.
      retries: how often a failed request is repeated.
      backoff: seconds; retry n = 0, 1 .. waits backoff * 2^n, varied at random by up to a half, or as long as the
        Retry-After header specifies.
      concurrency: the maximum number of simultaneous requests.
      max_tokens: the maximum length of a reply.
    """

    url: str
    model: str
    cache: str
    key: str | None = None
    timeout: settings.Positive = 60.0
    retries: settings.Natural = 5
    backoff: settings.NonNegative = 1.0
    concurrency: settings.Count = 8
    max_tokens: settings.Count = 16

    def __post_init__(self) -> None:
        settings.check(self)
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ('http', 'https') or not parts.hostname or parts.username or parts.password:
            raise UserError('--judge: give a URL like http://localhost:8000/v1, with a key in --judge_key')
        if self.key is not None and not (self.key.isascii() and self.key.isprintable() and ' ' not in self.key):
            raise UserError(
                '--judge_key: the value of the variable has a space, a line break or another character that a key '
                'cannot have; set it again'
            )

    def complete(self, prompts: Sequence[str]) -> list[str]:
        """Return the greedy reply to each prompt, in order; equal prompts are sent once.

        A reply that the server cut at `max_tokens` ends with replies.CUT, in the cache too.

        Raises:
          UserError: the server cannot be reached, rejects the key, lacks the model, or uses another API.
        """
        from tqdm import tqdm

        bodies = {prompt: self._request_body(prompt) for prompt in prompts}
        keys = {prompt: hashlib.sha256(f'{self.url}\n{body}'.encode()).hexdigest() for prompt, body in bodies.items()}
        try:
            database = sqlite3.connect(self.cache, check_same_thread=False)  # but under a lock
        except sqlite3.DatabaseError as error:
            raise self._unusable_cache(error) from error
        pool, lock = futures.ThreadPoolExecutor(self.concurrency), threading.Lock()

        def ask(prompt: str) -> str:
            answer = self._post_with_retries(bodies[prompt])
            with lock, database:  # before the next request, so that a killed run loses no more than those in flight
                database.execute('INSERT OR REPLACE INTO answers VALUES (?, ?)', (keys[prompt], answer))
            return answer

        try:
            database.execute('CREATE TABLE IF NOT EXISTS answers (request TEXT PRIMARY KEY, answer TEXT)')
            stored = dict(database.execute('SELECT request, answer FROM answers'))
            answers = {prompt: stored[key] for prompt, key in keys.items() if key in stored}
            pending = {pool.submit(ask, prompt): prompt for prompt in bodies if prompt not in answers}
            for future in tqdm(futures.as_completed(pending), total=len(pending), desc='judge', disable=not pending):
                answers[pending[future]] = future.result()
        except sqlite3.DatabaseError as error:
            raise self._unusable_cache(error) from error
        finally:
            pool.shutdown(cancel_futures=True)  # after a permanent failure the others would fail too
            database.close()
        return [answers[prompt] for prompt in prompts]

    def _unusable_cache(self, error: sqlite3.DatabaseError) -> UserError:
        if getattr(error, 'sqlite_errorcode', 0) & 0xFF in _PLACE_ERRORS:  # what it has cost is in it
            return UserError(f"'{self.cache}': {error}; its replies are kept, mend the place or wait, then repeat this")
        return UserError(f"'{self.cache}' is not a usable cache of the judge's replies ({error}); delete it")

    def _request_body(self, prompt: str) -> str:
        messages = [{'role': 'user', 'content': prompt}]
        return json.dumps({'model': self.model, 'messages': messages, 'temperature': 0, 'max_tokens': self.max_tokens})

    def _post_with_retries(self, body: str) -> str:
        """Send a request, with retries, and return the reply."""
        import httpx2

        for attempt in range(self.retries + 1):
            delay = self.backoff * 2**attempt * random.uniform(0.5, 1.5)
            try:
                status, headers, text = asyncio.run(self._post(body))
            except (OSError, httpx2.HTTPError, httpx2.InvalidURL) as error:  # no connection, too late, cut off
                reason = self._masked(str(error)) or type(error).__name__
            else:
                if status == 200:
                    return self._content(text)
                if status not in RETRIED:
                    raise UserError(self._refusal(status, headers, text))
                reason, retry_after = f'HTTP {status}', headers.get('Retry-After', '')
                delay = float(retry_after) if retry_after.isdecimal() else delay
                if delay > MAX_WAIT:
                    raise UserError(
                        f"--judge: '{self.url}' asks to wait {delay:.0f} s ({reason}); run the same command again "
                        'then: replies so far are cached'
                    )
            if attempt < self.retries:
                time.sleep(delay)
        raise UserError(
            f"--judge: no answer from '{self.url}' after {self.retries + 1} tries ({reason}); check the server, "
            'then run the same command again: replies so far are cached'
        )

    async def _post(self, body: str) -> tuple[int, Mapping[str, str], str]:
        """Send a request; return status, headers and text of the response, which may be an error."""
        import httpx2

        url, content = f'{self.url.rstrip("/")}/chat/completions', b''
        headers = {'Content-Type': 'application/json'}
        if self.key:
            headers['Authorization'] = f'Bearer {self.key}'
        # One deadline for all of it: the client's own timeouts are of each read, which a trickle never hits. TCP and
        # TLS have half of the time each; cancelled within a handshake, the client would leave the socket open.
        timeout = httpx2.Timeout(None, connect=self.timeout / 2)
        try:
            async with (
                asyncio.timeout(self.timeout),
                httpx2.AsyncClient(timeout=timeout, follow_redirects=False) as client,
                client.stream('POST', url, content=body.encode(), headers=headers) as response,
            ):
                async for chunk in response.aiter_bytes():
                    content += chunk
                    if len(content) > MAX_REPLY:
                        raise UserError(f"--judge: '{self.url}' sends a reply of more than {MAX_REPLY:,} bytes")
        except TimeoutError:
            raise TimeoutError(f'no whole reply in {self.timeout:g} s') from None
        return response.status_code, response.headers, content.decode(errors='replace')

    def _content(self, text: str) -> str:
        """The reply's text, of what the server sent."""
        try:
            content = _text_of(json.loads(text))
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise UserError(
                f"--judge: '{self.url}' answers, but not in the format of OpenAI's chat completions; "
                'give the base URL, such as http://localhost:8000/v1'
            ) from error
        return self._masked(content.encode(errors='replace').decode())  # a lone surrogate cannot be stored

    def _refusal(self, status: int, headers: Mapping[str, str], text: str) -> str:
        if 300 <= status < 400:
            target = self._masked(' '.join(headers.get('Location', 'nowhere').split())[:200])
            return (
                f"--judge: '{self.url}' redirects to {target!r} (HTTP {status}), which is not followed, because the "
                'key would go there too; give that URL as --judge if you trust it'
            )
        if status in (401, 403):
            return (
                f"--judge: '{self.url}' rejects the key (HTTP {status}); put a valid one into an environment "
                'variable and pass its name as --judge_key'
            )
        if status == 404:
            return (
                f"--judge: '{self.url}' has no chat/completions or no model '{self.model}' (HTTP 404); "
                'correct --judge or --judge_model'
            )
        error_text = self._masked(' '.join(text.split()))[:300]
        printable = ''.join(c if c.isprintable() else '?' for c in error_text)
        return f"--judge: '{self.url}' rejects the request (HTTP {status}): {printable}"

    def _masked(self, text: str) -> str:
        return text.replace(self.key, '***') if self.key else text


def _text_of(reply: Any) -> str:
    choice = reply['choices'][0]
    content = choice['message']['content'] or ''  # None if reasoning used up max_tokens
    if isinstance(content, list):  # some servers return a list of content parts, including reasoning
        content = ''.join(content_part['text'] for content_part in content if content_part['type'] == 'text')
    if not isinstance(content, str):
        raise TypeError(content)
    return content + CUT if choice.get('finish_reason') == 'length' else content
