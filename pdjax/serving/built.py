"""A built cluster: a backend that is ready to serve, and the time that building it took."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from pdjax.serving.loop import Backend
from pdjax.types.hardware import ChipSpec, DtypeName, LinkSpec
from pdjax.types.transfer import TransferSpec
from pdjax.types.worker import WorkerSpec


class Living(Protocol):
  """A worker or another place that may be lost and come back."""

  incarnation: int


class Serving(Backend, Protocol):
  """A backend that serves again and again: on devices of this process or of others, or in virtual time."""

  @property
  def places(self) -> Mapping[str, Living]:
    """Each worker, and each place that only holds pages, by its name, in the incarnation that it is in."""

  def start_clock(self) -> object:
    """Let a run begin now, at 0 s; of an earlier one, ended or broken off, nothing is heard or written any more."""

  def interrupt(self, note: Callable[[float], None]) -> None:
    """From any thread: call `note` with the time now and end the wait under way, or else the next."""

  def close(self) -> None:
    """Wait for what is under way, and end what serves."""


@dataclasses.dataclass(frozen=True)
class WarmUp:
  """The work done before the clock ran.

  Attributes:
    load_s: Seconds to load the weights.
    compile_s: Seconds until every program was compiled.
    measure_s: Seconds to measure the device.
    program_s: Seconds of each program; they compile side by side.
    chip: The first device, as it was measured.
    link: The way between the first device and the last, as it was measured.
  """

  load_s: float
  compile_s: float
  measure_s: float
  program_s: dict[str, float]
  chip: ChipSpec
  link: LinkSpec


@dataclasses.dataclass(frozen=True)
class Built:
  """A backend that is ready, and what it took to get there.

  Attributes:
    backend: The backend.
    workers: Its workers, `num_pages` filled in.
    transfer: The way in which KV travels, `layers_from` filled in.
    dtype: Of the weights.
    devices: The devices of each worker by name; in virtual time their numbers.
    warm_up: The work of the warm-up; None in virtual time, where there is none.
    places: Its places that only hold pages, `num_pages` filled in.
  """

  backend: Serving
  workers: tuple[WorkerSpec, ...]
  transfer: TransferSpec
  dtype: DtypeName
  devices: Mapping[str, Sequence[str | int]]
  warm_up: WarmUp | None
  places: tuple[WorkerSpec, ...] = ()
