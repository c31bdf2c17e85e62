#!/usr/bin/env python3
# PYTHON_ARGCOMPLETE_OK
"""Search hyperparameters like a W&B sweep, without W&B: the same sweep.yaml, no account, no network.

python search.py sweep.yaml --trials 20 --data_dirs data/forehead_wrinkles
python search.py sweep.yaml --trials 40 --jobs 2 --storage postgresql+psycopg://host/studies --data_dirs data/forehead

Flags that are not listed here are passed to main.py for each trial. The study is kept in a database: if the search is
stopped or killed, the same command resumes it, and unfinished trials from their own checkpoints.
"""

from flags import build_parser as build_main_parser
from run.cli import Parser, end_process, number, run_command


def build_parser() -> Parser:
    parser = Parser("search.py", __doc__, passes_on=build_main_parser)
    add = parser.add_argument
    positive = number(int, low=1)
    add("sweep", metavar="YAML", help="configuration of a W&B sweep, such as sweep.yaml")
    add("--trials", type=positive, metavar="N", help="trials of the study in total [run_cap, size of the grid, or 20]")
    add("--jobs", type=positive, default=1, metavar="N", help="number of trials at once on this machine [1]")
    add("--search_dir", metavar="DIR", help="folder for trials and results [search_NAME for NAME.yaml]")
    add("--study", metavar="NAME", help="name of the study in the storage [that of the search_dir]")
    add("--storage", metavar="URL", help="database for many machines, an SQLAlchemy URL [SQLite in search_dir]")
    add("--search_seed", type=number(int, low=0), metavar="N", help="seed of the sampler [random]")
    return parser


def run(argv: list[str]) -> None:
    args, main_flags = build_parser().parse_known_args(argv)
    from study.process import check_main_flags, check_system

    check_system()
    check_main_flags(main_flags)

    from study.optuna_search import run_search

    run_search(args, main_flags)


def main(argv: list[str] | None = None) -> int:
    """-> exit status, see `run_command`."""
    return run_command(run, argv)


if __name__ == "__main__":
    end_process(main())
