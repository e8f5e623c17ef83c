"""Blocks through a model: the same work in one process and on every machine of a cluster."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
import hashlib
import time
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ..errors import InputError, KqprefillError
from . import blocks
from .folder import Folder
from .inputs import Block
from .records import Reader, Record
from .results import NOT_FINITE, Wanted, all_finite, described, n_tokens_of

if TYPE_CHECKING:
    from ..engine.model import Model
    from ..engine.scoring import Item

Form: TypeAlias = Literal["jsonl", "parquet"]


@dataclass(frozen=True)
class Settings:
    """How records are scored.

    keep_as: as Reader has it. skip_bad: a bad record gets a result that says what is wrong; else it is an error.
    parse_special, chat_template: as `Model.score` has them. batch_tokens: of a batch, at most. form: of the results'
    files; None for that of each input.
    """

    wanted: Wanted = field(default_factory=Wanted)
    keep_as: str | None = None
    skip_bad: bool = False
    parse_special: bool = True
    chat_template: str | None = None
    batch_tokens: int | None = None
    form: Form | None = None

    def described(self) -> dict[str, Any]:
        """What of them a result depends on, for a manifest."""
        template = self.chat_template
        digest = None if template is None else hashlib.sha256(template.encode()).hexdigest()
        own = {"keep_as": self.keep_as, "parse_special": self.parse_special, "chat_template": digest, "form": self.form}
        return asdict(self.wanted) | own

    def form_of(self, block: Block) -> Form:
        """In which form a block's results are written."""
        return self.form or ("parquet" if block.is_table else "jsonl")


@dataclass(frozen=True)
class Done:
    """What came of a block: its results' file and size, records (bad ones among them) and scored tokens; and in this
    run the tokens that were computed, the seconds that it took, and what was wrong with the first bad record."""

    name: str
    size: int
    records: int
    bad: int
    n_tokens: int
    tokens: int = 0
    seconds: float = 0.0
    first_error: str = ""


class BlockScorer:
    """Scores blocks with a model. Raises InputError where more likeliest tokens are asked for than it has."""

    def __init__(self, model: Model, settings: Settings) -> None:
        self.model, self._settings = model, settings
        if settings.wanted.top > model.config.vocab_size:
            raise InputError(f"--top {settings.wanted.top}: the vocabulary has {model.config.vocab_size} tokens")
        template = settings.chat_template
        make = partial(model.item, parse_special=settings.parse_special, chat_template=template)
        self.reader = Reader(make, settings.keep_as)

    def write(self, block: Block, folder: Folder, heard: Callable[[float], None] | None = None) -> Done:
        """Score a block and write its results into a folder, whole or not at all.

        heard(part): how much of it is done, 0 to 1. Raises KqprefillError at a bad record unless they are skipped.
        """
        begin, form = time.perf_counter(), self._settings.form_of(block)
        table = blocks.read_rows(block) if block.is_table else None
        if table is None:
            records, others = blocks.read_lines(block, self.reader), None
        else:
            others = blocks.handed_on(table, block.path, self._settings.keep_as)
            records = blocks.records_of(table, self.reader, block.path, block.first)
        scored = self.results(records, lambda done: heard(done / block.count) if heard else None)
        name = block.name(f".{form}")
        with folder.open(name) as file:
            if form == "jsonl":
                handed = [{} if others is not None else record.extras for record in scored.records]
                blocks.write_lines(file, [line | extras for line, extras in zip(scored.lines, handed)], others)
            else:
                if others is None:
                    others = blocks.texts_of_extras(scored.records, self._settings.keep_as)
                own = blocks.results_table(scored.lines, self._settings.wanted)
                blocks.write_rows(file, blocks.joined(own, others))
            size = file.tell()
        seconds = time.perf_counter() - begin
        n_tokens = sum(map(n_tokens_of, scored.lines))
        return Done(name, size, len(scored.records), scored.bad, n_tokens, scored.tokens, seconds, scored.first_error)

    def results(self, records: Iterable[Record], heard: Callable[[int], None] | None = None) -> Results:
        """A line of results for each record, in order, without what is handed on; raises as `write` does.

        Records are taken while those before them are computed. heard(count): how many are done.
        """
        scored = Results()
        waiting: deque[int] = deque()

        def items() -> Iterator[Item]:
            for at, record in enumerate(records):
                scored.records.append(record)
                scored.lines.append({})
                if record.error is not None or record.item is None:
                    self._fail(scored, at, record.error or "there is nothing to score")
                else:
                    waiting.append(at)
                    yield record.item

        ranks = self._settings.wanted.ranks
        for result in self.model.score(items(), self._settings.batch_tokens, ranks):
            at = waiting.popleft()
            record = scored.records[at]
            if all_finite(result):
                scored.lines[at] = {"index": record.index} | described(result, self._settings.wanted)
                scored.tokens += record.item.tokens if record.item else 0
            else:
                self._fail(scored, at, NOT_FINITE)
            if heard:
                heard(at + 1)
        return scored

    def _fail(self, scored: Results, at: int, error: str) -> None:
        record = scored.records[at]
        if not self._settings.skip_bad:
            raise KqprefillError(f"{record.where}: {error}")
        scored.bad += 1
        scored.first_error = scored.first_error or f"{record.where}: {error}"
        scored.lines[at] = {"index": record.index, "error": f"{record.where}: {error}"}


@dataclass
class Results:
    """Records and a line of results for each; bad: how many say only what is wrong; tokens: of the others."""

    records: list[Record] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)
    bad: int = 0
    tokens: int = 0
    first_error: str = ""
