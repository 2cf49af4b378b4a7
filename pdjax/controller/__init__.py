"""The backend that drives workers elsewhere: it sends them orders, hears their news and never loads JAX."""

from pdjax.controller.process_engine import ProcessEngine
from pdjax.controller.processes import build_processes
from pdjax.controller.ray_workers import RayProcesses

__all__ = ['ProcessEngine', 'RayProcesses', 'build_processes']
