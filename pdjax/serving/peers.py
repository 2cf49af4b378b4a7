"""Messages between a controller and the processes of its workers: plain data.

A step or a transfer under way is known by its number, which is the same to the controller and to the workers; no other
ever has it, whatever the run.
"""

import dataclasses

from pdjax.serving.events import Event
from pdjax.serving.orders import Order, TransferOrder
from pdjax.types.cluster import DeviceError
from pdjax.types.handshake import Hello, Manifest
from pdjax.types.model import ModelSpec
from pdjax.types.transfer import TransferSpec
from pdjax.types.worker import WorkerSpec


class PeerLost(DeviceError):
  """A worker's process is gone."""


@dataclasses.dataclass(frozen=True, slots=True)
class Assignment:
  """All that a process must know to become a worker.

  Attributes:
    spec: The worker, all counts filled in.
    incarnation: The number of its incarnation.
    model: The model's shape, as it is served.
    checkpoint: Its weights, as `ServingConfig.checkpoint` names them; every host must have them there.
    transfer: The way in which KV travels.
    moves_kv: Whether it does.
    compilation_cache: The folder of compiled programs, see `keep_programs`.
  """

  spec: WorkerSpec
  incarnation: int
  model: ModelSpec
  checkpoint: str
  transfer: TransferSpec
  moves_kv: bool
  compilation_cache: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Loaded:
  """A worker whose weights are loaded and whose steps are compiled.

  Attributes:
    hello: The facts that others must know of it.
    load_s: Seconds to load the weights and sum them.
    compile_s: Seconds until every step was compiled.
    program_s: Seconds of each program.
  """

  hello: Hello
  load_s: float
  compile_s: float
  program_s: dict[str, float]


# ---------------------------------------------------------------------------- to a worker's process, in order


@dataclasses.dataclass(frozen=True, slots=True)
class StartClock:
  """A run begins; it began when the process's clock showed `start_s`."""

  start_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class Submit:
  """Orders of one action: steps of this worker, transfers that leave it, requests to forget.

  Attributes:
    orders: The orders.
    first_number: The number of an order whose id is 0; that of any other is so much more than its id.
  """

  orders: tuple[Order, ...]
  first_number: int


@dataclasses.dataclass(frozen=True, slots=True)
class Pull:
  """Fetch what another worker offers under a number, and write it into pages of this one."""

  number: int
  order: TransferOrder
  manifest: Manifest


@dataclasses.dataclass(frozen=True, slots=True)
class Settle:
  """A transfer is over: what is held for it may go, and what comes of it is not written.

  Attributes:
    number: Of the transfer.
    pulled: Whether its pieces have been pulled, or will be.
  """

  number: int
  pulled: bool


Message = StartClock | Submit | Pull | Settle

# ---------------------------------------------------------------------------- from a worker's process
# The `Done` and `Failed` of a step name its number, not its id.


@dataclasses.dataclass(frozen=True, slots=True)
class Offered:
  """The pieces of a transfer may be pulled; their devices may still be computing them."""

  number: int
  manifest: Manifest


@dataclasses.dataclass(frozen=True, slots=True)
class Gathered:
  """The pieces of a transfer could leave their devices at `ready_s`."""

  number: int
  ready_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class Written:
  """Steps of the target find from now on what a transfer moved.

  Attributes:
    number: Of the transfer.
    pulled_s: The time at which the pull began.
    arrived_s: The time at which its last piece was there.
    wire_bytes: Bytes of all pieces.
    pieces: The number of its pieces.
  """

  number: int
  pulled_s: float
  arrived_s: float
  wire_bytes: int
  pieces: int


@dataclasses.dataclass(frozen=True, slots=True)
class TransferFailed:
  """A transfer did not end well on one of its ends.

  Attributes:
    number: Of the transfer.
    error: The error, in a line.
    corrupt: Whether other pages arrived than were sent.
    pulled: Whether its pieces may have been pulled; if not, the source can let go of them.
  """

  number: int
  error: str
  corrupt: bool = False
  pulled: bool = True


News = Event | Offered | Gathered | Written | TransferFailed
