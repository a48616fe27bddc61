"""Hostile text does nothing: in a report that a browser opens, and in the names and values of the launch scripts."""
# ruff: noqa: F811 (a fixture is shared by importing it)

import html.parser
import http.server
import json
import os
import shutil
import subprocess
import threading

import pytest
from stand_ins import ZONE, call  # noqa: F401

from perl_jax.tools import report

pytestmark = pytest.mark.campaign
IS_CAMPAIGN = int(os.environ.get('CAMPAIGN_RUNS', '1')) > 1
BROWSER = next(filter(None, map(shutil.which, ('chromium-headless-shell', 'chromium', 'google-chrome'))), None)

# Each would, as markup or script, mark the page and ask the server at URL.
DEED = "document.title=`DONE`;fetch(`URL`)"
HOSTILE = (
    f'<script>{DEED}</script>', f'</script><script>{DEED}</script>', f'"><img src=x onerror="{DEED}">',
    f"' onmouseover='{DEED}' onclick='{DEED}' x='", f'javascript:{DEED}', f'</style><svg onload="{DEED}">',
    f'</textarea></title><iframe srcdoc="<script>{DEED}</script>"></iframe>', f'<a href="javascript:{DEED}">x</a>',
    '<img src="URL"><link rel=stylesheet href="URL"><style>@import "URL";</style>', f'-->{DEED}//<!--', f'${{{DEED}}}',
    '<meta http-equiv="refresh" content="0;url=URL">', f'\\u003cscript\\u003e{DEED}\\u003c/script\\u003e',
    f'\u202e\u2066\ufeff\u2028\u2029<body onload="{DEED}">', 'alert`DONE`', '\ud800<script>\x00\x1b[2J',
    '&lt;script&gt;' + DEED + '&lt;/script&gt;', '<' * 1_000_000 + f'<script>{DEED}</script>',
)  # fmt: skip
FIELDS = ('prompt', 'response', 'sft_response', 'reference')


def hostile_run(folder, text, other=1.0):
    """A run whose every field that the report shows is a hostile text."""
    folder.mkdir(parents=True)
    short = text[:2000]  # a line of a megabyte is an answer's
    steps = [{'step': n, 'phase': 'policy', f'eval/{short}': n / 3, 'eval/truth': n * other / 9} for n in range(1, 4)]
    info = dict.fromkeys(('tuning', 'devices', 'started', 'finished', 'vocabulary', 'imported', short), short)
    info |= {'phase': 'policy', 'base': {'path': short, 'fingerprint': short}, 'rewards': [short]}
    samples = [{'step': 3, 'phase': 'policy', 'score': short, 'sft_score': 1.0} | dict.fromkeys(FIELDS, text)]
    samples.append({'step': 3, 'phase': 'policy', 'score': 1.0, 'sft_score': 0.0} | dict.fromkeys(FIELDS, text))
    for name, rows in ('metrics.jsonl', steps), ('samples.jsonl', samples), ('run.json', [info]):
        (folder / name).write_text(''.join(json.dumps(row) + '\n' for row in rows))
    gin = f'x.y = {short!r}\nx.{other} = 1\n# {short!r}\nRATE = {other}\n'
    (folder / 'config.gin').write_text(gin, errors='replace')
    return str(folder)


class Scripts(html.parser.HTMLParser):
    """Collects what could act: elements, handlers and addresses."""

    def __init__(self, text):
        super().__init__()
        self.acts = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.acts += [tag] if tag in ('script', 'iframe', 'object', 'embed', 'link', 'base', 'img', 'form') else []
        for name, value in attributes:
            is_address = name in ('href', 'src', 'action', 'srcdoc', 'formaction', 'xlink:href')
            self.acts += [name] if name.startswith('on') or is_address and not value.startswith(('#', 'data:')) else []


@pytest.fixture(scope='module')
def server():
    """A server whose `asked` notes every request."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args):
            pass

    http_server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    http_server.asked = asked
    threading.Thread(target=http_server.serve_forever, daemon=True).start()
    yield http_server
    http_server.shutdown()
    http_server.server_close()


# Does to a page what a visitor may do to it, with the script that stands in the page.
VISIT = """<script>for (const element of document.querySelectorAll('*'))
for (const name of ['mouseover', 'mousemove', 'focus', 'click', 'toggle', 'pointerdown'])
element.dispatchEvent(new MouseEvent(name, {bubbles: true, clientX: 50, clientY: 50}));
document.documentElement.dataset.visited = 'yes'</script>"""


def opened(page):
    """The document as the browser leaves it, some seconds of its time later."""
    command = [BROWSER, '--headless', '--no-sandbox', '--disable-gpu', '--virtual-time-budget=3000', '--dump-dom']
    result = subprocess.run([*command, page.as_uri()], capture_output=True, timeout=120, check=True)
    return result.stdout.decode(errors='replace')


def is_harmed(document, server):
    return '<title>DONE' in document or bool(server.asked)


@pytest.mark.skipif(BROWSER is None, reason='no Chromium is installed')
def test_a_page_that_is_not_escaped_is_seen_to_act(tmp_path, server):
    """That the next test can fail: without the page's policy, and under it."""
    url = f'http://127.0.0.1:{server.server_port}/'
    server.asked.clear()
    page = tmp_path / 'page.html'
    page.write_text(f'<html><head><title>x</title></head><body>{HOSTILE[0].replace("URL", url)}</body></html>')
    assert '<title>DONE' in opened(page) and server.asked
    server.asked.clear()
    text = f"<p onmouseover='{DEED}'>x</p>".replace('URL', url)
    page.write_text(f'<html><head><title>x</title></head><body>{text}{VISIT}</body></html>')
    assert 'data-visited="yes"' in (document := opened(page)) and is_harmed(document, server)
    server.asked.clear()


