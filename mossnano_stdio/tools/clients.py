"""List the clients for other languages, or copy one into a project of yours.

    mossnano clients                 what there is
    mossnano clients c third_party   copies its files there

Each is one file without dependencies, and an example; `web` is a page that needs onnxruntime-web. They are meant to
be copied and changed; nothing of yours is overwritten unless you say --force.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from mossnano_stdio.errors import ExitStatus, UsageError
from mossnano_stdio.files import cannot_write, open_output, told_as

CLIENTS = Path(__file__).parents[1] / "clients"
MELODY = Path(__file__).parents[1] / "demo" / "melody.mossnano"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("client", nargs="?", metavar="NAME", help="which one to copy; without it, they are listed")
    parser.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="where to; created where needed")
    parser.add_argument("--force", action="store_true", help="overwrite what is there and differs")


def run(args: argparse.Namespace) -> int:
    table = (CLIENTS / "README.md").read_text("utf-8")
    clients = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", table, re.MULTILINE))  # name -> what it is
    if args.client is None:
        for name, what in clients.items():
            print(f"{name:<{max(map(len, clients))}}  {what}")
        return ExitStatus.DONE
    if args.client not in clients:
        raise UsageError(f"there is no client {args.client!r}, but {', '.join(clients)}")
    if args.folder is None:
        raise UsageError(f"where to? mossnano clients {args.client} DIR")
    files = [path for path in sorted((CLIENTS / args.client).iterdir()) if path.is_file() and path.name[0] != "."]
    if args.client == "web":
        files.append(MELODY)  # which the page plays
    copies = {path: args.folder / path.name for path in files}
    with told_as(cannot_write(args.folder)):
        if not args.force:
            _check_untouched(copies)
        args.folder.mkdir(parents=True, exist_ok=True)
    for path, copy in copies.items():
        with open_output(copy) as file:
            file.write(path.read_bytes())
        print(copy)
    return ExitStatus.DONE


def _check_untouched(copies: dict[Path, Path]) -> None:
    for path, copy in copies.items():
        if copy.exists() and (not copy.is_file() or copy.read_bytes() != path.read_bytes()):
            raise UsageError(f"{copy} is there already and differs: choose another folder, or --force")
