"""The backend that drives workers elsewhere: it sends them orders, hears their news and never loads JAX."""

from pdjax.controller.peer import Peer
from pdjax.controller.process_engine import ProcessEngine, Revived
from pdjax.controller.processes import Handshake, build_processes
from pdjax.controller.ray_workers import RayProcesses

__all__ = ['Handshake', 'Peer', 'ProcessEngine', 'RayProcesses', 'Revived', 'build_processes']
