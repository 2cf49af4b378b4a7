"""Imports go down and never in a ring, and what decides never loads what computes."""

import ast
import graphlib
import pathlib
import re
import subprocess
import sys

import pytest

from pdjax.serving import view

ROOT = pathlib.Path(__file__).parents[1]
ROOTS = ('pdjax', 'pallas_kernels', 'experiments', 'configs')

LEVELS = {
  'experiments': 8, 'pdjax': 8,
  'pdjax.comparison': 7, 'pdjax.session': 7, 'pdjax.generation': 7,
  'pdjax.launch': 6, 'pdjax.deployment': 6, 'pdjax.opened_model': 6, 'pdjax.completions': 6, 'pdjax.answers': 6,
  'pdjax.reporting': 6, 'pdjax.run_folder': 6, 'pdjax.recording': 6,
  'pdjax.engine': 5, 'pdjax.controller': 5, 'configs': 5,
  'pdjax.config': 4, 'pdjax.overrides': 4, 'pdjax.dtypes': 4,
  'pdjax.policies': 3, 'pdjax.simulator': 3, 'pdjax.standing_run': 3, 'pdjax.metrics': 3, 'pdjax.model': 3,
  'pdjax.kv': 3, 'pdjax.workload': 3,
  'pdjax.serving': 2, 'pdjax.cost': 2, 'pdjax.sharding': 2,
  'pdjax.host': 2,
  'pdjax.types': 1, 'pdjax.program_folder': 1, 'pallas_kernels': 1,
}  # fmt: skip
DECIDES = {
  'pdjax.serving', 'pdjax.policies', 'pdjax.cost', 'pdjax.workload', 'pdjax.metrics', 'pdjax.simulator',
  'pdjax.standing_run', 'pdjax.config',
  'pdjax.overrides', 'pdjax.controller', 'pdjax.dtypes', 'configs',
}  # fmt: skip
COMPUTES = {'pdjax.engine', 'pdjax.model', 'pdjax.kv', 'pdjax.sharding', 'pallas_kernels'}
LONG = {  # files over 500 lines, with the one idea that each holds
  'pdjax.session': 'live use: requests in, streams out, on a thread of its own',
}
JOINS = {  # the two wings, but loads what computes only once that is asked for
  'pdjax.opened_model', 'pdjax.deployment', 'pdjax.completions', 'pdjax.answers', 'pdjax.reporting', 'pdjax.run_folder',
  'pdjax.recording', 'pdjax.launch', 'pdjax.generation', 'pdjax.session', 'pdjax.comparison',
}  # fmt: skip
SEES_BOTH = {
  'pdjax.engine', 'pdjax.opened_model', 'pdjax.deployment', 'pdjax', 'experiments',
}  # fmt: skip


def _module(path: pathlib.Path) -> str:
  """The dotted name of a file."""
  return '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')


FILES = {_module(path): path for root in ROOTS for path in sorted((ROOT / root).rglob('*.py'))}


def _unit(module: str) -> str:
  """The package or file of the drawing that a module belongs to."""
  parts = module.split('.')
  return '.'.join(parts[:2]) if parts[0] == 'pdjax' else parts[0]


def imported(source: str) -> set[str]:
  """Every module that a file's import statements name, wherever in the file they stand."""
  names = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, 'imports are written in full'
      for alias in node.names:
        whole = f'{node.module}.{alias.name}'
        names.add(whole if whole in FILES else node.module)
  return names


IMPORTS = {module: imported(path.read_text(encoding='utf-8')) for module, path in FILES.items()}
OURS = {module: {name for name in names if name.split('.')[0] in ROOTS} for module, names in IMPORTS.items()}


def _of(units: set[str]) -> list[str]:
  return [module for module in FILES if _unit(module) in units]


def test_every_file_has_its_floor():
  assert len(FILES) > 50
  assert {_unit(module) for module in FILES} <= LEVELS.keys()
  assert {'pdjax', *DECIDES, *COMPUTES} <= {_unit(module) for module in FILES}


def test_imports_inside_functions_are_read_too():
  source = 'import a.b\nif x:\n  from c import d\ndef f():\n  import e\n  from pdjax import launch\n'
  assert imported(source) == {'a.b', 'c', 'e', 'pdjax.launch'}


def test_every_import_of_ours_names_a_file():
  for module, names in OURS.items():
    assert names <= FILES.keys(), f'{module} imports {names - FILES.keys()}'


def test_imports_go_down():
  for module, names in OURS.items():
    for name in names:
      assert LEVELS[_unit(module)] >= LEVELS[_unit(name)], f'{module} imports {name} from a higher floor'


