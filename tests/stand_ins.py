"""Stand-ins for the tools of the cloud, which note how they were called: what would reach it from the launch scripts.

PATH holds them and a few plain tools alone, so that nothing can reach a cloud from here.
"""

import pathlib
import shlex
import shutil
import subprocess

import pytest

LAUNCH = pathlib.Path(__file__).parents[1] / 'launch'
NOTE = """#!/usr/bin/env bash
printf '%q ' "$(basename "$0")" "$@" >> "$CALLS"
echo >> "$CALLS"
[[ ! -t 0 && $1 == apply ]] && cat >> "$STDIN"
for word in "$@"; do
  [[ -f ${word#--env-file=} ]] && cp -p "${word#--env-file=}" "$COPIES"
  [[ $word == describe && -n ${STATE:-} ]] && echo "$STATE"
done
exit "${FAIL:-0}"
"""
TOOLS = ('bash', 'base64', 'basename', 'cat', 'cp', 'dirname', 'git', 'gzip', 'mkdir', 'mktemp', 'rm', 'sed', 'tr')
RUN = ('policy', '--gin_file=recipes/toy_policy.gin', """--gin.MODEL_DIR='gs://b/it is'""")
ZONE = '--zone=us-west4-a'
SECRET = 'hf_it is "$ecret"'  # a value of HF_TOKEN


@pytest.fixture
def call(tmp_path):
    """Run a script with stand-ins for the tools of the cloud: its result, and the calls as lists of words."""
    for name in ('gcloud', 'kubectl', 'xpk'):
        path = tmp_path / 'bin' / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(NOTE)
        path.chmod(0o755)
    for name in TOOLS:
        (tmp_path / 'bin' / name).symlink_to(shutil.which(name))
    log, stdin, copies = (tmp_path / name for name in ('calls', 'stdin', 'copies'))

    def run(script, *words, fail=0, **env):
        log.write_text('')
        stdin.write_text('')
        shutil.rmtree(copies, ignore_errors=True)
        copies.mkdir()
        env = {'PATH': tmp_path / 'bin', 'HOME': tmp_path, 'FAIL': fail} | env
        env |= {'CALLS': log, 'STDIN': stdin, 'COPIES': copies}
        result = subprocess.run(
            [LAUNCH / script, *words], env={name: str(value) for name, value in env.items()}, cwd=tmp_path,
            capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        return result, [shlex.split(line) for line in log.read_text().splitlines()]

    run.stdin, run.copies = stdin, copies

    return run
