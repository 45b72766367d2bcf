"""How a download is shown: a bar on a terminal, lines elsewhere. `llambo pull` and `llambo up` use it."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import click

from llambo.cli.kit.failure import Exit, Failure
from llambo.cli.kit.std_streams import drawing
from llambo.cli.kit.tables import one_line, size

if TYPE_CHECKING:
    from pathlib import Path

    from llambo.mesh.settings.settings import Settings
    from llambo.worker.store.refs import Ref, StoreError


class _View:
    @staticmethod
    def verified(path: Path, sha256: str) -> None:
        """A worker has to know the checksum of its model: it need not read all of it again."""
        from llambo.worker.models import model_files

        model_files.remember_digest(str(path), sha256)


class Lines(_View):
    """A line for each tenth that is here."""

    def __init__(self, total: int = 0) -> None:
        self._total = total
        self._done = 0
        self._shown = 0

    def note(self, text: str) -> None:
        click.echo(f"llambo: {one_line(text)}", err=True)

    def moved(self, count: int) -> None:
        self._done += count
        tenth = self._done * 10 // self._total if self._total else 0
        if tenth > self._shown:
            self._shown = tenth
            self.note(f"{tenth * 10:3} %, {size(self._done)} of {size(self._total)}")


class Bar(_View):
    def __init__(self, name: str, total: int) -> None:
        from rich import progress
        from rich.console import Console
        from rich.markup import escape

        self.drawn = progress.Progress(
            progress.TextColumn("{task.description}"), progress.BarColumn(), progress.TaskProgressColumn(),
            progress.DownloadColumn(binary_units=True), progress.TransferSpeedColumn(), progress.TimeRemainingColumn(),
            console=Console(file=drawing(), highlight=False),
        )  # fmt: skip
        self._task = self.drawn.add_task(escape(one_line(name)), total=total)

    def note(self, text: str) -> None:
        self.drawn.console.print(f"llambo: {one_line(text)}", markup=False)

    def moved(self, count: int) -> None:
        self.drawn.advance(self._task, count)


def download(ref: Ref) -> Path:
    """Bring a model to this host, and show how far it is. What is here already is not downloaded again."""
    from llambo.worker.store import pull
    from llambo.worker.store.refs import StoreError, UrlRef

    try:
        made = pull.plan(ref, Lines())
        if made.missing:
            Lines().note(f"downloading {size(made.missing)} to {made.folder}")
        name = ref.file if isinstance(ref, UrlRef) else str(ref)
        watcher, drawn = view(name, made.size if made.missing else 0)
        with drawn:
            return pull.carry_out(made, ref, watcher)
    except StoreError as error:
        raise failure_of(error) from error
    except KeyboardInterrupt:
        Lines().note("interrupted: the same command goes on from here")
        raise


def view(name: str, total: int) -> tuple[Lines | Bar, AbstractContextManager[object]]:
    if not total or not sys.stderr.isatty():
        return Lines(total), nullcontext()
    bar = Bar(name, total)
    return bar, bar.drawn


def download_missing(settings: Settings) -> None:
    """The model that the settings name, if that is the name of a download and it is not here."""
    from llambo.worker.store import caches, refs

    model = settings.text("model")
    try:
        ref = refs.parse(settings.aliases.get(model, model))
    except refs.StoreError as error:
        raise failure_of(error) from error
    if ref is not None and caches.find(ref) is None:
        download(ref)


def failure_of(error: StoreError, option: str = "", hint: str = "") -> Failure:
    """`option`: where the name is from. `hint`: if the error has none."""
    code = Exit.DENIED if error.status in (401, 403) else Exit.USAGE if error.malformed else Exit.ERROR
    return Failure(f"{option}: {error}" if option else str(error), error.hint or hint, code)
