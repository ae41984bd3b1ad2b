"""Runs the benchmarks, each in a process of its own, and writes what they print to benchmarks/RESULTS.md.

A part that fails, or that is not asked for, leaves its section of the last run where it is.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks._markdown import conditions

PARTS = (
    "steps",
    "definition",
    "monitors",
    "drift",
    "rankme",
    "communication",
    "thousand_ranks",
    "growth",
    "solver",
    "measure",
    "pretrained",
    "collapse",
    "alignment",
    "stopping_alignment",
    "foretelling",
    "gpu",
)
RESULTS = Path(__file__).parent / "RESULTS.md"
HEAD = """# What it costs

Every time is a ratio of two things measured in turn in one process: the median of many, with the quartiles around it.
Memory is the peak of what torch's CPU allocator had handed out, on one thread. Written by `python -m benchmarks`
(`make bench`).

"""
MARK = "<!-- {} -->\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="tiny settings: shows that every part runs; writes nothing"
    )
    # RankMe comes with dependencies of its own, and the last part needs a GPU: see the Makefile.
    default = [part for part in PARTS if part not in ("rankme", "gpu")]
    parser.add_argument("--only", nargs="+", choices=PARTS, default=default, metavar="PART", help=", ".join(PARTS))
    arguments = parser.parse_args()
    sections = read_sections()
    failed = []
    for part in arguments.only:
        began = time.perf_counter()
        print(f"{part} ... ", end="", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{part}", *(["--quick"] if arguments.quick else [])]
        result = subprocess.run(command, cwd=RESULTS.parent.parent, capture_output=True, text=True)
        seconds = time.perf_counter() - began
        print(f"{seconds:.0f} s" if result.returncode == 0 else f"failed:\n{result.stderr[-3000:]}", flush=True)
        if result.returncode:
            failed.append(part)
            continue
        # Not all that libraries say goes to stderr.
        section = result.stdout[result.stdout.index("## ") :].rstrip()
        sections[part] = f"{section}\n\n{conditions('transformers', 'lightning')}; took {seconds:.0f} s.\n\n"
        if arguments.quick:
            print(section)
        else:
            written = [MARK.format(name) + sections[name] for name in PARTS if name in sections]
            RESULTS.write_text(HEAD + "".join(written).rstrip() + "\n", encoding="utf-8")
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}")


def read_sections() -> dict[str, str]:
    """The sections of the last run."""
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else ""
    sections = {}
    for part in PARTS:
        _, found, rest = text.partition(MARK.format(part))
        if found:
            sections[part] = rest.partition("<!-- ")[0].rstrip() + "\n\n"
    return sections


if __name__ == "__main__":
    main()
