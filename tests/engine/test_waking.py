"""A policy that has itself woken, on devices: asked at its time, replayed, and in a session."""

import dataclasses

import pdjax
from pdjax.policies import Disaggregated
from pdjax.serving import WakeAt
from pdjax.serving.events import Started, TimerDue
from pdjax.serving.orders import StepOrder
from pdjax.types import SamplingParams
from tests.engine.test_replay import replay
from tests.tiny import config, prompt, requests


@dataclasses.dataclass(frozen=True)
class Held(Disaggregated):
  """Begins no prompt before it has waited for `hold_s`."""

  hold_s: float = 0.2

  def decide(self, view):
    due_s = max((entry.request.arrival_s + self.hold_s for entry in view.waiting.values()), default=0.0)
    return [WakeAt(due_s)] if view.now_s < due_s else super().decide(view)


def test_a_policy_is_woken_on_devices_too_and_a_replay_wakes_it_in_the_same_turns(one_and_one):
  served = one_and_one.serve(requests((3, 9)), policy=Held(max_prefill_tokens=16))
  assert served.report.completed == 2
  woken = [event.due_s for event in served.events if isinstance(event, TimerDue) and event.timer == 'wake']
  first = next(event for event in served.events if isinstance(event, Started) and isinstance(event.order, StepOrder))
  assert woken == [0.2] and first.now_s >= 0.2
  assert replay(one_and_one, served, served.events) == served.events


def test_a_session_wakes_its_policy():
  with pdjax.Session(dataclasses.replace(config(), policy=Held(max_prefill_tokens=16), workload=None)) as session:
    stream = session.submit(prompt(5), SamplingParams(max_tokens=3, ignore_eos=True))
    assert len(stream.result(60.0).token_ids) == 3
    events = session.events
  assert any(isinstance(event, TimerDue) and event.timer == 'wake' for event in events)
