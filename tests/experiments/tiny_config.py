"""The tiny model with random weights, for the command: in one process or on Ray, and with what goes wrong."""

import dataclasses
import json
import pathlib
import time
from typing import Any

from pdjax.config import ServingConfig
from pdjax.policies import Disaggregated
from pdjax.serving.actions import Action, Transfer
from pdjax.types import RayCluster
from pdjax.workload import ClosedLoopWorkload, Fixed, Given
from tests.tiny import config, requests


@dataclasses.dataclass(frozen=True)
class Failing(Disaggregated):
  """Goes wrong in one way once a file of answers has so many lines, or tells beside it who is there, and when."""

  way: str = 'raises'
  answers: str = ''
  after: int = 0

  def decide(self, view: Any) -> list[Action]:
    path = pathlib.Path(self.answers)
    if self.way == 'tells who is there':
      with path.with_suffix('.there').open('a') as file:
        file.write(json.dumps([time.monotonic(), *view.requests]) + '\n')
    elif path.is_file() and path.read_bytes().count(b'\n') >= self.after:
      match self.way:
        case 'raises':
          raise ZeroDivisionError('nothing to divide\nby')
        case 'exits':
          raise SystemExit(0)
        case 'finds a value wrong':
          raise ValueError('no such value')
        case 'asks for what cannot be':
          return [Transfer('nobody', 'decode0')]
        case 'does nothing':
          return []
    return super().decide(view)


def get_config(
  ray: bool = False,
  way: str = '',
  answers: str = '',
  after: int = 0,
  too_long: int = 0,
  apart_s: float = 0.0,
  one_at_a_time: bool = False,
) -> ServingConfig:
  """The run.

  Args:
    ray: Each worker in a process of its own.
    way: The way in which its policy fails once there are `after` lines in the file `answers`.
    answers: That file.
    after: That number.
    too_long: So many of its six requests have a prompt that the context does not hold.
    apart_s: Seconds from one of them to the next.
    one_at_a_time: Each of four requests instead comes when the one before it has ended.
  """
  lengths = [9] * (6 - too_long) + [80] * too_long
  asked = [dataclasses.replace(one, arrival_s=apart_s * i) for i, one in enumerate(requests(lengths))]
  users = ClosedLoopWorkload(max_concurrency=1, num_requests=4, prompt=Fixed(5), output=Fixed(2))
  run = config('1P1D', workload=users if one_at_a_time else Given(tuple(asked)))
  if way:
    run = dataclasses.replace(run, policy=Failing(max_prefill_tokens=16, way=way, answers=answers, after=after))
  if ray:
    run = dataclasses.replace(run, processes=RayCluster(cpus=0.5))
  return run
