"""Careless input is refused where it is made, in words of our own: what was found, what was expected, what to change.

A table has one of each sort; a generator tries values of the wrong sort in every field of every class that checks.
"""

import dataclasses
import importlib
import importlib.util
import inspect
import math
import pathlib
import pkgutil
import re

import numpy as np
import pytest

import pdjax
from pdjax.comparison import with_split
from pdjax.deployment import deploy
from pdjax.overrides import apply_overrides
from pdjax.policies import FewestQueuedTokens
from pdjax.types import (
  CacheArray,
  CacheKind,
  FaultSpec,
  RayCluster,
  RopeScaling,
  TransferSpec,
  checked,
  colocated_pool,
  fitting,
  parse_split,
)
from pdjax.types.model import GQA, MLA, Experts, Gated, Plain
from pdjax.workload import (
  BlockTokens,
  Chat,
  Chats,
  ChatTurn,
  ClosedLoop,
  Listed,
  RandomTokens,
  TraceWorkload,
  read_trace,
)
from tests import tiny

CONFIG = dataclasses.replace(tiny.config(), checkpoint=None)
REQUEST = pdjax.Request('r', (2, 3))
NAN = math.nan


def config(**fields):
  return lambda: dataclasses.replace(CONFIG, **fields)


def worker(**fields):
  return lambda: pdjax.WorkerSpec('w', **fields)


def sampling(**fields):
  return lambda: pdjax.SamplingParams(**fields)


def model(**fields):
  return lambda: dataclasses.replace(tiny.TINY, **fields)


def simulated(**fields):
  return lambda: pdjax.simulate(dataclasses.replace(CONFIG, **fields))


