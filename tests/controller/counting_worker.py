"""A worker's Ray actor that counts the programs which are compiled in its process."""

from typing import Any

from pdjax.engine.ray_worker import RayWorker

NUM_COMPILED = 'num_compiled'  # what to ask it for


class CountingWorker(RayWorker):
  """As a `RayWorker`; programs that were compiled before and are taken from a folder count too."""

  _compiled: list[str] | None = None

  def call(self, method: str, *args: Any) -> Any:
    if method == NUM_COMPILED:
      return len(self._compiled or ())
    if self._compiled is None:
      self._compiled = []
      import jax

      jax.monitoring.register_event_duration_secs_listener(self._count)
    return super().call(method, *args)

  def _count(self, event: str, seconds: float, **_: Any) -> None:
    assert self._compiled is not None
    if 'backend_compile' in event:
      self._compiled.append(event)
