"""The folders where the processes of a run keep compiled programs, one for each host; their controller sees to it."""

import os
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping

from pdjax.config import KEEP_NO_PROGRAMS
from pdjax.controller.peer import Peer
from pdjax.host import node_name
from pdjax.program_folder import ProgramFolder, remove_when_unused

_REMOVE_S = 3.0  # until processes that were killed are gone


class ProgramFolders:
  """The folder that the config names, or else a temporary one of each host, which its processes share.

  The controller has a share in the one on its own host: it stays while every worker there is lost.

  Args:
    named: `ServingConfig.compilation_cache`.
    peers: The processes.
    say: Told in a line, once a host, where programs are not kept as the config says.
  """

  def __init__(self, named: str | None, peers: Mapping[str, Peer], say: Callable[[str], None] = lambda line: None):
    is_path = named is not None and named != KEEP_NO_PROGRAMS and '://' not in named
    self._named = os.path.abspath(named) if named is not None and is_path else named  # a process has another cwd
    self._peers = peers
    self._say = say
    self._said: set[tuple[str, str]] = set()
    self._shared: dict[str, str] = {}  # by node
    self._one_makes_it: dict[str, threading.Lock] = defaultdict(threading.Lock)  # by node
    self._here: dict[str, ProgramFolder | None] = {}  # on this host, by path, with the controller's share
    self._lock = threading.Lock()

  def of(self, worker: str, node: str) -> str | None:
    """The folder for the programs of a worker's empty process, as `keep_programs` takes it; it has a share in that."""
    named, peer = self._named, self._peers[worker]
    if named == KEEP_NO_PROGRAMS:
      return named
    if named is not None:
      reason = peer.ask('why_not_kept', named)
      if reason is None:
        return named
      self._say_once(node, f'compilation_cache {named!r} takes no programs', reason, 'they are kept for this run only')
    try:
      return self._share(peer, node)
    except OSError as error:
      therefore = 'a worker that comes back compiles all of them again'
      self._say_once(node, 'no temporary folder for compiled programs', str(error), therefore)
      return None

  def _share(self, peer: Peer, node: str) -> str | None:
    with self._lock:
      known, alone = self._shared.get(node), self._one_makes_it[node]
    if known is not None:  # nobody waits for the other processes of the host
      return self._keep(node, peer.ask('share_programs', known, self._named))
    with alone:
      return self._keep(node, peer.ask('share_programs', self._shared.get(node), self._named))

  def _keep(self, node: str, folder: str | None) -> str | None:
    with self._lock:
      if folder is not None:
        self._shared[node] = folder
        if node == node_name() and folder not in self._here:
          self._here[folder] = ProgramFolder.hold(folder)
    return folder

  def _say_once(self, node: str, what: str, reason: str, therefore: str) -> None:
    with self._lock:
      if (node, what) in self._said:
        return
      self._said.add((node, what))
    self._say(f'{what} on {node.partition("/")[0]} ({reason}); {therefore}')

  def close(self) -> None:
    """See that none is left on this host, where all processes were ended."""
    with self._lock:
      here, self._here = self._here, {}
    for share in here.values():
      if share is not None:
        share.close()
    for path in here:
      remove_when_unused(path, _REMOVE_S)