# A name, the input, and what is said of it.
CARELESS = [
  # configs
  ('a class for a policy', config(policy=pdjax.Disaggregated), r'policy is .*pass Disaggregated\(\.\.\.\), not the cl'),
  ('a policy by name', config(policy='Disaggregated'), "policy is 'Disaggregated', expected a Policy"),
  ('no policy', config(policy=None), 'policy is None, expected a Policy'),
  ('a list for a workload', config(workload=[REQUEST]), r'ready requests are Given\(requests\)'),
  ('a class in a list for a workload', config(workload=[pdjax.Request]), 'workload is .*expected a Workload'),
  ('a class for a workload', config(workload=pdjax.Poisson), r'pass Poisson\(\.\.\.\), not the class'),
  ('a dict of limits', config(slo={'ttft_ms': 5}), r"slo is \{'ttft_ms': 5\}, .*pass SLO\(\*\*fields\)"),
  ('limits as text', config(slo='ttft:500'), r"slo is 'ttft:500', expected SLO\(\.\.\.\)"),
  ('one worker for all', config(workers=pdjax.WorkerSpec('w')), 'workers is WorkerSpec.*expected a tuple of WorkerSpe'),
  ('a split for workers', config(workers='1P1D'), "workers is '1P1D', expected a tuple of WorkerSpec"),
  ('a number for workers', config(workers=2), 'workers is 2, expected a tuple of WorkerSpec'),
  ('a role for a worker', config(workers=('prefill', 'decode')), r"workers\[0\] is 'prefill', expected WorkerSpec"),
  ('a model by name', config(model='llama'), r"model is 'llama', expected ModelSpec\(\.\.\.\) or None"),
  ('a method for a model', config(model=pdjax.ModelSpec.llama3_8b), 'model is .*expected ModelSpec'),
  ('a checkpoint that is a number', config(checkpoint=5), 'checkpoint is 5, expected a text, or None'),
  ('a page size as text', config(page_size='16'), "page_size is '16', expected an integer, at least 1 token"),
  ('half a page', config(page_size=0.5), 'page_size is 0.5, expected an integer'),
  ('a truth value for a page size', config(page_size=True), 'page_size is True, expected an integer'),
  ('a dtype of NumPy', config(dtype=np.float32), "dtype is .*expected one of 'auto', 'float32'"),
  ('a dtype in short', config(dtype='fp16'), "dtype is 'fp16', expected one of 'auto', 'float32'"),
  ('a cache dtype in short', config(kv_dtype='fp8'), "kv_dtype is 'fp8', expected one of 'float32'"),
  ('a context of nothing', config(max_context=0), 'max_context is 0, expected at least 1 token, or None'),
  ('a dict for transfers', config(transfer={'checksums': True}), r'transfer is .*pass TransferSpec\(\*\*fields\)'),
  ('no transfers', config(transfer=None), r'transfer is None, expected TransferSpec\(\.\.\.\)'),
  ('a class for faults', config(faults=FaultSpec), r'pass FaultSpec\(\.\.\.\), not the class'),
  ('a chip for costs', config(cost=pdjax.ChipSpec.h100()), 'cost is ChipSpec.*expected a CostModel'),
  ('a class for costs', config(cost=pdjax.Roofline), r'pass Roofline\(\.\.\.\), not the class'),
  ('processes as a flag', config(processes=True), r'processes is True, expected RayCluster\(\.\.\.\) or None'),
  ('a platform that is a number', config(platform=0), 'platform is 0, expected a text, or None'),
  ('a cache folder of no name', config(compilation_cache=''), "compilation_cache is '', expected a folder, or 'off'"),
  ('a cache as a flag', config(compilation_cache=True), "compilation_cache is True, expected a folder, or 'off'"),
  ('a seed below 0', config(seed=-1), 'seed is -1, expected an integer from 0'),
  ('a seed of luck', config(seed='lucky'), "seed is 'lucky', expected an integer"),
  # workers
  ('devices as text', worker(tp='2'), "worker 'w' has tp='2', expected an integer, at least 1"),
  ('half a device', worker(tp=1.5), "worker 'w' has tp=1.5, expected an integer"),
  ('no device', worker(tp=0), "worker 'w' has tp=0, expected at least 1"),
  ('a role that is none', worker(role='decoder'), "role='decoder', expected one of 'prefill', 'decode', 'both'"),
  ('one role bare', worker(may_become='decode'), r"tuple of Role, each one of 'prefill', .*; write \('decode',\)"),
  ('a role to become that is none', worker(may_become=('decoder',)), r"may_become\[0\]='decoder', expected one of"),
  ('no roles to become', worker(may_become=None), 'may_become=None, expected a tuple of Role'),
  ('pages as text', worker(num_pages='64'), "num_pages='64', expected a positive count or 'auto'"),
  ('pages by a flag', worker(num_pages=True), "num_pages=True, expected a positive count or 'auto'"),
  ('no pages', worker(num_pages=None), "num_pages=None, expected a positive count or 'auto'"),
  ('sequences below one', worker(max_sequences=-8), 'max_sequences=-8, expected at least 1'),
  ('a budget of infinity', worker(max_step_tokens=math.inf), 'max_step_tokens=inf, expected an integer'),
  ('one device bare', worker(devices=0), 'devices=0, expected a tuple of '),
  ('devices in a text', worker(tp=2, devices='01'), "devices='01', expected a tuple of "),
  ('a device below 0', worker(devices=(-1,)), r'devices\[0\]=-1, expected a number from 0'),
  ('a device far away', worker(devices=(10**12,)), r'devices\[0\]=1000000000000, expected a number from 0 to 16383'),
  ('a layout that is none', worker(page_layout='packed'), "page_layout='packed', expected one of 'auto'"),
  ('weights in int8', worker(weights='int8'), "weights='int8', expected one of 'float32', 'bfloat16', 'float16', or N"),
  ('a worker without a name', lambda: pdjax.WorkerSpec(None), 'name=None, expected a text'),
  ('a count of workers as text', lambda: pdjax.prefill_pool('2'), r"prefill_pool\(\) is given count='2', expected an"),
  ('fewer than no workers', lambda: pdjax.decode_pool(-1), r'decode_pool\(\) is given count=-1, expected from 0'),
  ('a billion workers', lambda: colocated_pool(10**9), r'colocated_pool\(\) is given count=1000000000, expected from'),
  ('a split that is a pair', lambda: parse_split((1, 2)), r'parse_split\(\) is given split=\(1, 2\), expected a text'),
  ('a split of another config', lambda: with_split(5, '1P1D'), r'with_split\(\) is given config=5, expected ServingCo'),
  # chips and links, transfers and faults, processes
  ('a latency below 0', lambda: pdjax.LinkSpec(latency_s=-5), 'LinkSpec has latency_s=-5, expected 0 or more seconds'),
  ('a link of no speed', lambda: pdjax.LinkSpec('fast'), "LinkSpec has bytes_per_s='fast', expected a positive number"),
  (
    'an efficiency over 1',
    lambda: pdjax.ChipSpec('c', 1e12, 1e9, 1e9, matmul_efficiency=5),
    "ChipSpec 'c' has matmul_efficiency=5, expected a share above 0, at most 1",
  ),
  ('a rate of NaN', lambda: pdjax.ChipSpec('c', NAN, 1e9, 1e9), "ChipSpec 'c' has flops_per_s=nan, expected a positiv"),
  ('memory as text', lambda: pdjax.ChipSpec('c', 1e12, 1e9, '80 GB'), "memory_bytes='80 GB', expected a number, 0"),
  ('measured by a word', lambda: pdjax.ChipSpec('c', 1e12, 1e9, 1e9, calibrated='yes'), "calibrated='yes', expected T"),
  ('a method for a chip', lambda: pdjax.Roofline(pdjax.ChipSpec.h100), r'Roofline has chip=.*expected ChipSpec'),
  ('bytes of a dtype by name', lambda: pdjax.Roofline(dtype_bytes='bfloat16'), "dtype_bytes='bfloat16', expected an i"),
  ('checksums by a word', lambda: TransferSpec(checksums='no'), "transfer.checksums is 'no', expected True or False"),
  ('a deadline of None', lambda: TransferSpec(deadline_s=None), 'deadline_s is None, expected a number, more than 0'),
  ('a way that is none', lambda: TransferSpec('nccl'), "transfer.transport is 'nccl', expected one of 'auto'"),
  ('groups of layers in a float', lambda: TransferSpec(layer_groups=4.0), 'layer_groups is 4.0, expected an integer'),
  ('attempts without end', lambda: FaultSpec(max_attempts=math.inf), 'faults.max_attempts is inf, expected an integer'),
  ('a pause as text', lambda: FaultSpec(backoff_s='1s'), "faults.backoff_s is '1s', expected a number, 0 or more"),
  ('a port as an address', lambda: RayCluster(6379), 'processes.address is 6379, expected a text, or None'),
  ('cores by a word', lambda: RayCluster(cpus='all'), "processes.cpus is 'all', expected a number, more than 0 cores"),
  ('silence of NaN', lambda: RayCluster(silence_s=NAN), 'processes.silence_s is nan, expected more than 0 seconds'),
  # requests
  ('a text for a prompt', lambda: pdjax.Request('a', 'hi'), "request 'a' has prompt='hi', .*; tokenize it first"),
  ('bytes for a prompt', lambda: pdjax.Request('a', b'hi'), "prompt=b'hi', expected a sequence of token ids"),
  ('a token that is a float', lambda: pdjax.Request('a', [72.9]), r'prompt\[0\]=72.9, expected a token id'),
  ('a token that is a text', lambda: pdjax.Request('a', (1, 'b')), r"prompt\[1\]='b', expected a token id"),
  ('a token below 0', lambda: pdjax.Request('a', (1, 2, -3)), r'prompt\[2\]=-3, expected a token id'),
  ('a token that is None', lambda: pdjax.Request('a', [None]), r'prompt\[0\]=None, expected a token id'),
  ('prompts of two rows', lambda: pdjax.Request('a', np.ones((2, 3), np.int32)), 'prompt=array.*expected a sequence o'),
  ('a prompt of floats', lambda: pdjax.Request('a', np.ones(3)), 'prompt=array.*expected a sequence of token ids'),
  ('a prompt of nothing', lambda: pdjax.Request('a', []), r'prompt=\[\], expected at least one token; give it some te'),
  ('no prompt', lambda: pdjax.Request('a', None), 'prompt=None, expected a sequence of token ids'),
  ('a set for a prompt', lambda: pdjax.Request('a', {1, 2}), 'prompt={1, 2}, expected a sequence of token ids'),
  ('an id that is a number', lambda: pdjax.Request(7, (1,)), 'id=7, expected a text'),
  ('a dict of sampling', lambda: pdjax.Request('a', (1,), {'n': 2}), r'sampling=.*pass SamplingParams\(\*\*fields\)'),
  ('an arrival as text', lambda: pdjax.Request('a', (1,), arrival_s='now'), "arrival_s='now', expected a number, 0 or"),
  ('an arrival that never is', lambda: pdjax.Request('a', (1,), arrival_s=math.inf), 'arrival_s=inf, expected 0 or la'),
  ('ends by a word', sampling(ignore_eos='no'), "SamplingParams.ignore_eos is 'no', expected True or False"),
  ('ends by a number', sampling(ignore_eos=1), 'ignore_eos is 1, expected True or False'),
  ('a stop that is one text', sampling(stop='END'), r"stop is 'END', expected a tuple of texts; write \('END',\)"),
  ('a stop token bare', sampling(stop_token_ids=2), 'stop_token_ids is 2, expected a tuple of token ids'),
  ('stop tokens as texts', sampling(stop_token_ids=('</s>',)), r"stop_token_ids\[0\] is '</s>', expected a token id"),
  ('a temperature below 0', sampling(temperature=-1), r'temperature is -1, expected 0 \(greedy\)'),
  ('a temperature as text', sampling(temperature='0.7'), "temperature is '0.7', expected a number"),
  ('tokens in a float', sampling(max_tokens=64.0), 'max_tokens is 64.0, expected an integer'),
  ('log probabilities by a flag', sampling(logprobs=True), 'logprobs is True, expected an integer'),
  ('a share over 1', sampling(top_p=90), 'top_p is 90, expected a number above 0 and at most 1'),
  ('samples without end', sampling(n=10**6), 'n is 1000000, expected 1 to 1024 samples'),
  ('a limit below 0', lambda: pdjax.SLO(ttft_ms=-1), 'SLO.ttft_ms is -1, expected a positive number of milliseconds'),
  ('a limit as text', lambda: pdjax.SLO('500ms'), "SLO.ttft_ms is '500ms', expected a positive number"),
  # models and their parts
  ('layers as text', model(num_layers='2'), "model 'tiny' has num_layers='2', expected an integer of at least 1"),
  ('heads without end', model(query_heads=10**12), "model 'tiny': GQA has query_heads=1000000000000, expected at most"),
  ('one end bare', model(eos_token_ids=2), 'eos_token_ids=2, expected a tuple of integers'),
  ('a scaling by name', model(rope_scaling='linear'), r"rope_scaling='linear', expected RopeScaling\(\.\.\.\) or None"),
  ('a class for attention', model(attention=GQA), r'attention=.*pass GQA\(\.\.\.\), not the class'),
  ('a part in the wrong place', model(ffn=GQA(6, 2, 8)), r'ffn=GQA.*expected Gated\(\.\.\.\), Plain'),
  ('tied by a word', model(tied_embeddings='yes'), "tied_embeddings='yes', expected True or False"),
  ('a factor as text', lambda: RopeScaling('linear', '2'), "RopeScaling has factor='2', expected a positive number"),
  ('experts in a float', lambda: Experts(8.0, 2, 4), 'Experts has count=8.0, expected an integer of at least 1'),
  ('a width below 0', lambda: Gated(-4), 'Gated has dim=-4, expected an integer of at least 1'),
  ('a width of None', lambda: Plain(None), 'Plain has dim=None, expected an integer of at least 1'),
  ('a rank as text', lambda: MLA(2, 'low', 4, 4, 4, 4), "MLA has query_rank='low', expected an integer of at least 1"),
  ('a shape that is a number', lambda: CacheArray('a', 4), "cache array 'a' has shape=4, expected a tuple of"),
  ('layers by a word', lambda: CacheKind('k', 'all', ()), "cache kind 'k' has layers='all', expected a tuple of"),
  # workloads
  ('one text for prompts', lambda: pdjax.Poisson(prompts='text'), r"prompts='text', expected .*; write \('text',\)"),
  ('prompts that are tokens', lambda: pdjax.Poisson(prompts=((1, 2),)), r'prompts\[0\]=\(1, 2\), expected a text'),
  ('a rate as text', lambda: pdjax.Poisson(requests_per_s='4'), "Poisson has requests_per_s='4', expected a positive"),
  ('requests in a float', lambda: pdjax.Constant(num_requests=1e3), 'num_requests=1000.0, expected an integer'),
  ('a length that is a number', lambda: pdjax.Poisson(prompt=256), 'Poisson has prompt=256, expected a Length'),
  ('a class for a length', lambda: pdjax.Bursty(output=pdjax.Fixed), r'output=.*pass Fixed\(\.\.\.\), not the class'),
  ('a burst as text', lambda: pdjax.Bursty(burstiness='high'), "burstiness='high', expected a positive number"),
  ('users below one', lambda: pdjax.ClosedLoopWorkload(max_concurrency=0), 'max_concurrency=0, expected at least 1; w'),
  ('thought as text', lambda: pdjax.ClosedLoopWorkload(think_s='1'), r"think_s='1', expected a number, 0 \(no pause\)"),
  ('turns that are a number', lambda: pdjax.MultiTurn(turns=4), 'MultiTurn has turns=4, expected a Length'),
  ('a context below 0', lambda: pdjax.MultiTurn(max_context=-5), 'max_context=-5, expected at least 1, or None'),
  ('tokens as text', lambda: pdjax.Fixed('7'), "Fixed has tokens='7', expected an integer of at least 1 token"),
  ('a range as text', lambda: pdjax.Uniform('1', 5), "Uniform has low='1', expected an integer"),
  ('a median of NaN', lambda: pdjax.Lognormal(NAN, 1), 'median=nan, expected a positive number of tokens'),
  ('a length that was never seen', lambda: pdjax.Empirical('5'), "Empirical has samples='5', expected a tuple of"),
  ('a class for a request', lambda: pdjax.Given([pdjax.Request]), r'requests\[0\]=.*pass Request\(\.\.\.\), not the c'),
  ('one request bare', lambda: pdjax.Given(REQUEST), 'Given has requests=Request.*expected a tuple of Request'),
  ('a length below 0', lambda: RandomTokens(-1, 5), 'RandomTokens has length=-1, expected at least 0'),
  ('a turn in words', lambda: ChatTurn('hi'), "ChatTurn has user='hi', .*; tokenize it first"),
  ('a chat without turns', lambda: Chat('c', (1,)), r'turns\[0\]=1, expected ChatTurn\(\.\.\.\)'),
  ('users as text', lambda: ClosedLoop([REQUEST], '2'), r"ClosedLoop\(\) is given max_concurrency='2', expected an in"),
  ('chats that are requests', lambda: Chats([REQUEST], 99), r'Chats\(\) is given chats\[0\]=Request.*expected Chat\('),
  ('a trace by number', lambda: TraceWorkload(path=7), 'TraceWorkload has path=7, expected a text'),
  ('a format of its own', lambda: TraceWorkload(path='a', format='csv'), "format='csv', expected one of 'mooncake'"),
  ('a pace of 0', lambda: TraceWorkload(path='a', rate=0), 'TraceWorkload has rate=0, expected a positive number'),
  ('a trace of None', lambda: read_trace(None), r'read_trace\(\) is given path=None, expected a text or a PathLike'),
  ('a share of nothing', lambda: pdjax.Share(pdjax.Poisson(), 0, 'a'), 'has share=0, expected a positive number'),
  ('a class of no name', lambda: pdjax.Share(pdjax.Poisson(), 1, ''), "class_name='', expected a text that is not"),
  ('a class of two', lambda: pdjax.Share(pdjax.Poisson(), 1, 'a/b'), "class_name='a/b', expected a text .*without '/'"),
  ('a list in a share', lambda: pdjax.Share([REQUEST], 1, 'a'), r'has workload=.*ready requests are Given\(req'),
  ('a part bare', lambda: pdjax.Mix((pdjax.Poisson(),)), r'Mix has parts\[0\]=Poisson.*expected Share\(\.\.\.\)'),
  ('a mix of nothing', lambda: pdjax.Mix(()), r'Mix has parts=\(\), expected .*at least one'),
  ('a phase of no time', lambda: pdjax.Phase(pdjax.Poisson(), 0), 'Phase has seconds=0, expected a positive'),
  ('a phase as a pair', lambda: pdjax.Phases(((pdjax.Poisson(), 5),)), r'phases\[0\]=.*expected Phase\('),
  ('a class that is a number', lambda: pdjax.Request('a', (1,), class_name=7), "'a' has class_name=7, expected a text"),
  ('a priority by name', lambda: pdjax.Request('a', (1,), priority='high'), "has priority='high', expected an integer"),
  ('a deadline gone by', lambda: pdjax.Request('a', (1,), deadline_s=-1), 'deadline_s=-1, expected a positive number'),
  ('a list of nothing', lambda: Listed(None), r'Listed\(\) is given requests=None, expected a list of Request'),
  # policies
  ('no decode steps', lambda: pdjax.Disaggregated(decode_steps=0), 'Disaggregated has decode_steps=0, expected at lea'),
  ('a budget as text', lambda: pdjax.Colocated(token_budget='256'), "token_budget='256', expected an integer, at leas"),
  ('a placement by name', lambda: pdjax.Disaggregated(place_decode='first'), "place_decode='first', expected a Placem"),
  ('a class for a placement', lambda: pdjax.Colocated(placement=FewestQueuedTokens), r'pass FewestQueuedTokens\('),
  # functions
  ('a path for a config', lambda: pdjax.run('config.py'), r"run\(\) is given config='config.py', expected ServingConf"),
  ('nothing to simulate', lambda: pdjax.simulate(None), r'simulate\(\) is given config=None, expected ServingConfig'),
  ('a report to nobody', lambda: pdjax.simulate(CONFIG, say='loud'), r"simulate\(\) is given say='loud', expected a f"),
  ('a folder as a flag', lambda: pdjax.simulate(CONFIG, workdir=True), r'simulate\(\) is given workdir=True, expected'),
  ('rates in a text', lambda: pdjax.compare(CONFIG, rates='1,2'), r"compare\(\) is given rates='1,2', expected a list"),
  ('a rate that is none', lambda: pdjax.compare(CONFIG, rates=(1, 'x')), r"compare\(\) is given rates\[1\]='x', expec"),
  ('one split', lambda: pdjax.compare(CONFIG, splits='2P1D'), r"splits='2P1D', expected .*; write \('2P1D',\)"),
  ('a budget of nothing', lambda: pdjax.compare(CONFIG, budgets=[0]), r'budgets\[0\]=0, expected at least 1'),
  ('a backend that is none', lambda: pdjax.compare(CONFIG, backend='tpu'), "backend='tpu', expected one of 'engine'"),
  ('a deployment of nothing', lambda: deploy(CONFIG, None), r'deploy\(\) is given opened=None, expected OpenedModel\('),
  ('one prompt', lambda: pdjax.generate('hi'), r"prompts is the text 'hi', expected a list of prompts; write \['hi'\]"),
  ('a number of prompts', lambda: pdjax.generate(5), 'prompts is 5, expected a list of prompts'),
  ('prompts by name', lambda: pdjax.generate({'a': 'hi'}), "prompts is {'a': 'hi'}, expected a list of prompts"),
  ('sampling in a dict', lambda: pdjax.generate(['hi'], CONFIG, {'n': 2}), r'sampling=.*pass SamplingParams\(\*\*fiel'),
  ('a seed as text', lambda: pdjax.generate(['hi'], CONFIG, seed='7'), "seed='7', expected an integer from 0"),
  ('a prompt of None', lambda: pdjax.generate([None], CONFIG), 'prompt 0: the prompt is None, expected a text'),
  ('a session of a path', lambda: pdjax.Session('smollm2'), r"Session\(\) is given config='smollm2', expected Serving"),
  ('events by a word', lambda: pdjax.Session(keep_events='no'), "keep_events='no', expected True or False"),
  ('a log by another name', lambda: pdjax.simulate(CONFIG, log='x'), r"log='x', expected one of 'full', 'summary'"),
  ('events of yes', lambda: pdjax.simulate(CONFIG, keep_events='yes'), "keep_events='yes', expected True or False"),
  ('a log of nothing', lambda: pdjax.run(CONFIG, log=None), r"run\(\) is given log=None, expected one of 'full'"),
  ('a session with half a log', lambda: pdjax.Session(log='half'), r"Session\(\) is given log='half', expected one of"),
  ('a comparison without a log', lambda: pdjax.compare(CONFIG, log='off'), "log='off', expected one of 'full', 'sum"),
  ('a checkpoint by number', lambda: pdjax.load(5), r'open_checkpoint\(\) is given path=5, expected a text'),
  ('one override', lambda: apply_overrides(CONFIG, 'page_size=8'), r"overrides='page_size=8', .*; write \('page_size="),
  # sizes, with what they would take and what there is
  (
    'sequences without end',
    simulated(model=pdjax.ModelSpec.smollm2_135m(), workers=colocated_pool(1, max_sequences=100_000)),
    r'max_sequences=100000, which takes at least [\d.]+ GB .* [\d.]+ GB are left',
  ),
  (
    'requests without end',
    simulated(workload=pdjax.Poisson(num_requests=10**8, prompt=pdjax.Fixed(3), output=pdjax.Fixed(2))),
    r'num_requests=100000000, which takes at least 60 GB of memory, but [\d.]+ GB are free here',
  ),
  (
    'chats without end',
    simulated(workload=pdjax.MultiTurn(num_chats=10**9, prompt=pdjax.Fixed(3), output=pdjax.Fixed(2))),
    r'num_chats=1000000000, which takes at least 600 GB of memory',
  ),
]  # fmt: skip


