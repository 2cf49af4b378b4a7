r"""The cost of a kernel on a TPU, as far as the compiler knows it without one.

libtpu compiles for TPU topologies on any machine and, if asked, simulates the scheduled program: its cycles, with
copies modelled and grid loops unrolled, its instruction bundles and its use of vector memory. That repeats exactly, so
it serves to compare two programs and to notice when one grows. It is no timing: copies with semaphores of their own are
simulated as if each had the memory to itself, no instruction fetch is modelled, and a trip count that is not known at
trace time counts as if it were one.

A case is a function of a module, with keyword arguments, that returns a `Case`:

  python -m pallas_kernels.static_cost --device=v6e pallas_kernels.cases:decode '{"page_size": 64}'

prints one line of JSON. `measure` runs that in a process of its own, since the simulation aborts its process on some
programs, and since its flags have to be set before libtpu is loaded.
"""

import argparse
import dataclasses
import glob
import importlib
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from pallas_kernels import devices

LIBTPU = '0.0.52'  # with which the stored figures were taken: the flags below are not documented


@dataclasses.dataclass(frozen=True)
class Case:
  """A call to compile, and what it has to do at least."""

  function: Callable[..., Any]
  arguments: tuple[Any, ...]  # of `jax.ShapeDtypeStruct`s or arrays, whole trees too
  flops: float = 0.0
  hbm_bytes: float = 0.0  # to read and to write
  donated: tuple[int, ...] = ()  # the result takes the place of the one that is, if any
  integers: Mapping[int, Callable[[], Any]] = dataclasses.field(default_factory=dict)  # arguments that must make sense
  kernel: str = ''
  facts: Mapping[str, int | str] = dataclasses.field(default_factory=dict)  # of the problem, as tuning tables say it

  def least_seconds(self, device: devices.Device) -> tuple[float, float]:
    """Seconds that the matrix units and the memory of a device need at least."""
    return self.flops / device.bf16_flops, self.hbm_bytes / device.hbm_bandwidth


@dataclasses.dataclass(frozen=True)
class Cost:
  """The compiler's estimate of a case."""

  device: str
  cycles: int | None  # of all kernels together; None where the simulation gave up
  bound_cycles: float  # which neither the matrix units nor the memory allow to go below
  bound_by: str  # 'compute' or 'memory'
  kernel_cycles: int | None  # of the dearest kernel
  bundles: int  # of the dearest kernel, or of the longest one if there are no cycles
  spills: int
  slots: Mapping[str, float]  # share of bundles that use each issue slot
  temp_bytes: int  # in HBM
  failure: str = ''  # why there are no cycles

  @property
  def percent(self) -> float | None:
    """The percentage of the bound; over 100 where the model of copies is more generous than the memory."""
    return round(100 * self.bound_cycles / self.cycles, 1) if self.cycles else None

  @property
  def kernel_percent(self) -> float | None:
    """As `percent`, of the dearest kernel alone."""
    return round(100 * self.bound_cycles / self.kernel_cycles, 1) if self.kernel_cycles else None


def compiler() -> pathlib.Path | None:
  """The TPU compiler of this environment, or None.

  It is looked for where `TPU_LIBRARY_PATH` says, then in `tpu-compiler` of the environment, where `make test` puts it:
  installed as usual, it would look for TPUs whenever JAX starts, and keep other processes from doing so.
  """
  places = [
    pathlib.Path(os.environ.get('TPU_LIBRARY_PATH', '')),
    pathlib.Path(sys.prefix, 'tpu-compiler/libtpu/libtpu.so'),
  ]
  installed = importlib.util.find_spec('libtpu')
  if installed is not None and installed.submodule_search_locations:
    places.append(pathlib.Path(installed.submodule_search_locations[0], 'libtpu.so'))
  return next((place for place in places if place.is_file()), None)


def topology(device: devices.Device) -> list[Any]:
  """The devices of a topology of such TPUs, to compile for, whatever this machine has.

  Raises:
    RuntimeError: if there is no TPU compiler here.
  """
  found = compiler()
  if found is None:
    raise RuntimeError(
      f'there is no TPU compiler here; pip install --no-deps --target {sys.prefix}/tpu-compiler libtpu=={LIBTPU}'
    )
  os.environ['TPU_LIBRARY_PATH'] = str(found)
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # no metadata server is asked for what is attached here: nothing is
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'none')
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')  # no TPU is used, so other processes may load it as well
  from jax.experimental import topologies

  return list(topologies.get_topology_desc(platform='tpu', topology_name=device.tpu.topology).devices)


def compile_for(device: devices.Device, case: Case) -> Any:
  """The case compiled for one such TPU.

  Raises:
    Exception: what the compiler says, as where a kernel needs more vector memory than there is.
  """
  import jax
  import numpy as np

  tpus = topology(device)
  sharding = jax.sharding.SingleDeviceSharding(tpus[0])
  arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), case.arguments)
  # Kernels ask the mesh in context which TPU they are lowered for.
  with jax.sharding.use_abstract_mesh(jax.sharding.Mesh(np.array(tpus[:1]), ('one',)).abstract_mesh):
    traced = jax.jit(case.function, donate_argnums=case.donated).trace(*arguments)
    return traced.lower(lowering_platforms=('tpu',)).compile()


