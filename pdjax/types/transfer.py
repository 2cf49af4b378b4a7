"""TransferSpec: how KV pages travel from worker to worker."""

import dataclasses
import itertools
from typing import ClassVar, Literal

from pdjax.types.checked import Count, Patience, check_fields
from pdjax.types.worker import Role, WorkerSpec

TransportName = Literal['auto', 'device_put', 'host_staged', 'cross_process']
GranularityName = Literal['auto', 'request', 'chunk', 'layers']


@dataclasses.dataclass(frozen=True, slots=True)
class TransferSpec:
  """The settings of transfers of KV pages.

  The granularity says in what parts a prompt travels. It matters for prompts that have a place to decode when they
  begin; others travel whole once they have one.

  Attributes:
    transport: 'device_put' from device to device of one process; 'host_staged' over the host's memory, for devices that
      cannot address each other; 'cross_process' over sockets, for workers in processes of their own, where it is the
      only one. 'auto' takes that between processes, and else the first where both workers have devices of one kind.
    granularity: 'request' sends a prompt when all of it is computed; 'chunk' sends each chunk while the next is
      computed; 'layers' sends each chunk in groups of layers, one while the next is computed (Patel et al. 2024), for
      which prefill workers run their steps in such groups. 'auto' sends chunk by chunk, and the last chunk of a prompt
      layer by layer if it is long enough: nothing hides the end of it, and short ones lose more by many small programs.
    layer_groups: Groups of layers to send a chunk in; None takes about four, as many as divide the layers evenly:
      groups of one length are one program.
    layers_from: With 'auto', tokens of a last chunk that is long enough; None asks the cost model.
    piece_bytes: Most bytes of an array that travels, if a unit of one page fits.
    staging_bytes: Most bytes on their way out of a worker, and most on their way into one, at any time. A
      transfer that does not fit waits for its turn. Bytes that are there give way to the next once their writing is
      dispatched.
    deadline_s: Seconds for a transfer to end once its tokens are computed; then it is given up, and `FaultSpec` says
      what follows.
    checksums: Compare what arrives with what was sent, page by page, before it is written: 64 bits for each page, so
      that random damage stays unseen with odds of 2^-64. Costs a read of the pages on either side.

  Raises:
    ValueError: if a field is of another type, a size is not positive or a name is unknown.
  """

  _said: ClassVar[str] = 'transfer.{field} is {value}'

  transport: TransportName = 'auto'
  granularity: GranularityName = 'auto'
  layer_groups: Count | None = None
  layers_from: Count | None = None
  piece_bytes: Count = 4 * 2**20
  staging_bytes: Count = 256 * 2**20
  deadline_s: Patience = 60.0
  checksums: bool = False

  def __post_init__(self):
    check_fields(self)

  def groups(self, num_layers: int) -> tuple[tuple[int, int], ...]:
    """The groups of layers as (first, one after the last), in order; some are a layer longer if they must be."""
    count = min(self.layer_groups or _even_groups(num_layers), num_layers)
    bounds = [num_layers * group // count for group in range(count + 1)]
    return tuple(itertools.pairwise(bounds))

  def step_groups(self, role: Role, num_layers: int) -> tuple[tuple[int, int], ...]:
    """The groups of layers that the steps of a role's workers run in, between which KV may leave by layers.

    There are none where steps run whole, as on all workers that decode. Nothing else says so: programs are compiled for
    these groups, orders name them, and what travels by layers travels in them.
    """
    return self.groups(num_layers) if self.layered_from is not None and role is Role.PREFILL else ()

  def all_step_groups(self, worker: WorkerSpec, num_layers: int) -> tuple[tuple[int, int], ...]:
    """As `step_groups`, of whichever of the worker's roles has some."""
    return next(filter(None, (self.step_groups(role, num_layers) for role in worker.roles)), ())

  @property
  def layered_from(self) -> int | None:
    """Tokens of a chunk from which it may travel layer by layer; None if none does."""
    match self.granularity:
      case 'layers':
        return 1
      case 'auto':
        return self.layers_from
    return None


def _even_groups(num_layers: int) -> int:
  """Two to eight groups of one length, the next to four; four if there are none."""
  return min((count for count in range(8, 1, -1) if num_layers % count == 0), key=lambda n: abs(n - 4), default=4)