def test_there_is_much_in_the_table():
  names = [name for name, _, _ in CARELESS]
  assert len(set(names)) == len(names) >= 120


@pytest.mark.parametrize(('make', 'words'), [pytest.param(make, words, id=name) for name, make, words in CARELESS])
def test_careless_input_is_refused_by_name(make, words):
  with pytest.raises(ValueError) as error:
    make()
  assert re.search(words, str(error.value)), str(error.value)


def test_a_file_of_a_config_may_be_a_path_of_pathlib():
  made = dataclasses.replace(CONFIG, checkpoint=pathlib.Path('a/b'), compilation_cache=pathlib.Path('c'))
  assert (made.checkpoint, made.compilation_cache) == ('a/b', 'c')


def test_more_users_than_requests_are_as_many_as_there_are_requests():
  lengths = {'prompt': pdjax.Fixed(3), 'output': pdjax.Fixed(2)}
  crowd = pdjax.ClosedLoopWorkload(num_requests=3, max_concurrency=10**15, **lengths)
  assert pdjax.simulate(dataclasses.replace(CONFIG, workload=crowd)).report.completed == 3
  chats = pdjax.MultiTurn(num_chats=2, turns=pdjax.Fixed(1), max_concurrency=10**15, **lengths)
  assert pdjax.simulate(dataclasses.replace(CONFIG, workload=chats)).report.completed == 2