@pytest.mark.parametrize('grain', ['packages', 'files'])
def test_imports_make_no_ring(grain):
  graph: dict[str, set[str]] = {}
  for module, names in OURS.items():
    node = _unit(module) if grain == 'packages' else module
    near = {_unit(name) if grain == 'packages' else name for name in names}
    graph.setdefault(node, set()).update(near - {node})
  order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, naming the ring
  assert len(order) == len(graph)


def test_kernels_know_nothing_of_pdjax():
  for module in _of({'pallas_kernels'}):
    assert {_unit(name) for name in OURS[module]} <= {'pallas_kernels'}, module


def test_types_import_nothing_of_ours_and_no_arrays():
  for module in _of({'pdjax.types'}):
    assert {_unit(name) for name in OURS[module]} <= {'pdjax.types'}, module
    assert not {name.split('.')[0] for name in IMPORTS[module]} & {'jax', 'jaxlib', 'flax', 'numpy'}, module


def test_what_decides_never_imports_what_computes():
  for module in _of(DECIDES | {'pdjax.types'}):
    assert not {_unit(name) for name in OURS[module]} & COMPUTES, module
    assert not {name.split('.')[0] for name in IMPORTS[module]} & {'jax', 'jaxlib', 'flax'}, module


def test_only_the_engine_and_what_stands_above_it_see_both_wings():
  for module in FILES:
    seen = {_unit(module), *(_unit(name) for name in OURS[module])}
    if seen & DECIDES and seen & COMPUTES:
      assert _unit(module) in SEES_BOTH, f'{module} sees {sorted(seen & DECIDES)} and {sorted(seen & COMPUTES)}'


def test_a_phase_changes_through_one_function():
  """Which asserts against the table of moves."""
  for module, path in FILES.items():
    stored = [one for one in ast.walk(ast.parse(path.read_text(encoding='utf-8'))) if isinstance(one, ast.Attribute)]
    changed = [one for one in stored if one.attr == 'phase' and isinstance(one.ctx, ast.Store)]
    assert len(changed) == (module == 'pdjax.serving.requests'), module


def test_policies_see_the_cluster_through_its_view_alone():
  for module in _of({'pdjax.policies'}):
    seen = {name for name in OURS[module] if _unit(name) == 'pdjax.serving'}
    assert seen <= {f'pdjax.serving.{name}' for name in ('actions', 'view', 'checks')}, f'{module} imports {seen}'
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding='utf-8'))):
      if isinstance(node, ast.ImportFrom) and node.module == 'pdjax.serving.view':
        assert {alias.name for alias in node.names} <= set(view.__all__), f'{module} reaches through the view'


def calls_inside(source: str) -> dict[str, set[str]]:
  """Which functions and methods of a file each of them calls, itself aside; methods where called on `self`."""
  tree = ast.parse(source)
  functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
  classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
  methods = {
    f'{one.name}.{node.name}': (one.name, node)
    for one in classes
    for node in one.body
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
  }
  names = {*functions, *methods}
  made = {one.name: f'{one.name}.__init__' for one in classes}

  def called(node: ast.AST, owner: str) -> set[str]:
    found = set()
    for one in ast.walk(node):
      if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Load):
        found.add(made.get(one.id, one.id))
      elif isinstance(one, ast.Attribute) and isinstance(one.value, ast.Name) and one.value.id in ('self', 'cls'):
        found.add(f'{owner}.{one.attr}')
    return found & names

  graph = {name: called(node, '') - {name} for name, node in functions.items()}
  return graph | {name: called(node, owner) - {name} for name, (owner, node) in methods.items()}


def test_calls_inside_a_file_are_found():
  source = """
def f():
  return [g for _ in A().x]
def g(): f()
class A:
  def __init__(self): self._m()
  async def _m(self):
    g()
    return self._m
"""
  assert calls_inside(source) == {'f': {'g', 'A.__init__'}, 'g': {'f'}, 'A.__init__': {'A._m'}, 'A._m': {'g'}}


@pytest.mark.parametrize('module', _of({'pdjax.serving'}))
def test_what_stands_in_a_file_of_the_books_calls_each_other_in_no_ring(module):
  """A call of itself is none."""
  graph = calls_inside(FILES[module].read_text(encoding='utf-8'))
  assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(graph)  # raises CycleError


def test_no_class_of_the_books_has_more_than_25_methods():
  counts = {
    f'{module}.{node.name}': sum(isinstance(one, ast.FunctionDef) for one in node.body)
    for module in _of({'pdjax.serving'})
    for node in ast.parse(FILES[module].read_text(encoding='utf-8')).body
    if isinstance(node, ast.ClassDef)
  }
  assert max(counts.values()) > 10 and {name: count for name, count in counts.items() if count > 25} == {}


