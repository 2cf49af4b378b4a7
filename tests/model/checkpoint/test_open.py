"""What is no whole checkpoint is refused with what it is, and what to do."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import pdjax


def test_an_adapter_is_told_from_a_model(tmp_path):
  (tmp_path / 'adapter_config.json').write_text(json.dumps({'peft_type': 'LORA'}))
  save_file({'lora_A': np.ones((2, 2), np.float32)}, tmp_path / 'adapter_model.safetensors')
  for _ in range(2):
    with pytest.raises(ValueError, match=f'{tmp_path} holds a LoRA adapter, expected a whole model; merge it'):
      pdjax.load(tmp_path)
    (tmp_path / 'config.json').write_text('{}')  # as some tools put beside it


def test_weights_without_a_config_are_said_to_lack_it(tmp_path):
  save_file({'a': np.ones(2, np.float32)}, tmp_path / 'model.safetensors')
  with pytest.raises(ValueError, match=r'holds safetensors files but no config\.json'):
    pdjax.load(tmp_path)


@pytest.mark.parametrize(
  ('path', 'words'),
  [
    (5, r'is given path=5, expected a text or a PathLike'),
    (None, 'is given path=None, expected a text'),
    (b'model', "is given path=b'model'"),
    ('', "the checkpoint is '', expected a path, a hub id or 'smollm2'"),
  ],
)
def test_what_names_no_checkpoint_is_refused(path, words):
  with pytest.raises(ValueError, match=words):
    pdjax.load(path)
