"""The Ray cluster for processes of workers, if each worker has one of its own."""

import dataclasses
import ipaddress
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pdjax.types.checked import Patience, check_fields
from pdjax.types.fitting import Must

Strategy = Literal['PACK', 'SPREAD', 'STRICT_PACK', 'STRICT_SPREAD']
Resources = Mapping[str, float]

_SHOWN_ALONE = ('GPU', 'TPU')  # the resources of which Ray shows a process those alone that are set aside for it
_LEAST = 1e-4  # of which Ray counts no part
_MOST_STEPS = 2_000  # of a search for places
_MOST_NODES = 8  # that a message names
_CORES = Must(lambda value: 0 < value < math.inf, 'more than 0 cores; a part of one will do, such as 0.1')


@dataclasses.dataclass(frozen=True, slots=True)
class RayCluster:
  """Each worker in a process of its own, which Ray places and watches (`pip install pdjax[cluster]`).

  Attributes:
    address: A Ray cluster that is there, `'host:port'`, or 'auto' for the one of this machine; None starts one here and
      stops it in the end. One that does not answer, or lacks what the workers take, is told of within seconds, and
      so is one of which this machine is no node; nodes that an autoscaler would add are not waited for. If nobody
      listens for 6 s where its control service was, the run ends, with what was answered.
    host: The address at which a worker lets others pull its pages, or 'node' for that of its node in the Ray cluster,
      which is 127.0.0.1 where the cluster is started here.
      Whoever reaches it can pull what is offered: docs/security.md says what to do before others can reach it.
    strategy: The name of the way Ray spreads the workers over its nodes. Places that only hold pages go on as many
      nodes as there are, unless it is a strict one, which is theirs too.
    cpus: Cores that Ray counts for each worker; what a worker really takes is not limited.
    accelerator: The resource of which a worker takes one a device; None is 'GPU' or 'TPU', as the config's platform
      says, and nothing on CPU. A platform of None takes nothing either: fit for a cluster that has neither.
    silence_s: Seconds without a sign of life after which a process counts as lost, though it has not ended: from its
      first call on, while it loads and compiles too, which it may do for as long as it wants.
    start_s: Seconds until a process that Ray was asked for must be there, before it can give any sign of life, at the
      start and in each try to bring a worker back. Loading and compiling come after it.

  Raises:
    ValueError: if the address has no port, the host is no address of one host, the strategy is unknown, or the cores,
      the silence or the start are not positive.
  """

  _said: ClassVar[str] = 'processes.{field} is {value}'

  address: str | None = None
  host: str = '127.0.0.1'
  strategy: Strategy = 'PACK'
  cpus: Annotated[float, _CORES] = 1.0
  accelerator: str | None = None
  silence_s: Patience = 60.0
  start_s: Patience = 60.0

  def __post_init__(self):
    check_fields(self)
    if self.address not in (None, 'auto'):
      port = self.address.rpartition(':')[2]
      if (
        ':' not in self.address
        or '://' in self.address
        or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536)
      ):
        raise ValueError(
          f"address is {self.address!r}, expected 'host:port', such as '10.0.0.1:6379', or 'auto' for the cluster of "
          'this machine.'
        )
    if self.host != 'node':
      try:
        unspecified = ipaddress.ip_address(self.host).is_unspecified
      except ValueError:
        raise ValueError(
          f"host is {self.host!r}, expected the IP address at which workers let others pull pages, or 'node'."
        ) from None
      if unspecified:
        raise ValueError(f"host is {self.host!r}, which no other host can connect to; name one address, or 'node'.")

  def resources(self, tp: int, platform: str | None, *, accelerates: bool = True) -> dict[str, float]:
    """The resources that Ray sets aside for a worker of `tp` devices, or for a place that only holds pages."""
    if not accelerates:
      return {'CPU': self.cpus}
    accelerator = self.accelerator or {'gpu': 'GPU', 'tpu': 'TPU'}.get(platform or '')
    return {'CPU': self.cpus} | ({accelerator: float(tp)} if accelerator else {})

  def refusal(self, platform: str | None, found: Mapping[str, float]) -> str | None:
    """The reason workers of a platform cannot run on a Ray cluster, or None: two could take one accelerator.

    A process for which Ray sets none aside sees all that its node shows (Ray 2.60: `CUDA_VISIBLE_DEVICES` is left as
    it was), and JAX takes what it sees. A second process on TPUs fails by itself.

    Args:
      platform: The platform of the config.
      found: Amounts that the cluster has, by resource.
    """
    taken = self.resources(1, platform)
    seen = {None: _SHOWN_ALONE, 'gpu': ('GPU',)}.get(platform, ())
    has = [f'{found[name]:g} {name}' for name in seen if found.get(name, 0) > 0]
    if not has or any(name in taken for name in seen):
      return None
    remedy = (
      "set platform to 'cpu', 'gpu' or 'tpu'"
      if platform is None
      else f"leave processes.accelerator ({self.accelerator!r}) out, or make it 'GPU'"
    )
    return (
      f'the Ray cluster has {" and ".join(has)}, and with platform {platform!r} Ray sets none of them aside for a '
      f'worker: each would see them all, and two could take one; {remedy}.'
    )

  def shortage(self, taken: Mapping[str, Resources], nodes: Mapping[str, Resources]) -> str | None:
    """The resources that the nodes lack for the workers, in words, or None; nobody else is taken to use any.

    Args:
      taken: The resources that each worker takes, by its name.
      nodes: The resources that each node has in all, by its address.
    """
    kinds = tuple(dict.fromkeys(kind for bundle in taken.values() for kind in bundle))
    needed, found = (
      {kind: sum(one.get(kind, 0.0) for one in some.values()) for kind in kinds} for some in (taken, nodes)
    )
    for kind in kinds:
      if needed[kind] > found[kind] + _LEAST:
        each = ', '.join(f'{name} {bundle[kind]:g}' for name, bundle in taken.items() if kind in bundle)
        has = f'{found[kind]:g}' if found[kind] else 'none'
        return f'the workers take {needed[kind]:g} {kind} ({each}), the Ray cluster has {has}; {self._remedy(kind)}.'
    rooms = [{kind: node.get(kind, 0.0) for kind in kinds} for node in nodes.values()]
    has = ', '.join(f'{name} {_amounts(room)}' for name, room in list(zip(nodes, rooms, strict=True))[:_MOST_NODES])
    has += f' and {len(rooms) - _MOST_NODES} more' if len(rooms) > _MOST_NODES else ''
    for name, bundle in taken.items():
      if not any(_fits(bundle, room) for room in rooms):
        return (
          f'worker {name!r} takes {_amounts(bundle)} of one node, but no node of the Ray cluster has as much ({has}); '
          'lower tp or processes.cpus, or use a cluster of larger nodes.'
        )
    if self.strategy == 'STRICT_PACK' and not any(_fits(needed, room) for room in rooms):
      return (
        f"strategy 'STRICT_PACK' wants all workers on one node, with {_amounts(needed)}, but no node of the Ray "
        f"cluster has as much ({has}); set processes.strategy to 'PACK'."
      )
    apart = self.strategy == 'STRICT_SPREAD'
    if self.strategy != 'STRICT_PACK' and not _have_places(list(taken.values()), rooms, apart=apart):
      each = ', '.join(f'{name} {_amounts(bundle)}' for name, bundle in taken.items())
      if apart:
        return (
          f"strategy 'STRICT_SPREAD' wants each worker on a node of its own ({each}), but the Ray cluster has too few "
          f"such nodes ({has}); set processes.strategy to 'SPREAD'."
        )
      return (
        f'each worker wants its place on one node ({each}), but together they do not fit on those of the Ray cluster '
        f'({has}); lower tp or processes.cpus, or use other nodes.'
      )
    return None

  def _remedy(self, kind: str) -> str:
    if kind == 'CPU':
      return 'lower processes.cpus or the number of workers, or use a larger cluster'
    if kind == self.accelerator:
      return 'name in processes.accelerator what it has, lower tp or the number of workers, or use another cluster'
    return "set platform to 'cpu', lower tp or the number of workers, or use a cluster that has them"


def _fits(bundle: Resources, room: Resources) -> bool:
  return all(amount <= room.get(kind, 0.0) + _LEAST for kind, amount in bundle.items())


def _amounts(bundle: Resources) -> str:
  return ' and '.join(f'{amount:g} {kind}' for kind, amount in bundle.items())


def _have_places(bundles: Sequence[Resources], rooms: Sequence[Resources], *, apart: bool) -> bool:
  """Whether all fit into the rooms at once, `apart` none beside another; yes too where that takes too long to say."""
  order = sorted(bundles, key=lambda bundle: sorted(bundle.values()), reverse=True)  # the largest have the least choice
  steps = itertools.count()

  def place(index: int, left: Sequence[Resources]) -> bool:
    if index == len(order) or next(steps) > _MOST_STEPS:
      return True
    bundle, tried = order[index], []
    for at, room in enumerate(left):
      if room in tried or not _fits(bundle, room):  # of rooms alike one stands for all
        continue
      tried.append(room)
      rest = {} if apart else {kind: amount - bundle.get(kind, 0.0) for kind, amount in room.items()}
      if place(index + 1, [*left[:at], rest, *left[at + 1 :]]):
        return True
    return False

  return place(0, rooms)
