"""The framework-neutral monitor: hidden states of chosen layers in, named numbers out."""

from matent_callbacks.monitor.entropy_monitor import EntropyMonitor

__all__ = ["EntropyMonitor"]
