"""The speed of the simulator in one process: what a run in virtual time serves, and the CPU time that it takes."""


def serve_simulated(workers: int, rate: float, requests: int, clusters: int = 1) -> dict[str, float]:
  """Serve requests in virtual time; it runs in any tree since e9048ce, and so names nothing of this file.

  Args:
    workers: Workers of a cluster.
    rate: Requests a second for each pair of them.
    requests: Requests of a cluster.
    clusters: Clusters that are served one after another, each with requests of its own.

  Returns:
    `tokens`, all but the first of each request; `cpu_s`; `batch`, the sequences of a decode worker on average over the
    time that it has any; `finished`, the requests that ended well.
  """
  import dataclasses
  import gc
  import importlib
  import pathlib
  import runpy
  import tempfile
  import time
  from collections.abc import Callable, Iterable
  from typing import Any

  from pdjax.metrics import EventLog
  from pdjax.workload import Lognormal

  def in_parts(config: Any, log: EventLog) -> Callable[[], Iterable[Any]]:
    """The events of `simulate`, as the tree of e9048ce makes them: it has no deployment in virtual time."""
    launch: Any = importlib.import_module('pdjax.launch')
    opened = launch.open_model(config)
    arrivals = launch._arrivals(config, opened)
    sized, _ = launch.size_simulated(config, opened.model)
    cost = dataclasses.replace(config.cost, dtype_bytes=config.dtype_bytes)
    transfer = launch.choose_granularity(config.transfer, opened.model, sized, cost)
    state = launch.ClusterState(opened.model, sized, config.page_size, transfer, faults=config.faults)
    simulator = launch.Simulator(opened.model, sized, cost, arrivals.output_len)

    def events() -> Iterable[Any]:
      for event in launch.serve(arrivals, config.policy, simulator, state):
        log.append(event)
        yield event

    return events

  def deployed(config: Any, log: EventLog) -> Callable[[], Iterable[Any]]:
    deployment: Any = importlib.import_module('pdjax.deployment')
    opened = importlib.import_module('pdjax.opened_model').open_model(config)
    arrivals = opened.arrivals(config)
    cluster = deployment.deploy(config, opened, 'simulator')
    return lambda: cluster.serve(arrivals, log)

  prepare = deployed if pathlib.Path('pdjax/deployment.py').exists() else in_parts
  pairs = workers // 2
  get_config = runpy.run_path('configs/llama3_8b_simulated.py')['get_config']
  config = get_config(split=f'{pairs}P{pairs}D', requests_per_s=rate * pairs, num_requests=requests)
  tokens, finished, cpu_s, busy_s, sequences_s = 0, 0, 0.0, 0.0, 0.0
  for seed in range(clusters):
    lengths = {'prompt': Lognormal(835, 0.6), 'output': Lognormal(167, 0.6)}
    workload = dataclasses.replace(config.workload, seed=seed, **lengths)
    ends, uses = [], []
    with tempfile.TemporaryDirectory() as folder, EventLog(pathlib.Path(folder) / 'events.jsonl', keep=False) as log:
      events = prepare(dataclasses.replace(config, workload=workload), log)
      gc.collect()
      began_s = time.process_time()
      for event in events():
        kind = type(event).__name__
        if kind == 'Finished':
          ends.append(event)
        elif kind == 'Occupancy':
          uses.append(event)
      log.close()
      cpu_s += time.process_time() - began_s
      assert not getattr(log, 'notes', ()), f'the log is incomplete: {log.notes}'
    well = [end for end in ends if end.finish_reason == 'length']
    finished += len(well)
    tokens += sum(len(end.tokens) - 1 for end in well)
    decoding: dict[str, tuple[float, int]] = {}  # since when, and how many sequences
    for occupancy in uses:
      for use in occupancy.workers:
        since_s, count = decoding.get(use.worker, (0.0, 0))
        busy_s += (occupancy.now_s - since_s) * (count > 0)
        sequences_s += (occupancy.now_s - since_s) * count
        decoding[use.worker] = occupancy.now_s, use.decoding
  return {'tokens': tokens, 'cpu_s': cpu_s, 'batch': sequences_s / busy_s, 'finished': finished}


def check_equal(answers: list[dict[str, float]], requests: int) -> None:
  """Raise RuntimeError if some run has not served all requests, or another number of tokens than the others."""
  served = {(answer['finished'], answer['tokens']) for answer in answers}
  if len(served) > 1 or answers[0]['finished'] != requests:
    raise RuntimeError(f'runs served {sorted(served)} requests and tokens, expected {requests} and the same in all.')


def speed(answer: dict[str, float]) -> float:
  """Million decode tokens a CPU second."""
  return answer['tokens'] / answer['cpu_s'] / 1e6
