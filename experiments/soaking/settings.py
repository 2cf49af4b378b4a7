"""What a soak's sessions are told to do about faults, and which errors their requests may end with then."""

import collections
import dataclasses
import random

from experiments.faults.kinds import KINDS, UNANSWERED
from pdjax.types import FaultSpec

_MANY = 50  # attempts, of which none is the last


@dataclasses.dataclass(frozen=True)
class Setting:
  """A way of dealing with faults.

  Attributes:
    name: In a word.
    faults: For the config.
    fails: Whether requests may end with an error for what went wrong.
  """

  name: str
  faults: FaultSpec
  fails: bool

  def allows(self, error: str, injected: collections.Counter[str]) -> bool:
    """Whether a request may end with this error after those faults."""
    if not self.fails:
      return False
    known = [error for name, kind in KINDS.items() if injected[name] for error in kind.errors]
    known += KINDS['transfer_stalls'].errors  # on a busy machine a transfer may be late by itself
    lost = any(injected[name] and kind.moment not in ('transfer', 'end') for name, kind in KINDS.items())
    lost |= injected['pages_unwritable'] > 0
    expected = [*known, *(UNANSWERED if lost else ())]
    return any(one in error for one in expected)


SETTINGS = (
  Setting('patient', FaultSpec(corruption='retry', max_attempts=_MANY, backoff_s=0.01), fails=False),
  Setting('anew', FaultSpec('recompute', 'recompute', max_attempts=_MANY, backoff_s=0.01), fails=False),
  Setting('short', FaultSpec(max_attempts=2, backoff_s=0.01, patience_s=0.2), fails=True),
  Setting('strict', FaultSpec(transfer='fail', worker='fail', patience_s=0.2), fails=True),
)
SHARES = (0.02, 0.05, 0.1, 0.2)  # of transfers that go wrong, see `Dice`


def draw_setting(rng: random.Random) -> tuple[Setting, float]:
  """What a session does about faults, twice as often that no request fails, and how many of them there are."""
  return rng.choice((*SETTINGS[:2], *SETTINGS)), rng.choice(SHARES)
