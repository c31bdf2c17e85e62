#!/usr/bin/env python3
# PYTHON_ARGCOMPLETE_OK
"""Measure how fast the project is on this machine, side by side with the usual way of doing the same.

python bench.py                     measure everything, print a table, write bench.json
python bench.py --parts input step  measure only some parts
python bench.py --scaling 1 2       measure only one training by 2 processes, compared with 1
"""

import sys
from pathlib import Path

from run.cli import Parser, UserError, end_process, run_command

PARTS = ("input", "step", "epoch", "sharing", "evaluation", "predict", "startup", "memory")


def build_parser() -> Parser:
    parser = Parser("bench.py", __doc__)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, metavar="NAME", help=f"{', '.join(PARTS)} [all; none with --scaling]")
    add("--scaling", nargs="+", type=int, metavar="N", help="numbers of processes of one training [none]")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps ... [auto]")
    add("--compile", action="store_true", help="use torch.compile in the training of this project [off]")
    add("--output", default="bench.json", metavar="FILE", help="results are saved here [bench.json]")
    return parser


def run(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    scaling = args.scaling or []
    if any(number < 1 for number in scaling):
        raise UserError(f"--scaling: {min(scaling)} processes cannot train; name numbers from 1")
    parts = args.parts or ([] if scaling else PARTS)
    if "memory" in parts and not Path("/proc/self/smaps_rollup").exists():
        raise UserError("--parts: memory can be measured only on Linux; list the other parts")

    from run.machine import choose_device, keep_freed_memory
    from run.signals import Signals, Stopped
    from study.benchmark import measure_parts
    from study.benchmark_table import format_table

    if __name__ == "__main__":
        keep_freed_memory()  # as main.py does
    try:
        with Signals():
            results = measure_parts(parts, choose_device(args.device), args.compile, args.output, scaling)
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
