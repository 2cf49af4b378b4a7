"""Where the processes of workers run, if each worker has one of its own."""

import dataclasses
import ipaddress
from collections.abc import Mapping
from typing import Literal, get_args

Strategy = Literal['PACK', 'SPREAD', 'STRICT_PACK', 'STRICT_SPREAD']

_SHOWN_ALONE = ('GPU', 'TPU')  # the resources of which Ray shows a process those alone that are set aside for it


@dataclasses.dataclass(frozen=True, slots=True)
class RayCluster:
  """Each worker in a process of its own, which Ray places and watches (`pip install pdjax[cluster]`).

  Attributes:
    address: A Ray cluster that is there, `'host:port'`, or 'auto' for the one of this machine; None starts one here and
      stops it in the end.
    host: The address at which a worker lets others pull its pages, or 'node' for that of its node in the Ray cluster.
      Whoever reaches it can pull what is offered: docs/security.md says what to do before others can reach it.
    strategy: How Ray spreads the workers over its nodes.
    cpus: Cores that Ray counts for each worker; what a worker really takes is not limited.
    accelerator: The resource of which a worker takes one a device; None is 'GPU' or 'TPU', as the config's platform
      says, and nothing on CPU. A platform of None takes nothing either: fit for a cluster that has neither.
    silence_s: Seconds without an answer after which a process counts as lost, though it has not ended.

  Raises:
    ValueError: if the host is no address of one host, the strategy is unknown, or the cores or the silence are not
      positive.
  """

  address: str | None = None
  host: str = '127.0.0.1'
  strategy: Strategy = 'PACK'
  cpus: float = 1.0
  accelerator: str | None = None
  silence_s: float = 60.0

  def __post_init__(self):
    if self.host != 'node':
      try:
        unspecified = ipaddress.ip_address(self.host).is_unspecified
      except ValueError:
        raise ValueError(
          f"host is {self.host!r}, expected the IP address at which workers let others pull pages, or 'node'."
        ) from None
      if unspecified:
        raise ValueError(f"host is {self.host!r}, which no other host can connect to; name one address, or 'node'.")
    if self.strategy not in get_args(Strategy):
      raise ValueError(f'strategy is {self.strategy!r}, expected one of {", ".join(get_args(Strategy))}.')
    if self.cpus <= 0:
      raise ValueError(f'cpus is {self.cpus}, expected more than 0 cores; a part of one will do, such as 0.1.')
    if not self.silence_s > 0:
      raise ValueError(f'silence_s is {self.silence_s}, expected more than 0 seconds; inf waits for ever.')

  def resources(self, tp: int, platform: str | None) -> dict[str, float]:
    """What Ray sets aside for a worker of so many devices."""
    accelerator = self.accelerator or {'gpu': 'GPU', 'tpu': 'TPU'}.get(platform or '')
    return {'CPU': self.cpus} | ({accelerator: float(tp)} if accelerator else {})

  def refusal(self, platform: str | None, found: Mapping[str, float]) -> str | None:
    """Why workers of a platform cannot run on a Ray cluster, if they cannot: two could take one accelerator.

    A process for which Ray sets none aside sees all that its node shows (Ray 2.60: `CUDA_VISIBLE_DEVICES` is left as
    it was), and JAX takes what it sees. A second process on TPUs fails by itself.

    Args:
      platform: Of the config.
      found: What the cluster has, by resource.
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
