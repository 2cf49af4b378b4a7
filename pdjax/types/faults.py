"""The answers to the failure of a transfer or a worker: plain data of a config."""

import dataclasses
import math
from typing import Annotated, ClassVar, Literal

from pdjax.types.checked import Count, Patience, check_fields
from pdjax.types.fitting import Must

OnTransfer = Literal['retry', 'recompute', 'fail']
OnCorruption = Literal['retry', 'recompute', 'fail']
OnWorker = Literal['recompute', 'fail']

_BACKOFF = Must(lambda value: 0 <= value < math.inf, '0 or more seconds, but a time that comes')


@dataclasses.dataclass(frozen=True, slots=True)
class FaultSpec:
  """The answers for a request when something under it fails. Tokens that were delivered are never delivered again.

  To 'retry' is to send the same pages once more, a little later each time. To 'recompute' is to begin again on whatever
  worker the policy chooses, one that decodes too if it may prefill, with the tokens delivered so far taken as part of
  the prompt; a request keeps its place in the order of arrival. To 'fail' is to end the request with the error.
  Attempts are bounded, so every request ends: a transfer that was tried `max_attempts` times is computed again, and a
  request that was begun `max_attempts` times ends with the error.

  A step that cannot be handed to its devices is as if its requests had lost the worker, which goes on with the others.
  A worker is lost when its step fails, and when its process ends or is silent (`RayCluster.silence_s`). A step has no
  deadline: one that hangs in a process which answers is not noticed. A worker whose process is lost gets another,
  which takes the compiled programs of the one before (`ServingConfig.compilation_cache`) and may take as long as it
  needs; requests that no other worker can serve wait meanwhile. After three tries that failed they wait no longer than
  `patience_s`, and further tries follow, with pauses that grow to a minute, until one succeeds or all is closed. One
  that does not fit the others, such as by other weights, is given up at once.

  Attributes:
    transfer: The answer when a transfer fails, or has no end by its deadline (`TransferSpec.deadline_s`).
    corruption: The answer when other pages arrive than were sent, which only `TransferSpec.checksums` finds.
    worker: The answer when a worker is lost that holds pages of the request, or cannot begin a step of it. With
      'recompute', a prompt that is still whole on the prefill worker is not computed again but sent to another place.
    max_attempts: Most times that one transfer is tried, and that one request is begun.
    backoff_s: Seconds before a transfer is tried again; twice as many before the next time, and so on up to a minute,
      or up to `backoff_s` itself where that is more.
    patience_s: Seconds for which requests wait for a lost worker that nobody is bringing back, if no other can serve
      them: from its loss, or from when the third try to bring it back has failed. Then they end with the error, and
      those that come later are rejected, until it is back after all.

  Raises:
    ValueError: if an answer is unknown, or a number out of range.
  """

  _said: ClassVar[str] = 'faults.{field} is {value}'

  transfer: OnTransfer = 'retry'
  corruption: OnCorruption = 'fail'
  worker: OnWorker = 'recompute'
  max_attempts: Count = 3
  backoff_s: Annotated[float, _BACKOFF] = 0.05
  patience_s: Patience = 60.0

  def __post_init__(self):
    check_fields(self)


ALL_FAIL = FaultSpec(transfer='fail', worker='fail')  # nothing is tried twice
