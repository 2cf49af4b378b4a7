"""What can be known of an address before anything long begins: whether it is this host's, and whether Ray answers."""

import socket
import subprocess
import sys
import threading

from pdjax.types.cluster import DeviceError

_CONNECT_S = 4.0  # with the name: a name server that is away takes its time
_ANSWER_S = 5.0
# In a process of its own, for it cannot be called off: where nobody answers, Ray goes on asking for 40 s.
_ASK = """
import sys
try:
  from ray._raylet import GcsClient
except ImportError:
  sys.exit()  # another Ray: whoever asks it next will learn
try:
  GcsClient(address=sys.argv[1])
except Exception as error:
  sys.exit(f'pdjax: {str(error) or type(error).__name__}')
"""


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


def check_cluster(address: str) -> None:
  """See that a Ray cluster's control service can be reached.

  Args:
    address: Host and port.

  Raises:
    DeviceError: if nobody listens there, or nobody who answers as such a service.
  """
  host, _, port = address.rpartition(':')
  reason = _why_closed(host.strip('[]'), int(port)) or _why_silent(address)
  if reason is not None:
    raise DeviceError(
      f'no Ray cluster can be reached at {address} ({reason}); name host and port of a control service that runs, as '
      '`ray start --head` tells them; docs/security.md says what a client needs.'
    )


def _why_closed(host: str, port: int) -> str | None:
  """Why nobody can be connected to, or None."""
  found: list[str | None] = [f'nobody answered for {_CONNECT_S:g} s']

  def connect() -> None:
    try:
      socket.create_connection((host, port), _CONNECT_S).close()
      found[0] = None
    except TimeoutError:
      pass
    except OSError as error:
      found[0] = error.strerror or str(error)

  thread = threading.Thread(target=connect, name='pdjax-address', daemon=True)
  thread.start()
  thread.join(_CONNECT_S)
  return found[0]


def _why_silent(address: str) -> str | None:
  """Why whoever listens there is not the control service of a cluster that takes us, or None."""
  try:
    done = subprocess.run(
      [sys.executable, '-c', _ASK, address], capture_output=True, text=True, timeout=_ANSWER_S, check=False
    )
  except subprocess.TimeoutExpired:
    return f'somebody listens there, but did not answer as its control service for {_ANSWER_S:g} s'
  said = [line for line in done.stderr.splitlines() if line.startswith('pdjax: ')]
  return said[-1].removeprefix('pdjax: ').split('. ')[0].rstrip('.') if said else None
