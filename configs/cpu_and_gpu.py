r"""CPUs and a GPU of one machine, one role each: the prompts on the CPUs and the tokens on the GPU, or the reverse.

What it shows is the system at work: pages go over the host from one kind of device to the other. Prompts are what CPUs
are worst at, so the reverse has the shorter TTFT; where the GPU decodes, each token comes sooner. Without a GPU the
engine says what there is instead, and the simulator takes the chips below.

python -m experiments.run --config=configs/cpu_and_gpu.py --prompt="Why is the sky blue?"
python -m experiments.run --config=configs/cpu_and_gpu.py:prefill=gpu,decode=cpu
python -m experiments.run --config=configs/cpu_and_gpu.py --backend=simulator
"""

import dataclasses
from typing import Literal

from configs import smollm2_cpu
from pdjax.config import ServingConfig
from pdjax.cost import Roofline
from pdjax.types import ChipSpec, LinkSpec, decode_pool, prefill_pool

CHIPS = {'cpu': ChipSpec.generic_cpu(), 'gpu': ChipSpec.h100(), 'tpu': ChipSpec.tpu_v5e()}  # of a simulation


def get_config(
  prefill: Literal['cpu', 'gpu', 'tpu'] = 'cpu',
  decode: Literal['cpu', 'gpu', 'tpu'] = 'gpu',
  prefill_index: int = 0,
  decode_index: int = 0,
  num_pages: int = 1024,
) -> ServingConfig:
  """The run.

  Args:
    prefill: The platform of the worker that prefills.
    decode: The platform of the worker that decodes.
    prefill_index: The device of that platform that prefills, counted from 0.
    decode_index: The same of the one that decodes.
    num_pages: Pages of each of the two pools.
  """
  return dataclasses.replace(
    smollm2_cpu.get_config(),
    workers=(
      prefill_pool(1, platform=prefill, devices=(prefill_index,), chip=CHIPS[prefill], num_pages=num_pages)
      + decode_pool(1, platform=decode, devices=(decode_index,), chip=CHIPS[decode], num_pages=num_pages)
    ),
    cost=Roofline(CHIPS[prefill], LinkSpec(25e9, 0.001, 'PCIe 4.0 x16, less what it loses')),
    platform=None,
  )
