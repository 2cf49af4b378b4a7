"""Fault settings of a soak's sessions, and the errors that their requests may end with then."""

import collections
import dataclasses
import random

from experiments.faults.kinds import KINDS, NOBODY_LEFT, TOO_LATE
from pdjax.types import FaultSpec

_MANY = 1_000_000  # attempts, of which none is the last: of 50, a long request may need every one by chance


@dataclasses.dataclass(frozen=True)
class Setting:
  """A way of dealing with faults.

  Attributes:
    name: In a word.
    faults: For the config.
    fails: Whether requests may end with an error for what went wrong; for what nothing mends they may anyway.
  """

  name: str
  faults: FaultSpec
  fails: bool

  def allows(self, error: str, injected: collections.Counter[str], late: bool = False) -> bool:
    """Whether a request may end with this error after those faults; `late` if transfers were late by themselves."""
    expected = [
      one for name, kind in KINDS.items() if injected[name] and (self.fails or kind.always) for one in kind.errors
    ]
    if late and self.fails:
      expected += TOO_LATE
    if NOBODY_LEFT in error:  # it names the losses, too
      return NOBODY_LEFT in expected
    return any(one in error for one in expected)


SETTINGS = (
  Setting('patient', FaultSpec(corruption='retry', max_attempts=_MANY, backoff_s=0.01), fails=False),
  Setting('anew', FaultSpec('recompute', 'recompute', max_attempts=_MANY, backoff_s=0.01), fails=False),
  Setting('short', FaultSpec(max_attempts=2, backoff_s=0.01, patience_s=0.2), fails=True),
  Setting('strict', FaultSpec(transfer='fail', worker='fail', patience_s=0.2), fails=True),
)
SHARES = (0.02, 0.05, 0.1, 0.2)  # of transfers that go wrong, see `Dice`


def draw_setting(rng: random.Random) -> tuple[Setting, float]:
  """The fault setting of a session, most often one in which no request fails, and the share of faults."""
  return rng.choice((*SETTINGS[:2], *SETTINGS)), rng.choice(SHARES)
