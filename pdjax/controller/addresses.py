"""Whether a Ray cluster answers at an address, which is asked before anything long begins."""

import dataclasses
import json
import queue
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import wait
from typing import Any

from pdjax.controller.calls import begin_call
from pdjax.host import own_addresses
from pdjax.types.cluster import DeviceError

_ALL_S = 9.5  # for all that is asked of a cluster
_RESOLVE_S = 3.0  # for its name: a name server that is away takes its time
_CONNECT_S = 2.5
_ANSWER_S = 4.0  # from when Ray is imported there on, which may take its time
_LEAST_S = 1.0  # without an answer after which somebody counts as silent
_MOST_NODES = 8  # that a message names
_IMPORTED, _NODES, _REFUSED = 'imported', 'nodes ', 'pdjax: '
# In a process of its own, for it cannot be called off: where nobody answers, Ray goes on asking for 40 s. A Ray that
# has no such names ends it without a word: whoever asks that next will learn.
_ASK = """
import json, sys
from ray._private import services
from ray._raylet import GcsClient
from ray.core.generated.gcs_pb2 import GcsNodeInfo
print('imported', flush=True)
try:
  client = GcsClient(address=sys.argv[1])
except Exception as error:
  print('pdjax:', ' '.join((str(error) or type(error).__name__).split()))
  sys.exit()
nodes = client.get_all_node_info(timeout=3, state_filter=GcsNodeInfo.GcsNodeState.ALIVE)
here = set(services.find_node_ids())  # of those whose processes run here, at whatever address
print('nodes', json.dumps([[one.node_manager_address, node.hex() in here] for node, one in nodes.items()]))
"""


def check_cluster(address: str) -> None:
  """See that a Ray cluster's control service can be reached, and that this machine is one of its nodes: within 10 s.

  Args:
    address: Host and port.

  Raises:
    DeviceError: if the name is not resolved, nobody listens there, nobody answers as such a service, or no node of the
      cluster is here, without which Ray takes no run.
  """
  until_s = time.monotonic() + _ALL_S
  host, _, port = address.rpartition(':')
  try:
    _connect(host.strip('[]'), int(port))
    nodes = _ask(address, until_s)
  except _Unreached as error:
    raise DeviceError(
      f'no Ray cluster can be reached at {address} ({error}); name host and port of a control service that runs, as '
      '`ray start --head` tells them; docs/security.md says what a client needs.'
    ) from None
  own = own_addresses()
  if nodes and not any(one.is_here or one.address in own for one in nodes):
    others = ', '.join(one.address for one in nodes[:_MOST_NODES]) + (', …' if len(nodes) > _MOST_NODES else '')
    raise DeviceError(
      f'this machine is no node of the cluster at {address}, whose nodes are at {others}, and Ray takes a run from one '
      f'of its nodes only; run `ray start --address={address}` here (its addresses are {", ".join(own)}), or start '
      'the run there.'
    )


class _Unreached(Exception):
  """A control service cannot be reached; the message says why."""


@dataclasses.dataclass(frozen=True)
class _Node:
  """A node of a cluster: its address, and whether its processes run on this machine."""

  address: str
  is_here: bool


def _connect(host: str, port: int) -> None:
  """See that somebody listens there: at one address that the name has, if it has several."""
  resolved = begin_call(lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
  if not wait([resolved], _RESOLVE_S).done:
    raise _Unreached(f'the name {host!r} is not resolved: no name server answered for {_RESOLVE_S:g} s')
  try:
    found = resolved.result()
  except (OSError, UnicodeError) as error:
    raise _Unreached(f'the name {host!r} is not resolved: {_reason(error)}') from None
  open_ones = {begin_call(lambda one=one: _open(*one)) for one in found}  # type: ignore[misc]
  until_s = time.monotonic() + _CONNECT_S
  reason = f'nobody answered for {_CONNECT_S:g} s'
  while open_ones:
    done, open_ones = wait(open_ones, max(until_s - time.monotonic(), 0.0), 'FIRST_COMPLETED')
    if not done:
      break
    for one in done:
      failed = one.exception()
      if failed is None:
        return
      reason = reason if isinstance(failed, TimeoutError) else _reason(failed)
  raise _Unreached(reason)


def _open(family: int, kind: int, protocol: int, name: str, address: Any) -> None:
  with socket.socket(family, kind, protocol) as one:
    one.settimeout(_CONNECT_S)
    one.connect(address)


def _reason(error: BaseException) -> str:
  return getattr(error, 'strerror', None) or str(error)


def _ask(address: str, until_s: float) -> list[_Node]:
  """The nodes of the cluster whose control service is there; none if Ray does not tell them, or not in time."""
  heard: queue.SimpleQueue[str | None] = queue.SimpleQueue()
  child = subprocess.Popen(
    [sys.executable, '-c', _ASK, address], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    text=True,
  )  # fmt: skip

  def listen() -> None:
    assert child.stdout is not None
    with child.stdout:
      for line in child.stdout:
        heard.put(line.rstrip())
    heard.put(None)

  threading.Thread(target=listen, name='pdjax-address', daemon=True).start()
  asked_s: float | None = None
  limit_s = until_s
  try:
    while (line := heard.get(timeout=max(limit_s - time.monotonic(), 0.0))) is not None:
      if line == _IMPORTED:
        asked_s = time.monotonic()
        limit_s = min(until_s, asked_s + _ANSWER_S)
      elif line.startswith(_NODES):
        return [_Node(*one) for one in json.loads(line.removeprefix(_NODES))]
      elif line.startswith(_REFUSED):
        raise _Unreached(line.removeprefix(_REFUSED).split('. ')[0].rstrip('.'))
  except queue.Empty:
    waited_s = 0.0 if asked_s is None else time.monotonic() - asked_s
    if waited_s >= _LEAST_S:
      raise _Unreached(
        f'somebody listens there, but did not answer as its control service for {waited_s:.1f} s'
      ) from None
  finally:
    child.kill()
    child.wait()
  return []
