"""A run's base is followed back to the weights: what a model's files and its network are looked up by."""

import json

from perl_jax.runs import lineage


def run(folder, phase, base):
    folder.mkdir()
    (folder / 'run.json').write_text(json.dumps({'phase': phase, 'base': {'path': str(base)}}))
    return str(folder)


def test_a_policy_leads_through_its_sft_run_to_the_weights(tmp_path):
    sft = run(tmp_path / 'sft', 'sft', 'hf://owner/name')
    policy = run(tmp_path / 'policy', 'policy', sft)
    assert lineage.chain(policy) == [policy, sft, 'hf://owner/name']
    assert lineage.origin(policy) == 'hf://owner/name'


def test_weights_are_their_own_origin(tmp_path):
    for path in (str(tmp_path), 'random:3', 'hf://owner/name', 'package:name/file.gguf', str(tmp_path / 'nowhere')):
        assert lineage.chain(path) == [path]
