"""The client of an OpenAI-compatible judge, against a server on this machine."""

import contextlib
import functools
import gzip
import http.server
import json
import math
import socket
import sqlite3
import threading
import time

import pytest

from perl_jax.cli.configure import Parser
from perl_jax.errors import UserError
from perl_jax.evals.judging import flags
from perl_jax.evals.judging.endpoint import Endpoint
from perl_jax.evals.judging.replies import CUT


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
                    self.wfile.write(text.encode() if isinstance(text, str) else text)

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.http.server_port}/v1'
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()


def said(text, **more):
    return 200, json.dumps({'choices': [{'message': {'content': text}} | more]})


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
    assert judge(server, key='secret').complete(['a', 'b', 'c', 'a']) == ['A', 'B', 'C', 'A']
    assert len(server.requests) == 3, 'equal prompts are asked once'
    path, body, headers = server.requests[0]
    assert path == '/v1/chat/completions' and headers['Authorization'] == 'Bearer secret'
    want = {'model': 'tiny', 'temperature': 0, 'max_tokens': 16}
    assert {k: v for k, v in body.items() if k != 'messages'} == want
    assert body['messages'] == [{'role': 'user', 'content': body['messages'][0]['content']}]


def test_without_a_key_none_is_sent(serve, judge):
    server = serve(lambda prompt, attempt: said('1'))
    judge(server).complete(['a'])
    assert 'Authorization' not in server.requests[0][2]


@pytest.mark.parametrize('status', [429, 500, 503])
def test_a_server_that_is_busy_is_asked_again(serve, judge, status):
    server = serve(lambda prompt, attempt: said('1') if attempt == 2 else (status, 'busy'))
    assert judge(server).complete(['a', 'b']) == ['1', '1']
    assert len(server.requests) == 6


def test_retry_after_is_obeyed(serve, judge):
    server = serve(lambda prompt, attempt: said('1') if attempt else (429, '', ('Retry-After', '1')))
    start = time.perf_counter()
    judge(server).complete(['a'])
    assert time.perf_counter() - start >= 1


def test_retries_come_to_an_end(serve, judge):
    server = serve(lambda prompt, attempt: (503, 'busy'))
    with pytest.raises(UserError, match='no answer from .* after 3 tries .HTTP 503.*same command again'):
        judge(server).complete(['a'])
    assert len(server.requests) == 3


def test_an_answer_that_takes_too_long_is_asked_for_again(serve, judge):
    def reply(prompt, attempt):
        time.sleep(0 if attempt else 2)
        return said('2')

    server = serve(reply)
    assert judge(server, timeout=1.0).complete(['a']) == ['2']
    assert len(server.requests) == 2


def test_nobody_is_there(judge):
    with pytest.raises(UserError, match='no answer from .* after 3 tries .*connection attempts failed'):
        judge('http://127.0.0.1:9/v1').complete(['a'])


@pytest.mark.parametrize(('status', 'text', 'words'), [
    (401, '', 'rejects the key.*--judge_key'),
    (403, '', 'rejects the key.*--judge_key'),
    (404, '', "no model 'tiny'.*--judge_model"),
    (400, 'too\nlong', 'HTTP 400.: too long'),
    (200, '<html>', 'not in the format of OpenAI.*base URL'),
    (200, '{"choices": []}', 'not in the format of OpenAI'),
    (200, '[1]', 'not in the format of OpenAI'),
    (200, '{"choices": [{"message": {"content": 1}}]}', 'not in the format of OpenAI'),
    (200, '{"choices": [{"message": {"content": [1]}}]}', 'not in the format of OpenAI'),
])  # fmt: skip
def test_what_will_not_get_better_ends_it_at_once(serve, judge, status, text, words):
    server = serve(lambda prompt, attempt: (status, text))
    with pytest.raises(UserError, match=words) as error:
        judge(server, concurrency=1).complete([str(i) for i in range(50)])
    assert server.url in str(error.value) and '\n' not in str(error.value)
    assert len(server.requests) < 50, 'the rest is not asked'


@pytest.mark.parametrize('status', [301, 302, 303, 307, 308])
def test_a_redirect_is_refused_and_the_key_stays_here(serve, judge, status):
    other = serve(lambda prompt, attempt: said('1'))
    server = serve(lambda prompt, attempt: (status, '', ('Location', f'{other.url}/chat/completions')))
    with pytest.raises(UserError, match=f'redirects to .*{other.url}.*not followed'):
        judge(server, key='secret').complete(['a'])
    assert len(server.requests) == 1 and not other.requests


