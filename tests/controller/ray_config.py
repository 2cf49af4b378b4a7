"""A tiny run on Ray, to be given to the command."""

import dataclasses

from pdjax.config import ServingConfig
from pdjax.types import RayCluster
from pdjax.workload import Fixed, Poisson
from tests.tiny import config


def get_config(max_tokens: int = 4, requests_per_s: float = 10.0) -> ServingConfig:
  """Two requests."""
  workload = Poisson(requests_per_s=requests_per_s, num_requests=2, prompt=Fixed(9), output=Fixed(max_tokens))
  return dataclasses.replace(config('1P1D', workload=workload), processes=RayCluster())
