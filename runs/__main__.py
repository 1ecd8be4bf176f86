"""What ran, where it stands, and how it compares.

python -m runs list                               # the runs in outputs/
python -m runs show outputs/grpo
python -m runs compare outputs/grpo outputs/dapo
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from runs.comparison import aligned, compare_table, list_table, show
from runs.config import UserError
from runs.records import Record, find_runs, read_run


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


def main(argv: Sequence[str] | None = None) -> None:
    """Answer one question about runs."""
    parser, asked = parse(argv)
    try:
        if asked.command == "list":
            runs = read_all(find_runs(asked.folder))
            print(aligned(list_table(runs, asked.folder)) if runs else f"no runs in {str(asked.folder)!r}")
        elif asked.command == "show":
            print(show(*read_all(asked.runs)))
        else:
            print(aligned(compare_table(read_all(asked.runs), [str(folder) for folder in asked.runs])))
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
