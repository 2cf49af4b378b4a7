"""This host: its name among others, its addresses, and what memory it has left."""

import pathlib
import socket

from pdjax.types.cluster import DeviceError


def node_name() -> str:
  """This host, by a name that another does not have; processes that share it share a clock."""
  boot = pathlib.Path('/proc/sys/kernel/random/boot_id')
  return f'{socket.gethostname()}/{boot.read_text().strip()}' if boot.exists() else socket.gethostname()


def check_own(host: str) -> None:
  """See that something can listen at an address of this host.

  Raises:
    DeviceError: if it is not this host's; the message names those that are.
  """
  try:
    family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as one:
      one.bind(address)
  except OSError as error:
    raise DeviceError(
      f'processes.host is {host!r}, where nothing can listen on {socket.gethostname()} ({error.strerror or error}), '
      f"whose addresses are {', '.join(own_addresses())}; name one of these, or 'node' for the one that Ray knows."
    ) from error


def own_addresses() -> list[str]:
  """The addresses of this host."""
  import psutil  # for a message alone

  found = (one for some in psutil.net_if_addrs().values() for one in some)
  kinds = (socket.AF_INET, socket.AF_INET6)
  return sorted({one.address.partition('%')[0] for one in found if one.family in kinds})


def check_room(what: str, num_bytes: float, remedy: str) -> None:
  """See that the free memory of this host holds something.

  Raises:
    ValueError: if it does not; the message says `what` it is, both figures, and the remedy.
  """
  import psutil

  free = psutil.virtual_memory().available
  if num_bytes > free:
    raise ValueError(
      f'{what} takes at least {num_bytes / 1e9:,.0f} GB of memory, but {free / 1e9:,.1f} GB are free here; {remedy}.'
    )