# ---------------------------------------------------------------------------- every field of every class that checks

GOOD = {  # what makes one of a class whose fields have no defaults
  'ServingConfig': lambda: CONFIG,
  'WorkerSpec': worker(),
  'ChipSpec': pdjax.ChipSpec.generic_cpu,
  'HostPlace': lambda: pdjax.HostPlace('host0', 1),
  'Request': lambda: REQUEST,
  'ModelSpec': lambda: tiny.TINY,
  'RopeScaling': lambda: RopeScaling('linear', 2.0),
  'GQA': lambda: GQA(6, 2, 8),
  'MLA': lambda: MLA(2, 4, 4, 4, 4, 4),
  'Gated': lambda: Gated(8),
  'Plain': lambda: Plain(8),
  'Experts': lambda: Experts(8, 2, 8),
  'CacheArray': lambda: CacheArray('a', (2, 4)),
  'CacheKind': lambda: CacheKind('k', (0,), (CacheArray('a', (2,)),)),
  'Fixed': lambda: pdjax.Fixed(3),
  'Uniform': lambda: pdjax.Uniform(1, 3),
  'Lognormal': lambda: pdjax.Lognormal(3, 1),
  'Empirical': lambda: pdjax.Empirical((3,)),
  'RandomTokens': lambda: RandomTokens(3, 9),
  'BlockTokens': lambda: BlockTokens(3, 9, (7, 8), 2),
  'Given': lambda: pdjax.Given((REQUEST,)),
  'TraceWorkload': lambda: TraceWorkload(path='trace.jsonl'),
  'ChatTurn': lambda: ChatTurn((1,)),
  'Chat': lambda: Chat('c', (ChatTurn((1,)),)),
  'Share': lambda: pdjax.Share(pdjax.Poisson(), 1, 'chat'),
  'Mix': lambda: pdjax.Mix((pdjax.Share(pdjax.Poisson(), 1, 'chat'),)),
  'Phase': lambda: pdjax.Phase(pdjax.Poisson(), 1),
  'Phases': lambda: pdjax.Phases((pdjax.Phase(pdjax.Poisson(), 1),)),
}
WRONG = (
  'text', b'x', None, -1, 0, 2.5, NAN, -math.inf, math.inf, True, [], {}, [None], ('x',), object(), object, 10**400, 1j,
  np.float32('nan'), np.ones(2), {1}, range(3), lambda: None,
)  # fmt: skip


