r"""Prefill and decode on the first device found, sharing it and one copy of the weights: one GPU, or a Colab TPU.

KV moves from one pool to the other on the same device. The report says that the device is shared: what it shows is the
system at work, not what two devices would reach.

python -m experiments.run --config=configs/one_device.py --prompt="Why is the sky blue?"
python -m experiments.run --config=configs/one_device.py:checkpoint=model.gguf,dtype=auto
"""

import dataclasses
from typing import Literal

from configs import smollm2_cpu
from pdjax.config import ServingConfig
from pdjax.types import decode_pool, prefill_pool


def get_config(
  checkpoint: str = 'smollm2',
  page_size: int = 16,
  dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'float32',
  num_pages: int | Literal['auto'] = 1024,
) -> ServingConfig:
  """The run.

  Args:
    checkpoint: A GGUF file, a folder with config.json and safetensors, or 'smollm2'.
    page_size: Tokens per KV page.
    dtype: Of weights and pages; tokens are exact in float32. 'auto' is what the device is fastest in.
    num_pages: Pages of each of the two pools, or 'auto' to fill the device.
  """
  return dataclasses.replace(
    smollm2_cpu.get_config(page_size=page_size),
    checkpoint=checkpoint,
    workers=prefill_pool(1, devices=(0,), num_pages=num_pages) + decode_pool(1, devices=(0,), num_pages=num_pages),
    dtype=dtype,
    platform=None,
  )
