"""The client of an OpenAI-compatible judge, against a server on this machine."""

import contextlib
import http.server
import json
import sqlite3
import threading
import time

import pytest

from perl_jax.errors import UserError
from perl_jax.evals.judging.endpoint import Endpoint


class Server:
    """Serves `reply(prompt, attempt) -> (status, body)` on a port of its own and notes what was asked."""

    def __init__(self, reply):
        self.requests, self.most, self.now, self.lock = [], 0, 0, threading.Lock()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
                prompt = body['messages'][0]['content']
                with outer.lock:
                    attempt = sum(b['messages'][0]['content'] == prompt for _, b, _ in outer.requests)
                    outer.requests.append((self.path, body, dict(self.headers)))
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                status, text, *headers = reply(prompt, attempt)
                with outer.lock:
                    outer.now -= 1
                with contextlib.suppress(OSError):  # the client may have hung up
                    self.send_response(status)
                    for name, value in headers:
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(text.encode())

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.http.server_port}/v1'
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()


def said(text):
    return 200, json.dumps({'choices': [{'message': {'content': text}}]})


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    with contextlib.ExitStack() as stack:

        def start(reply):
            server = Server(reply)
            stack.callback(server.close)
            return server

        yield start


@pytest.fixture
def judge(tmp_path):
    def make(server, **settings):
        settings = {'timeout': 5.0, 'backoff': 0.01, 'retries': 2} | settings
        return Endpoint(getattr(server, 'url', server), 'tiny', str(tmp_path / 'judge.sqlite'), **settings)

    return make


def test_answers_come_in_order_whichever_is_first(serve, judge):
    def reply(prompt, attempt):
        time.sleep(0.1 if prompt == 'a' else 0)
        return said(prompt.upper())

    server = serve(reply)
    assert judge(server, key='secret').ask(['a', 'b', 'c', 'a']) == ['A', 'B', 'C', 'A']
    assert len(server.requests) == 3, 'equal prompts are asked once'
    path, body, headers = server.requests[0]
    assert path == '/v1/chat/completions' and headers['Authorization'] == 'Bearer secret'
    want = {'model': 'tiny', 'temperature': 0, 'max_tokens': 16}
    assert {k: v for k, v in body.items() if k != 'messages'} == want
    assert body['messages'] == [{'role': 'user', 'content': body['messages'][0]['content']}]


def test_without_a_key_none_is_sent(serve, judge):
    server = serve(lambda prompt, attempt: said('1'))
    judge(server).ask(['a'])
    assert 'Authorization' not in server.requests[0][2]


@pytest.mark.parametrize('status', [429, 500, 503])
def test_a_server_that_is_busy_is_asked_again(serve, judge, status):
    server = serve(lambda prompt, attempt: said('1') if attempt == 2 else (status, 'busy'))
    assert judge(server).ask(['a', 'b']) == ['1', '1']
    assert len(server.requests) == 6


def test_retry_after_is_obeyed(serve, judge):
    server = serve(lambda prompt, attempt: said('1') if attempt else (429, '', ('Retry-After', '1')))
    start = time.perf_counter()
    judge(server).ask(['a'])
    assert time.perf_counter() - start >= 1


def test_retries_come_to_an_end(serve, judge):
    server = serve(lambda prompt, attempt: (503, 'busy'))
    with pytest.raises(UserError, match='no answer from .* after 3 tries .HTTP 503.*same command again'):
        judge(server).ask(['a'])
    assert len(server.requests) == 3


def test_an_answer_that_takes_too_long_is_asked_for_again(serve, judge):
    def reply(prompt, attempt):
        time.sleep(0 if attempt else 2)
        return said('2')

    server = serve(reply)
    assert judge(server, timeout=1.0).ask(['a']) == ['2']
    assert len(server.requests) == 2


def test_nobody_is_there(judge):
    with pytest.raises(UserError, match='no answer from .* after 3 tries .*refused'):
        judge('http://127.0.0.1:9/v1').ask(['a'])