@pytest.mark.parametrize('reply', [
    lambda key: (400, f'you sent Authorization: Bearer {key}'), lambda key: said(f'Bearer {key}'),
    lambda key: (302, '', ('Location', f'http://elsewhere/?key={key}')), lambda key: (500, key),
], ids=['error', 'answer', 'redirect', 'busy'])  # fmt: skip
def test_a_key_that_a_server_sends_back_is_masked(serve, judge, reply, tmp_path):
    server = serve(lambda prompt, attempt: reply('s3cret-key'))
    try:
        text = str(judge(server, key='s3cret-key', retries=0).complete(['a']))
    except UserError as error:
        text = str(error)
    assert 's3cret' not in text and b's3cret' not in (tmp_path / 'judge.sqlite').read_bytes()


@pytest.mark.parametrize('key', ['a\nb', 'a b', 'schl\u00fcssel', 'a\x00'])
def test_a_key_that_no_header_can_have_is_not_printed(judge, key):
    with pytest.raises(UserError, match='--judge_key: the value of the variable') as error:
        judge('http://localhost/v1', key=key)
    assert key not in str(error.value)


@pytest.mark.parametrize('url', ['localhost:8000', 'file:///etc/passwd', 'http://', 'http://me:secret@host/v1', ''])
def test_what_is_no_url_of_a_server_is_refused(judge, url):
    with pytest.raises(UserError, match='--judge: give a URL') as error:
        judge(url)
    assert 'secret' not in str(error.value)


def test_credentials_of_netrc_are_not_sent(serve, judge, tmp_path, monkeypatch):
    (tmp_path / 'netrc').write_text('machine 127.0.0.1 login me password secret\n')
    monkeypatch.setenv('NETRC', str(tmp_path / 'netrc'))
    server = serve(lambda prompt, attempt: said('1'))
    judge(server).complete(['a'])
    judge(server, key='mine').complete(['b'])
    assert [headers.get('Authorization') for _, _, headers in server.requests] == [None, 'Bearer mine']


def test_a_huge_reply_ends_it(serve, judge):
    server = serve(lambda prompt, attempt: (200, 'x' * (2**22 + 2**17)))
    with pytest.raises(UserError, match='a reply of more than 4,194,304 bytes'):
        judge(server).complete(['a'])


def test_a_compressed_reply_is_measured_as_it_unpacks(judge, serve):
    bomb = gzip.compress(b'x' * 2**26)
    server = serve(lambda prompt, attempt: (200, bomb, ('Content-Encoding', 'gzip')))
    with pytest.raises(UserError, match='a reply of more than'):
        judge(server).complete(['a'])


