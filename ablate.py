#!/usr/bin/env python3
# PYTHON_ARGCOMPLETE_OK
"""Compare methods for imbalanced classes on your own images: same number of steps, same images, several seeds.

python ablate.py --data_dirs data/forehead_wrinkles --epochs 30 --seeds 0 1 2

Each method is trained by main.py once per seed, with the same number of optimizer steps. Flags that are not listed here
are passed to main.py for all runs. If the ablation is stopped, the same command resumes it. Results are saved to
ablation.csv, ablation.md and ablation.png in --ablate_dir.
"""

from flags import build_parser as build_main_parser
from run.cli import Parser, UserError, end_process, number, run_command


def build_parser() -> Parser:
    parser = Parser("ablate.py", __doc__, passes_on=build_main_parser)
    add = parser.add_argument
    add(
        "--epochs",
        type=number(int, low=1),
        required=True,
        metavar="E",
        help="epochs of a method that does not oversample; all methods get its optimizer steps [required]",
    )
    add(
        "--seeds",
        type=number(int, low=0, below=2**32),
        nargs="+",
        default=[0, 1, 2],
        metavar="N",
        help="train each method once per seed [0 1 2]",
    )
    add("--grid", metavar="YAML", help="methods as {name: flags of main.py} [eight methods, see docs/methods.md]")
    add("--baseline", metavar="NAME", help="the method that the others are compared with [the first one]")
    add("--ablate_dir", default="ablation", metavar="DIR", help="folder for runs and results [ablation]")
    add("--jobs", type=number(int, low=1), default=1, metavar="N", help="number of runs at once [1]")
    return parser


def run(argv: list[str]) -> None:
    args, main_flags = build_parser().parse_known_args(argv)
    from flag_checks import with_config
    from study.grid import check_flags, read_grid, varied_flags
    from study.process import check_system

    check_system()
    grid = read_grid(args.grid)
    main_flags = with_config(main_flags, varied_flags(grid))
    baseline = args.baseline or next(iter(grid))
    if baseline not in grid:
        raise UserError(f"--baseline: {baseline} is not one of {', '.join(grid)}")
    check_flags(main_flags, grid, args.epochs)

    from run.folder import open_or_create_folder
    from run.signals import Signals
    from study.ablation import check_and_record_runs, plan_runs, train_runs
    from study.comparison import write_comparison

    with Signals() as signals, open_or_create_folder(args.ablate_dir, "--ablate_dir") as folder:
        runs, num_images, table = plan_runs(args, main_flags, grid, folder)
        check_and_record_runs(folder / "ablation.json", runs, num_images, table)
        train_runs(runs, args.jobs, signals)
        write_comparison(folder, runs, baseline, args.seeds)


def main(argv: list[str] | None = None) -> int:
    """-> exit status, see `run_command`."""
    return run_command(run, argv)


if __name__ == "__main__":
    end_process(main())