@pytest.mark.parametrize(('status', 'text', 'words'), [
    (401, '', 'refuses the key.*--judge_key'),
    (403, '', 'refuses the key.*--judge_key'),
    (404, '', "no model 'tiny'.*--judge_model"),
    (400, 'too\nlong', 'HTTP 400.: too long'),
    (200, '<html>', 'not as OpenAI.*is it the base'),
    (200, '{"choices": []}', 'not as OpenAI'),
    (200, '[1]', 'not as OpenAI'),
    (200, '{"choices": [{"message": {"content": 1}}]}', 'not as OpenAI'),
    (200, '{"choices": [{"message": {"content": [1]}}]}', 'not as OpenAI'),
])  # fmt: skip
def test_what_will_not_get_better_ends_it_at_once(serve, judge, status, text, words):
    server = serve(lambda prompt, attempt: (status, text))
    with pytest.raises(UserError, match=words) as error:
        judge(server, concurrency=1).ask([str(i) for i in range(50)])
    assert server.url in str(error.value) and '\n' not in str(error.value)
    assert len(server.requests) < 50, 'the rest is not asked'


def test_an_answer_without_content_is_empty(serve, judge):
    assert judge(serve(lambda prompt, attempt: said(None))).ask(['a']) == ['']


def test_an_answer_in_parts_is_what_it_says(serve, judge):
    parts = [{'type': 'thinking', 'thinking': '1'}, {'type': 'text', 'text': 'Say '}, {'type': 'text', 'text': '2'}]
    assert judge(serve(lambda prompt, attempt: said(parts))).ask(['a']) == ['Say 2']


def test_what_was_answered_is_not_asked_again(serve, judge, tmp_path):
    server = serve(lambda prompt, attempt: said(prompt))
    judge(server, key='secret').ask(['a', 'b'])
    assert judge(server).ask(['b', 'c', 'a']) == ['b', 'c', 'a']
    assert [body['messages'][0]['content'] for _, body, _ in server.requests].count('c') == 1
    assert len(server.requests) == 3
    judge(server, max_tokens=99).ask(['a'])
    assert len(server.requests) == 4, 'another request'
    assert b'secret' not in (tmp_path / 'judge.sqlite').read_bytes()


def test_a_run_that_was_stopped_goes_on(serve, judge):
    good = []
    server = serve(lambda prompt, attempt: said('1') if prompt in good else (401, ''))
    good.append('a')
    with pytest.raises(UserError):
        judge(server, concurrency=1).ask(['a', 'b'])
    good.append('b')
    before = len(server.requests)
    assert judge(server).ask(['a', 'b']) == ['1', '1']
    assert len(server.requests) == before + 1


def test_no_more_requests_at_a_time_than_allowed(serve, judge):
    def reply(prompt, attempt):
        time.sleep(0.03)
        return said('1')

    server = serve(reply)
    judge(server, concurrency=3).ask([str(i) for i in range(20)])
    assert 1 < server.most <= 3


@pytest.mark.parametrize(('name', 'value', 'flag'), [
    ('concurrency', 0, 'concurrency'), ('max_tokens', 0, 'tokens'), ('retries', -1, 'retries'),
    ('timeout', 0, 'timeout'),
])  # fmt: skip
def test_settings_that_make_no_sense(judge, name, value, flag):
    with pytest.raises(UserError, match=f'--judge_{flag} = {value}: give'):
        judge('http://127.0.0.1:9/v1', **{name: value})


def test_a_cache_that_is_none(serve, judge, tmp_path):
    (tmp_path / 'judge.sqlite').write_text('something else' * 100)
    with pytest.raises(UserError, match=r"judge\.sqlite' cannot hold"):
        judge(serve(lambda prompt, attempt: said('1'))).ask(['a'])
    with pytest.raises(sqlite3.DatabaseError):
        sqlite3.connect(tmp_path / 'judge.sqlite').execute('SELECT 1 FROM answers')
