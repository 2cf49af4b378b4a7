"""A worker's process, as its controller sees it."""

from typing import Any, Protocol

from pdjax.serving.peers import Message, News


class Peer(Protocol):
  """A worker's process, as its controller sees it. Messages of one thread arrive in their order."""

  name: str

  def ask(self, method: str, *args: Any) -> Any:
    """Call a method of its `WorkerProcess` and wait for the answer, however long that takes while it lives.

    Raises:
      PeerLost: if the process is gone, or gives no sign of life for too long.
    """

  def tell(self, message: Message) -> None:
    """Send a message; returns at once and never raises: that a process is gone shows in `listen`."""

  def listen(self) -> tuple[News, ...]:
    """Wait until something happened there, or a while.

    Raises:
      PeerLost: as `ask` does.
    """

  def restart(self) -> None:
    """Wait until there is an empty process again where one was lost.

    Raises:
      PeerLost: if there will be none.
    """

  def close(self) -> None:
    """End the process."""