def test_long_files_hold_one_idea_each():
  """Of `pdjax/`, over 500 lines; the state, which only hands on, stays under 300."""
  lines = {module: path.read_text(encoding='utf-8').count('\n') for module, path in FILES.items()}
  long = {module for module, count in lines.items() if count > 500 and module.split('.')[0] == 'pdjax'}
  assert long == LONG.keys()
  assert lines['pdjax.serving.state'] < 300


def test_the_engine_takes_no_decisions():
  told = {f'pdjax.serving.{name}' for name in ('orders', 'batch', 'bounds', 'events', 'mailbox', 'built', 'peers')}
  sizes = {'pdjax.cost.memory', 'pdjax.cost.granularity', 'pdjax.cost.roofline', 'pdjax.dtypes'}
  for module in _of({'pdjax.engine'}):
    seen = {name for name in OURS[module] if _unit(name) in DECIDES}
    assert seen <= {*told, 'pdjax.config', *sizes}, f'{module} imports {seen}'


@pytest.mark.parametrize(('one', 'other'), [('pdjax.engine', 'pdjax.controller'), ('pdjax.controller', 'pdjax.engine')])
def test_engine_and_controller_do_not_know_each_other(one, other):
  assert _of({one})
  for module in _of({one}):
    assert other not in {_unit(name) for name in OURS[module]}, module


def test_the_face_hands_out_what_it_says_and_from_where_it_says():
  import pdjax

  assert sorted(pdjax.__all__) == dir(pdjax)
  said = ast.parse(FILES['pdjax'].read_text())
  checked = next(node for node in said.body if isinstance(node, ast.If) and 'TYPE_CHECKING' in ast.unparse(node.test))
  for node in ast.walk(checked):  # what type checkers see is what is found
    if isinstance(node, ast.ImportFrom):
      for alias in node.names:
        assert alias.name in pdjax.__all__ and pdjax._HOME_OF[alias.name] == node.module
  assert len(pdjax._HOME_OF) == len(pdjax.__all__) == sum(len(names) for names in pdjax._HOMES.values())
  with pytest.raises(AttributeError, match="has no attribute 'Confg'"):
    pdjax.Confg  # noqa: B018


def _fresh(code: str) -> set[str]:
  """Run code in a fresh interpreter; the names of the top-level modules it loaded."""
  code += '\nimport sys\nprint("LOADED", *{name.split(".")[0] for name in sys.modules})'
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  return set(re.search('^LOADED (.*)$', done.stdout, re.MULTILINE)[1].split())


def test_a_simulation_never_loads_jax():
  loaded = _fresh("""
import pdjax
config = pdjax.ServingConfig(
  model=pdjax.ModelSpec.llama3_8b(),
  workers=pdjax.prefill_pool(2, tp=4) + pdjax.decode_pool(1, tp=4),
  policy=pdjax.Disaggregated(max_prefill_tokens=1024),
  workload=pdjax.Poisson(requests_per_s=4, num_requests=5, prompt=pdjax.Fixed(300), output=pdjax.Uniform(2, 9)),
  dtype='bfloat16',
  cost=pdjax.Roofline(pdjax.ChipSpec.tpu_v5e(), pdjax.LinkSpec(45e9)),
)
result = pdjax.simulate(config)
assert result.report.completed == 5 and result.report.num_transfers > 0
assert len(result.completions[0].token_ids) >= 2
""")
  assert 'pdjax' in loaded and not loaded & {'jax', 'jaxlib', 'flax', 'pallas_kernels'}


def test_every_module_that_decides_loads_without_jax():
  units = DECIDES | JOINS | {'pdjax.types'}
  loaded = _fresh('\n'.join(f'import {module}' for module in _of(units)))
  assert 'numpy' in loaded and not loaded & {'jax', 'jaxlib', 'flax', 'pallas_kernels'}


def test_the_controller_of_other_processes_loads_without_jax():
  modules = [*_of({'pdjax.controller', 'pdjax.host', 'pdjax.program_folder'}), 'pdjax.engine.ray_worker']
  loaded = _fresh('\n'.join(f'import {module}' for module in modules))
  assert 'psutil' not in loaded and not loaded & {'jax', 'jaxlib', 'flax', 'pallas_kernels', 'ray'}


def test_importing_pdjax_loads_nothing_else():
  loaded = _fresh('import pdjax')
  assert not loaded & {'jax', 'jaxlib', 'flax', 'numpy', 'rich'}
