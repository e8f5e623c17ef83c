"""JSON lines in and out: records read ahead by a thread, results written line by line, so that a run can be continued."""

from dataclasses import dataclass
import fcntl
import json
import os
import queue
import signal
import sys
import threading

from ..errors import InputError, KqprefillError
from .common import STDIO

_AHEAD = 1 << 16  # tokens that are read before they are needed, about: some batches
_RECORD = 64  # what a record costs by itself, in tokens
ASKED = "tokens", "prompt", "completion", "choices"  # keys of a record that say what to score
_LINGER = 0.05  # seconds to wait for more, before what there is runs in a smaller batch


@dataclass(frozen=True)
class Record:
    """One line of the input: its place among the records (from 0) and in the file (from 1), where it ends in it (bytes), its other
    keys, and the Item made of it, or what is wrong with it."""

    index: int
    line: int
    end: int
    extras: dict
    item: object = None
    error: str | None = None

    @property
    def cost(self):
        return _RECORD + (self.item.tokens if self.item else 0)


class Records:
    """The records of a JSONL file (`-` is stdin), read and tokenised by a thread.

    make(content): the Item of a record; raises InputError. skip: how many records there are results of already. Raises
    InputError for a file that cannot be opened.
    """

    def __init__(self, path, make, skip=0):
        try:
            self._file = sys.stdin.buffer if path == STDIO else open(path, "rb")
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from None
        self.name = "stdin" if path == STDIO else path
        self.nbytes = os.path.getsize(path) if os.path.isfile(path) else None
        self._make, self._skip, self._queue = make, skip, queue.Queue()
        self._ahead, self._taken = 0, threading.Condition()
        self.last_skipped = None  # a Record
        threading.Thread(target=self._read, daemon=True).start()

    def __iter__(self):
        """Records, and None where no more are there yet."""
        waiting = False
        while True:
            try:
                found = self._queue.get(timeout=_LINGER if waiting else None)
            except queue.Empty:
                waiting = False
                yield None
                continue
            if found is None:
                return
            if isinstance(found, BaseException):
                raise found
            waiting = True
            with self._taken:
                self._ahead -= found.cost
                self._taken.notify()
            yield found

    def _read(self):
        index = end = 0
        try:
            for line, text in enumerate(self._file, 1):
                end += len(text)
                if not text.strip():
                    continue
                if index >= self._skip:
                    record = self._record(index, line, end, text)
                    with self._taken:
                        self._taken.wait_for(lambda: self._ahead < _AHEAD)
                        self._ahead += record.cost
                    self._queue.put(record)
                elif index == self._skip - 1:
                    self.last_skipped = self._record(index, line, end, text)
                index += 1
            if index < self._skip:
                raise InputError(f"{self.name} has {index} records, but the output to continue has {self._skip}")
            self._queue.put(None)
        except BaseException as error:  # raised where the records are taken
            self._queue.put(error)

    def _record(self, index, line, end, text):
        extras = {}
        try:
            content = json.loads(text.decode("utf-8"), parse_constant=_refuse)
            if not isinstance(content, dict):
                raise InputError("a record must be a JSON object")
            extras = {key: value for key, value in content.items() if key not in ASKED}
            return Record(index, line, end, extras, self._make(content))
        except InputError as error:
            why = str(error)
        except UnicodeDecodeError as error:
            why = f"byte {error.start + 1} is no UTF-8"
        except (ValueError, RecursionError) as error:
            why = f"no JSON: {error}"
        return Record(index, line, end, extras, error=why)


def _refuse(constant):
    raise ValueError(f"{constant} is no JSON value")


class Lines:
    """Where results are written, each line whole: a file, or stdout (`-`). A context manager.

    resume: go on where the file ends; `done` lines are there already, of which `last` is the last (a dict); a line that was
    not written whole is cut off. Raises InputError for a file that is not to be overwritten, that another process writes,
    or that is no such output; KqprefillError where it cannot be written.
    """

    def __init__(self, path, resume=False):
        self.done, self.last, self.name = 0, None, "stdout" if path == STDIO else path
        self._writing, self._signalled = False, 0
        if path == STDIO:
            self._handle = sys.stdout.fileno()
            return
        self._is_new = not os.path.lexists(path)
        try:
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            if not os.path.isfile(path):  # a pipe or a device
                return
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{path}: another process is writing it") from None
        except OSError as error:
            raise KqprefillError(f"{path} cannot be written: {error.strerror}") from None
        if resume:
            self._find_end()
        elif os.fstat(self._handle).st_size:
            raise InputError(
                f"{path} holds something already: --resume continues an interrupted output; else remove it, or name another"
            )

    def _find_end(self):
        end = 0
        with open(os.dup(self._handle), "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    found = json.loads(line)
                    if found["index"] != self.done:
                        raise ValueError
                except (ValueError, TypeError, KeyError, RecursionError):
                    raise InputError(
                        f"{self.name}: line {self.done + 1} is no result of record {self.done}; this is no output to resume"
                    ) from None
                self.done, self.last, end = self.done + 1, found, end + len(line)
        os.ftruncate(self._handle, end)
        os.lseek(self._handle, end, os.SEEK_SET)

    def write(self, content):
        """One line of JSON. An interrupt waits until it is whole; a second one does not."""
        try:
            data = json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell but UTF-8 cannot
            data = json.dumps(content, allow_nan=False).encode()
        data, self._writing = data + b"\n", True
        try:
            while data:
                data = data[os.write(self._handle, data) :]
        except BrokenPipeError:
            raise
        except OSError as error:
            raise KqprefillError(
                f"{self.name} cannot be written: {error.strerror}; --resume goes on from the last whole line"
            ) from None
        finally:
            self._writing = False
        if self._signalled:
            raise_signal(self._signalled)

    def on_signal(self, number, frame):
        """A handler of signals that end the run."""
        if self._writing and not self._signalled:
            self._signalled = number
        else:
            raise_signal(number)

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc):
        for number, handler in getattr(self, "_before", {}).items():
            signal.signal(number, handler)
        if self.name != "stdout":
            if self._is_new and os.path.isfile(self.name) and not os.fstat(self._handle).st_size and exc[0]:
                os.unlink(self.name)  # a run that failed before its first line
            os.close(self._handle)


class Terminated(BaseException):
    """SIGTERM: what is unfinished is cleared away, and the process ends."""


def raise_signal(number, frame=None):
    """What an interrupting signal becomes: KeyboardInterrupt, or Terminated."""
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated
