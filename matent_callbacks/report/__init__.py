"""One page for a finished run, or for several side by side, in pictures and words: what ``matent report`` writes.

Reads what Trainers and loggers leave on disk; nothing is asked of any server, and no code or pickle of a run is loaded.
"""

from matent_callbacks.report._one_run import read_run
from matent_callbacks.report._pages import comparison, page
from matent_callbacks.report._run import Run, RunError, Stop

__all__ = ["Run", "RunError", "Stop", "comparison", "page", "read_run"]