@pytest.mark.parametrize(('scheme', 'first', 'again'), [
    ('http', b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n', b' '),
    ('http', b'HTTP/1.1 200 OK\r\nX: ', b'x'),
    ('http', b'', b'HTTP/1.1 100 Continue\r\n\r\n'),
    ('https', b'', b''),
    ('https', b'\x16\x03\x03\x40\x00', b'\x02'),  # the start of a handshake of 16 KiB
], ids=['body', 'headers', 'interim replies', 'TLS without a reply', 'TLS'])  # fmt: skip
def test_a_reply_that_trickles_is_cut_off(judge, scheme, first, again):
    """Each byte comes in time; all together never do."""
    with socket.create_server(('127.0.0.1', 0)) as listener:

        def serve():
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(2**16)
                    connection.sendall(first)
                    while True:
                        connection.sendall(again)
                        time.sleep(0.2)

        threading.Thread(target=serve, daemon=True).start()
        start = time.perf_counter()
        with pytest.raises(UserError, match=r'no whole reply in 0.5 s|\(ConnectTimeout\)'):
            judge(f'{scheme}://127.0.0.1:{listener.getsockname()[1]}/v1', timeout=0.5, retries=0).complete(['a'])
        assert time.perf_counter() - start < 5


def test_a_wait_of_years_is_not_waited_for(serve, judge):
    server = serve(lambda prompt, attempt: (429, '', ('Retry-After', '1000000000')))
    with pytest.raises(UserError, match='asks to wait 1000000000 s .HTTP 429.; run the same command again then'):
        judge(server).complete(['a'])


@pytest.mark.parametrize('text', ['[' * 100_000, '{"choices": [{"message": {"content": ' + '[' * 99_999, '\udcff'])
def test_deep_brackets_and_odd_bytes_are_no_traceback(serve, judge, text):
    server = serve(lambda prompt, attempt: (200, text.encode(errors='surrogateescape')))
    with pytest.raises(UserError, match='not in the format of OpenAI'):
        judge(server).complete(['a'])


def test_half_a_character_is_stored_as_a_question_mark(serve, judge):
    server = serve(lambda prompt, attempt: (200, '{"choices": [{"message": {"content": "1 \\ud800"}}]}'))
    assert judge(server).complete(['a']) == judge(server).complete(['a']) == ['1 ?']


def test_an_answer_without_content_is_empty(serve, judge):
    assert judge(serve(lambda prompt, attempt: said(None))).complete(['a']) == ['']


def test_an_answer_in_parts_is_what_it_says(serve, judge):
    parts = [{'type': 'thinking', 'thinking': '1'}, {'type': 'text', 'text': 'Say '}, {'type': 'text', 'text': '2'}]
    assert judge(serve(lambda prompt, attempt: said(parts))).complete(['a']) == ['Say 2']


def test_what_was_answered_is_not_asked_again(serve, judge, tmp_path):
    server = serve(lambda prompt, attempt: said(prompt))
    judge(server, key='secret').complete(['a', 'b'])
    assert judge(server).complete(['b', 'c', 'a']) == ['b', 'c', 'a']
    assert [body['messages'][0]['content'] for _, body, _ in server.requests].count('c') == 1
    assert len(server.requests) == 3
    judge(server, max_tokens=99).complete(['a'])
    assert len(server.requests) == 4, 'another request'
    assert b'secret' not in (tmp_path / 'judge.sqlite').read_bytes()


def test_a_reply_that_was_cut_is_marked_in_the_cache_too(serve, judge):
    """Not one that ended, nor one of a server, or an older cache, that does not say so."""
    ends = {'a': {'finish_reason': 'length'}, 'b': {'finish_reason': 'stop'}, 'c': {'finish_reason': None}, 'd': {}}
    server = serve(lambda prompt, attempt: said(None if prompt == 'e' else prompt, **ends.get(prompt, ends['a'])))
    for _ in range(2):
        assert judge(server).complete([*'abcde']) == [f'a{CUT}', 'b', 'c', 'd', CUT]
    assert len(server.requests) == 5


def test_a_run_that_was_stopped_goes_on(serve, judge):
    good = []
    server = serve(lambda prompt, attempt: said('1') if prompt in good else (401, ''))
    good.append('a')
    with pytest.raises(UserError):
        judge(server, concurrency=1).complete(['a', 'b'])
    good.append('b')
    before = len(server.requests)
    assert judge(server).complete(['a', 'b']) == ['1', '1']
    assert len(server.requests) == before + 1


def test_no_more_requests_at_a_time_than_allowed(serve, judge):
    def reply(prompt, attempt):
        time.sleep(0.03)
        return said('1')

    server = serve(reply)
    judge(server, concurrency=3).complete([str(i) for i in range(20)])
    assert 1 < server.most <= 3


@pytest.mark.parametrize(('name', 'value', 'flag'), [
    ('concurrency', 0, 'concurrency'), ('max_tokens', 0, 'tokens'), ('retries', -1, 'retries'),
    ('timeout', 0, 'timeout'), ('timeout', math.nan, 'timeout'),
])  # fmt: skip
def test_settings_that_make_no_sense(judge, name, value, flag):
    with pytest.raises(UserError, match=f'Endpoint.{name} = {value}: give'):
        judge('http://127.0.0.1:9/v1', **{name: value})
    parser = Parser(prog='perl_jax judge')
    parser.add_argument(f'--judge_{flag}', **flags.FLAGS[f'--judge_{flag}'])
    with pytest.raises(UserError, match=f'argument --judge_{flag}: {value}: give'):
        parser.parse_args([f'--judge_{flag}={value}'])


def test_a_cache_that_cannot_be_written_now_is_kept(serve, judge, tmp_path, monkeypatch):
    server, cache = serve(lambda prompt, attempt: said('1')), tmp_path / 'judge.sqlite'
    judge(server).complete(['a'])
    monkeypatch.setattr(sqlite3, 'connect', functools.partial(sqlite3.connect, timeout=0))
    with contextlib.closing(sqlite3.connect(cache)) as other:
        other.execute('BEGIN EXCLUSIVE')
        with pytest.raises(UserError, match=r"judge\.sqlite': database is locked; its replies are kept"):
            judge(server).complete(['b'])
        other.execute('ROLLBACK')
    assert judge(server).complete(['a']) == ['1']
    cache.rename(tmp_path / 'other')
    cache.symlink_to(tmp_path / 'gone/judge.sqlite')
    with pytest.raises(UserError, match='unable to open database file; its replies are kept'):
        judge(server).complete(['b'])


def test_a_cache_that_is_none(serve, judge, tmp_path):
    (tmp_path / 'judge.sqlite').write_text('something else' * 100)
    with pytest.raises(UserError, match=r"judge\.sqlite' is not a usable cache"):
        judge(serve(lambda prompt, attempt: said('1'))).complete(['a'])
    with pytest.raises(sqlite3.DatabaseError):
        sqlite3.connect(tmp_path / 'judge.sqlite').execute('SELECT 1 FROM answers')