def measure(device: str, function: str, arguments: Mapping[str, Any] | None = None, timeout_s: float = 900) -> Cost:
  """The cost of the case `module:function(**arguments)` on a TPU of that name, found in a process of its own.

  Raises:
    RuntimeError: if the case cannot be built or compiled, with what was said.
  """
  command = [
    sys.executable,
    '-m',
    'pallas_kernels.static_cost',
    f'--device={device}',
    function,
    json.dumps(arguments or {}),
  ]
  failure = ''
  for simulate in (True, False):  # without the simulation there are bundles at least
    process = subprocess.run(
      [*command, f'--simulate={int(simulate)}'],
      capture_output=True,
      text=True,
      timeout=timeout_s,
      env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    )
    if process.returncode == 0:
      return dataclasses.replace(Cost(**json.loads(process.stdout.splitlines()[-1])), failure=failure)
    said = re.findall(r'(?:failed: |[Cc]heck failed: |Error: )(.+)', process.stderr)
    failure = said[0][:500] if said else process.stderr[-500:]
    if process.returncode > 0:
      break  # a refusal, and no abort
  raise RuntimeError(f'{function}({dict(arguments or {})}) on {device}: {failure}')


def _measure_here(device: devices.Device, case: Case, folder: str) -> Cost:
  compiled = compile_for(device, case)
  kernels = _kernels(folder)
  simulated = [kernel for kernel in kernels.values() if kernel.get('cycles') is not None]
  dearest = max(simulated, key=lambda kernel: kernel['cycles']) if simulated else None
  longest = dearest or max(kernels.values(), key=lambda kernel: kernel.get('bundles', 0), default={})
  compute_s, memory_s = case.least_seconds(device)
  return Cost(
    device=device.name,
    cycles=sum(kernel['cycles'] for kernel in simulated) or None,
    bound_cycles=max(compute_s, memory_s) * device.tpu.clock_hz,
    bound_by='compute' if compute_s > memory_s else 'memory',
    kernel_cycles=dearest['cycles'] if dearest else None,
    bundles=longest.get('bundles', 0),
    spills=longest.get('slots', {}).get('VSTORE:SPILL', 0),
    slots=longest.get('shares', {}),
    temp_bytes=compiled.memory_analysis().temp_size_in_bytes,
  )


def _kernels(folder: str) -> dict[str, dict[str, Any]]:
  """The figures that libtpu wrote of each compiled kernel, by name."""
  kernels: dict[str, dict[str, Any]] = {}

  def of(path: str, ending: str) -> dict[str, Any]:
    name = re.sub(rf'^\d+-|-\d+-{ending}.*$', '', os.path.basename(path))
    return kernels.setdefault(name, {})

  for path in glob.glob(f'{folder}/cost/*.textproto'):
    for estimate in _read(path).split('hlo_op_estimate {')[1:]:
      name = re.search(r'hlo_op_name: "([^"]+)"', estimate)
      cycles = re.search(r'estimated_cycles: (-?\d+)', estimate)
      if name and cycles:
        kernels.setdefault(name[1], {})['cycles'] = int(cycles[1])
  for path in glob.glob(f'{folder}/code/*schedule-analysis_final_bundles.txt'):
    bundles = re.search(r'total scheduled bundles:\s+(\d+)', _read(path))
    if bundles:
      of(path, 'schedule')['bundles'] = int(bundles[1])
  for path in glob.glob(f'{folder}/code/*final_hlo-static-per-bundle-utilization.txt'):
    # Lines: a title, the slots' names, how many of each a bundle has, a title, and the bundles.
    _, names, capacity, _, *lines = _read(path).splitlines()
    slots = [name.strip() for name in names.split(',')]
    rows = [list(map(int, line.split())) for line in lines if len(line.split()) == len(slots)]
    totals = [sum(column) for column in zip(*rows, strict=True)]
    kernel = of(path, 'final_hlo')
    kernel['slots'] = dict(zip(slots, totals, strict=False))
    kernel['shares'] = {
      slot: round(100 * total / (int(room) * len(rows)), 1)
      for slot, total, room in zip(slots, totals, capacity.split(), strict=False)
      if total
    }
  return kernels


def _read(path: str) -> str:
  with open(path, encoding='utf-8') as file:
    return file.read()


def main() -> None:
  """Print the cost of one case as a line of JSON."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--device', required=True)
  parser.add_argument('--simulate', type=int, default=1)
  parser.add_argument('function', help='module:function')
  parser.add_argument('arguments', nargs='?', default='{}', help='its keyword arguments as JSON')
  options = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    flags = [f'--xla_jf_dump_to={folder}/code', '--xla_jf_dump_llo_pass_label_regex=.*final_(bundles|hlo).*']
    if options.simulate:
      flags.append(f'--xla_jf_dump_static_llo_profile_to={folder}/cost')
    for name in ('code', 'cost'):
      os.mkdir(f'{folder}/{name}')
    os.environ['LIBTPU_INIT_ARGS'] = ' '.join([os.environ.get('LIBTPU_INIT_ARGS', ''), *flags])
    module, function = options.function.split(':')
    case = getattr(importlib.import_module(module), function)(**json.loads(options.arguments))
    print(json.dumps(dataclasses.asdict(_measure_here(devices.by_name(options.device), case, folder))))


if __name__ == '__main__':
  main()
