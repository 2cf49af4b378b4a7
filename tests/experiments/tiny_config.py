"""The tiny model with random weights, for the command: in one process or on Ray, and with what goes wrong."""

import dataclasses
import pathlib
from typing import Any

from pdjax.config import ServingConfig
from pdjax.policies import Disaggregated
from pdjax.serving.messages import Action, Transfer
from pdjax.types import RayCluster
from pdjax.workload import Given
from tests.tiny import config, requests


@dataclasses.dataclass(frozen=True)
class Failing(Disaggregated):
  """Goes wrong in one way once a file of answers has so many lines."""

  way: str = 'raises'
  answers: str = ''
  after: int = 0

  def decide(self, state: Any) -> list[Action]:
    path = pathlib.Path(self.answers)
    if path.is_file() and path.read_bytes().count(b'\n') >= self.after:
      match self.way:
        case 'raises':
          raise ZeroDivisionError('nothing to divide\nby')
        case 'finds a value wrong':
          raise ValueError('no such value')
        case 'asks for what cannot be':
          return [Transfer('nobody', 'decode0')]
        case 'does nothing':
          return []
    return super().decide(state)


def get_config(ray: bool = False, way: str = '', answers: str = '', after: int = 0, too_long: int = 0) -> ServingConfig:
  """The run.

  Args:
    ray: Each worker in a process of its own.
    way: How its policy fails once there are `after` lines in the file `answers`.
    answers: That file.
    after: That number.
    too_long: So many of its six requests have a prompt that the context does not hold.
  """
  lengths = [9] * (6 - too_long) + [80] * too_long
  run = config('1P1D', workload=Given(requests(lengths)))
  if way:
    run = dataclasses.replace(run, policy=Failing(max_prefill_tokens=16, way=way, answers=answers, after=after))
  if ray:
    run = dataclasses.replace(run, processes=RayCluster(cpus=0.5))
  return run
