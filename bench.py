#!/usr/bin/env python3
# PYTHON_ARGCOMPLETE_OK
"""Measure how fast the project is on this machine, side by side with the usual way of doing the same.

python bench.py                     measure everything, print a table, write bench.json
python bench.py --parts input step  measure only some parts
"""

import sys
from pathlib import Path

from run.cli import Parser, UserError, end_process, run_command

PARTS = ("input", "step", "epoch", "sharing", "evaluation", "predict", "startup", "memory")


def build_parser() -> Parser:
    parser = Parser("bench.py", __doc__)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="NAME", help=f"{', '.join(PARTS)} [all]")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps ... [auto]")
    add("--compile", action="store_true", help="use torch.compile in the training of this project [off]")
    add("--output", default="bench.json", metavar="FILE", help="results are saved here [bench.json]")
    return parser


def run(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    if "memory" in args.parts and not Path("/proc/self/smaps_rollup").exists():
        raise UserError("--parts: memory can be measured only on Linux; list the other parts")

    from run.machine import choose_device, keep_freed_memory
    from run.signals import Signals, Stopped
    from study.benchmark import measure_parts
    from study.benchmark_table import format_table

    if __name__ == "__main__":
        keep_freed_memory()  # as main.py does
    try:
        with Signals():
            results = measure_parts(args.parts, choose_device(args.device), args.compile, args.output)
    except Stopped as stop:
        print(f"stopped; {args.output} has the parts measured so far", file=sys.stderr)
        return stop.status
    print(format_table(results))
    return 0


def main(argv: list[str] | None = None) -> int:
    """-> exit status, see `run_command`."""
    return run_command(run, argv)


if __name__ == "__main__":
    end_process(main())