def test_a_report_of_hostile_texts_does_nothing(tmp_path, server):
    """A page of each text, its two runs compared; the browser opens one of all of them, in the campaign each."""

    def written(name, runs):
        page = tmp_path / f'{name}.html'
        report.write(runs, str(page))
        return page

    plain = [written('plain', [hostile_run(tmp_path / name / 'run', name, other) for name, other in names.items()])
             for names in ({'a': 1.0}, {'b': 1.0, 'c': 2.0})]  # fmt: skip
    acts, url = Scripts(plain[0].read_text()).acts, f'http://127.0.0.1:{server.server_port}/'
    assert acts == Scripts(plain[1].read_text()).acts == ['link', 'script']
    runs, pages = [], []
    for number, text in enumerate(HOSTILE):
        text, folder = text.replace('URL', url), tmp_path / str(number)
        name = text[:60].replace('/', '%').replace('\0', '').encode(errors='replace').decode()
        runs += [hostile_run(folder / name, text), hostile_run(folder / 'b', text, 2.0)]
        pages += [written(f'{number}_1', runs[-2:-1]), written(f'{number}_2', runs[-2:])]
        for page in pages[-2:]:
            assert Scripts(page.read_text(errors='replace')).acts == acts, f'{text[:80]!r}: something else on {page}'
    if BROWSER is None:
        pytest.skip('no Chromium is installed: the pages were read, not opened')
    for page in [written('all', runs), *(pages if IS_CAMPAIGN else [])]:
        page.write_text(page.read_text(errors='replace').replace('</body>', f'{VISIT}</body>'))
        document = opened(page)
        assert 'data-visited="yes"' in document, page
        assert not is_harmed(document, server), f'{page}: {server.asked}'


WORDS = (
    '$(touch OWNED)', '`touch OWNED`', '; touch OWNED', '| touch OWNED', '&& touch OWNED', "'; touch OWNED; '",
    '"; touch OWNED; "', 'a\ntouch OWNED', '$IFS$(touch${IFS}OWNED)', '-oProxyCommand=touch OWNED', '> OWNED',
    '\\$(touch OWNED)', "$'\\ntouch OWNED'", '*', '~', '{a,b}', 'x\r', '%s', '\x1b[2J', '${PATH}', '#', '',
)  # fmt: skip
RUNS = {
    'gke': ('gke.sh', ['run', 'me', '--image=i', '--type=v4-8']), 'tpu': ('tpu.sh', ['run', 'me', ZONE]),
    'xpk': ('gke.sh', ['run', 'me', '--image=i', '--type=v4-8', '--xpk', '--cluster=c', ZONE]),
    'create': ('tpu.sh', ['create', 'me', ZONE, '--type=v4-8']), 'collect': ('tpu.sh', ['collect', 'gs://b/x', 'out']),
    'delete': ('gke.sh', ['delete', 'me']), 'stop': ('tpu.sh', ['stop', 'me', ZONE]),
}  # fmt: skip


def hostile_calls(name, word):
    """The words of a script with the hostile one in each place in turn."""
    script, words = RUNS[name]
    tail = ['--', 'perl_jax', 'sft', '--gin.X=1'] if words[0] == 'run' else []
    for i in range(1, len(words)):
        flag, is_flag, _ = words[i].partition('=')
        yield script, [*words[:i], f'{flag}={word}' if is_flag else word, *words[i + 1 :], *tail]
    if words[0] == 'run':
        yield script, [*words, '--', 'perl_jax', 'sft', f'--gin.X={word}']
        yield script, [*words, '--', 'perl_jax', word]
        yield script, [*words, f'--env=A={word}', *tail]
        yield script, [*words, f'--env={word}', *tail]
        yield script, [*words, f'--secret={word}', *tail]
        yield script, [*words, '--', f'--x={word}', *tail]
        yield script, [*words, '--env=PATH=/nowhere', f'--env_file={word}', *tail]


@pytest.mark.parametrize('name', RUNS)
def test_the_launch_scripts_execute_nothing_of_a_hostile_word(call, name, tmp_path):
    (tmp_path / 'bin/touch').symlink_to(shutil.which('touch'))
    cases = 0
    for word in WORDS if IS_CAMPAIGN else WORDS[::3]:
        for script, words in hostile_calls(name, word):
            result, calls = call(script, *words)
            assert not list(tmp_path.rglob('OWNED*')), (script, words)
            lines = result.stderr.splitlines()
            assert result.returncode in (0, 2), (words, result.stderr)
            assert result.returncode == 0 or calls or len(lines) == 1, (words, result.stderr)
            for line in calls:
                remote = [x.removeprefix('--command=') for x in line if x.startswith('--command=')]
                assert all(executes_nothing(text, tmp_path) for text in remote), (words, remote)
            cases += 1
    print(f'{name}: {cases} cases')


def executes_nothing(text, folder):
    """Whether a command line for another machine, run there by a shell with stand-ins alone, makes no file OWNED."""
    home = folder / 'remote'
    if not home.exists():
        (home / 'bin').mkdir(parents=True)
        (home / 'bin/touch').symlink_to(shutil.which('touch'))
        for tool in 'setsid', 'sleep', 'cat', 'tail', 'perl_jax':
            (home / 'bin' / tool).symlink_to('/bin/true')
    environment = {'PATH': str(home / 'bin'), 'HOME': str(home)}
    subprocess.run(['/bin/bash', '-c', text], cwd=home, env=environment, capture_output=True, timeout=20, check=False)
    return not list(home.rglob('OWNED*'))