def checks(kind: type) -> bool:
  """Whether a class checks its fields as it is made."""
  names = ('__post_init__', '_check')
  methods = [vars(owner)[name] for owner in kind.__mro__ for name in names if name in vars(owner)]
  return any('check_fields' in method.__code__.co_names for method in methods)


def checked_classes() -> dict[str, type]:
  """Every public dataclass of `pdjax` that checks its fields as it is made."""
  found = {}
  for module in pkgutil.walk_packages(pdjax.__path__, 'pdjax.'):
    source = importlib.util.find_spec(module.name).origin
    if 'check_fields' in pathlib.Path(source).read_text(encoding='utf-8'):
      members = inspect.getmembers(importlib.import_module(module.name), dataclasses.is_dataclass)
      own = {name: one for name, one in members if inspect.isclass(one) and one.__module__ == module.name}
      found |= {name: kind for name, kind in own.items() if not name.startswith('_') and checks(kind)}
  return found


CLASSES = checked_classes()


def test_all_that_users_write_checks():
  written = {*GOOD, 'FaultSpec', 'LinkSpec', 'TransferSpec', 'RayCluster', 'SamplingParams', 'SLO', 'Roofline'}
  written |= {
    'PrefixCache',
    'Disaggregated',
    'Colocated',
    'Poisson',
    'Bursty',
    'Constant',
    'ClosedLoopWorkload',
    'MultiTurn',
  }
  written |= {'FollowLoad'}
  written |= {'EarliestDeadline', 'PriorityClasses', 'RejectLate', 'ShortestFirst', 'StickyPrefix', 'UncachedThreshold'}
  assert written == CLASSES.keys()
  public = {name: getattr(pdjax, name) for name in pdjax.__all__}
  made = {name for name, one in public.items() if inspect.isclass(one) and dataclasses.is_dataclass(one)}
  results = {'ClusterView', 'Comparison', 'Completion', 'Delta', 'Report', 'RunResult'}
  messages = {
    'Cancel',
    'Chunk',
    'Preempt',
    'Reject',
    'Step',
    'SwitchRole',
    'Transfer',
    'WakeAt',
  }  # of a policy, which the books look at
  assert made - results - messages <= CLASSES.keys()


