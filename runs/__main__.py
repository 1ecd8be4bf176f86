"""What ran, where it stands, and how it compares.

It reads the folders of runs, also while they train, and writes only the page that `report` is asked for.

    python -m runs list                               # the runs in outputs/
    python -m runs show outputs/grpo
    python -m runs compare outputs/grpo outputs/dapo
    python -m runs report outputs/grpo outputs/dapo   # one page, the curves overlaid
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from runs.comparison import aligned, compare_table, comparison_page, list_table, name_all, show
from runs.config import UserError
from runs.page import write_page
from runs.records import Record, find_runs, read_run
from runs.report import report_page


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line's parser, and what it read."""
    parser = argparse.ArgumentParser(prog="python -m runs", description=__doc__.partition("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="the runs in a folder, the latest last")
    listing.add_argument("folder", type=Path, nargs="?", default=Path("outputs"))
    showing = commands.add_parser("show", help="everything that one run tells")
    showing.add_argument("runs", type=Path, nargs=1, metavar="RUN")
    comparing = commands.add_parser("compare", help="figures and settings of several, side by side")
    comparing.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    reporting = commands.add_parser(
        "report", help="the page of a run, or of several with their curves overlaid"
    )
    reporting.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    reporting.add_argument(
        "--to", type=Path, metavar="FILE", help="where the page goes; if not given, report.html"
    )
    return parser, parser.parse_args(argv)


def read_all(folders: Sequence[Path]) -> list[Record]:
    """The runs in these folders.

    Raises:
        UserError: one holds no run.
    """
    for folder in folders:
        if not (folder / "config.yaml").is_file():
            inside = ", ".join(str(run) for run in find_runs(folder)[:5])
            hint = (
                f"it has {inside} in it" if inside else "`python -m runs list FOLDER` shows those there are"
            )
            raise UserError(f"{str(folder)!r} holds no run (no config.yaml); {hint}")
    return [read_run(folder) for folder in folders]


def report(runs: Sequence[Record], to: Path | None) -> Path:
    """Write the page of these runs; returns where it is.

    Args:
        runs: one, or several to compare.
        to: the file; by default `report.html` of the run, or `comparison.html` beside the runs.

    Raises:
        UserError: it cannot be written.
    """
    if len(runs) == 1:
        to, page = to or runs[0].folder / "report.html", report_page(runs[0].folder)
    else:
        beside = Path(os.path.commonpath([run.folder.resolve().parent for run in runs]))
        to, page = to or beside / "comparison.html", comparison_page(name_all(runs))
    try:
        write_page(to, page)
    except OSError as error:
        raise UserError(
            f"--to {str(to)!r} cannot be written ({error.strerror}); give another file"
        ) from error
    return to


def main(argv: Sequence[str] | None = None) -> None:
    """Answer one question about runs."""
    parser, asked = parse(argv)
    try:
        if asked.command == "list":
            runs = read_all(find_runs(asked.folder))
            print(aligned(list_table(runs, asked.folder)) if runs else f"no runs in {str(asked.folder)!r}")
        elif asked.command == "show":
            print(show(*read_all(asked.runs)))
        elif asked.command == "compare":
            print(aligned(compare_table(name_all(read_all(asked.runs)))))
        else:
            print(report(read_all(asked.runs), asked.to))
        sys.stdout.flush()
    except UserError as error:
        parser.error(str(error))
    except BrokenPipeError:  # `| head` has seen enough; what is not written yet shall not be tried again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