def test_defaults_are_what_their_hints_take():
  for name, kind in CLASSES.items():
    hints = checked.hints_of(kind)
    for field in dataclasses.fields(kind):
      if field.default is not dataclasses.MISSING:
        assert fitting.fit(field.default, hints[field.name]) == field.default, f'{name}.{field.name}'


FIELDS = [(name, field.name) for name, kind in CLASSES.items() for field in dataclasses.fields(kind)]


@pytest.mark.parametrize(('name', 'field'), FIELDS)
def test_a_field_takes_what_its_hint_takes_and_refuses_all_else_by_name(name, field):
  """Where a hint takes it, a field may still not go with the others, which is said in our words too."""
  kind = CLASSES[name]
  good = GOOD.get(name, kind)()
  hint = checked.hints_of(kind)[field]
  for value in (*WRONG, kind):
    try:
      fits = fitting.fit(value, hint) is not NotImplemented
    except fitting.Misfit:
      fits = False
    try:
      made = dataclasses.replace(good, **{field: value})
    except ValueError as error:
      assert fits or re.search(rf'\b{field}\b', str(error)), f'{value!r}: {error}'
      assert len(str(error)) < 1000 and str(error).endswith('.')
    else:
      assert fits, f'{name} takes {field}={value!r}'
      assert made is not None
