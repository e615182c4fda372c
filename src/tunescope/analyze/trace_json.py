"""Events of a profiler trace (Chrome trace JSON, plain or gzip), streamed: memory does not grow with the file.

A block of text is cut where its last event begins, by a pattern that cannot match inside a string, and all events
before the cut are decoded by one call of the C scanner of `json`. Whatever does not fit that, the same scanner takes
event by event. Leaving out events by their first keys, before decoding, was measured and saves nothing (docs/LOG.md).
"""

import codecs
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tunescope.errors import UserError

BLOCK_BYTES = 64 * 1024  # larger ones leave the processor's cache: 1 MiB is half as slow again
MAX_EVENT_CHARS = 4 * 1024**2  # real ones are below 0.1 MB; decoding one may take 20 times its text in memory
# A gzip file stops being read where it passes both; real traces shrink 10 to 30 times, deflate's own limit is 1,032.
MAX_DECOMPRESSED_BYTES = 64 * 1024**3
MAX_RATIO = 200
_RATIO_COUNTS_FROM_BYTES = 64 * 1024**2
_GZIP_MAGIC = b"\x1f\x8b"
# Members of the outer object that are kept; everything else beside the events is skipped without being decoded.
_KEPT_MEMBERS = ("deviceProperties",)

# Between two objects of one array. A string cannot hold this: its quote would end it, and a letter cannot follow one.
_BETWEEN_EVENTS = re.compile(r'\}\s*,\s*\{(?=\s*"\w)')
# Where to go on after an event that cannot be decoded; it may lie inside of that.
_EVENT_START = re.compile(r',\s*\{(?=\s*"(?:ph|cat|name|ts|pid|tid)"\s*:)')
_BLANKS = re.compile(r"\s*")
_SEPARATORS = re.compile(r"[\s,]*")
_SCALAR = re.compile(r"[^,\]}\s]*")
_STRING_REST = re.compile(r'(?:[^"\\]++|\\.)*+', re.DOTALL)
_STRUCTURE = re.compile(r'"|[\[{]++|[\]}]++')
_ENDS_EARLY = "the file ends before its JSON does"
_MOST_BRACES = 200  # in one event; C++ names have some tens
_NEAR_END_CHARS = 16  # a number, a literal or an escape cut in two leaves its error this close to the end of the text


class _Damage(Exception):
    """The rest of the file cannot be had; the message says why."""


class _EndOfText(Exception):
    """The text ended inside something."""


class TraceReader:
    """One pass over the events of a trace.

    Numbers with a fraction come as their text, since a float holds a Unix time in µs only to a quarter of a µs;
    integers, NaN and infinities come as Python has them.

    After iterating: `num_events` seen, `num_undecodable` of them, `members` (of the outer object, see _KEPT_MEMBERS),
    and `problem`, why the reading ended early, None if it did not. Iterating raises UserError for a path that cannot
    be opened and for a file in which no event was found.
    """

    def __init__(self, path: Path, *, max_decompressed_bytes: int | None = None) -> None:
        self.path = path
        self.num_events = 0
        self.num_undecodable = 0
        self.problem: str | None = None
        self.members: dict[str, Any] = {}
        self._blocks = _blocks(path, max_decompressed_bytes)
        # Control characters in strings are against the rules, and in traces.
        self._scan = json.JSONDecoder(parse_float=str, strict=False).scan_once  # type: ignore[attr-defined]
        self._text, self._at, self._dropped_chars, self._at_end = "", 0, 0, False

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches():
            yield from batch

    def batches(self) -> Iterator[list[Any]]:
        """The events in their order, as lists of some hundred: dicts in a good trace, any JSON value in a bad one."""
        try:
            yield from self._document()
        except _EndOfText:
            self.problem = self.problem or _ENDS_EARLY
        except _Damage as damage:
            self.problem = self.problem or str(damage)
        if self.num_events == 0:
            raise self._no_events()

    def _no_events(self) -> UserError:
        if self._dropped_chars + len(self._text) == 0 and self.problem == _ENDS_EARLY:
            return UserError(
                f"{self.path} is empty",
                cause="the run ended before the profiler wrote its trace, or the copy failed",
                cure="record or copy the trace again",
            )
        return UserError(
            f"{self.path} is no trace that can be read: {self.problem or 'it holds no events'}",
            cause="it is another kind of file, or it was damaged or cut off early",
            cure="give a file that torch.profiler wrote (export_chrome_trace, tensorboard_trace_handler), JSON or gzip",
        )

    # --- the document around the events ---

    def _document(self) -> Iterator[list[Any]]:
        first = self._next_char()
        if first == "[":
            self._at += 1
            yield from self._array()
        elif first == "{":
            self._at += 1
            yield from self._object()
        else:
            raise _Damage("it is not JSON of an object or an array")
        try:
            self._next_char()
        except _EndOfText:
            return
        raise _Damage("something follows the end of its JSON")

    def _object(self) -> Iterator[list[Any]]:
        has_events = False
        while (char := self._next_char(_SEPARATORS)) != "}":
            try:
                key = self._value() if char == '"' else None
            except ValueError:
                key = None
            if key is None or self._next_char() != ":":
                raise _Damage(f"its JSON breaks off near character {self._dropped_chars + self._at:,}")
            self._at += 1
            if key == "traceEvents" and self._next_char() == "[":
                has_events = True
                self._at += 1
                yield from self._array()
            elif key not in _KEPT_MEMBERS:
                self._skip_value()
            else:
                self._next_char()
                try:
                    self.members[key] = self._value()
                except ValueError:
                    self._skip_value()
        self._at += 1
        if not has_events:
            raise _Damage("it holds no array traceEvents")

    def _skip_value(self) -> None:
        """Past one value of any size, of which no more than a block is held."""
        first = self._next_char()
        if first == '"':
            self._at += 1
            return self._skip_string()
        if first not in "[{":
            while (end := _SCALAR.match(self._text, self._at).end()) == len(self._text):  # type: ignore[union-attr]
                self._at = end
                self._more()
            self._at = end
            return None
        depth = 0
        while True:
            found = _STRUCTURE.search(self._text, self._at)
            if found is None:
                self._at = len(self._text)
                self._more()
                continue
            self._at = found.end()
            if found[0] == '"':
                self._skip_string()
            elif found[0][0] in "[{":
                depth += len(found[0])
            elif depth <= len(found[0]):
                self._at = found.start() + depth
                return None
            else:
                depth -= len(found[0])

    def _skip_string(self) -> None:
        while True:
            self._at = _STRING_REST.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._text[self._at : self._at + 1] == '"':
                self._at += 1
                return
            self._more()

    # --- the array of events ---

    def _array(self) -> Iterator[list[Any]]:
        while self._next_char(_SEPARATORS) != "]":
            batch = self._decode_at_once()
            if batch is not None:
                yield batch
                if self._try_more():
                    continue
            yield self._decode_singly()
        self._at += 1

    def _decode_at_once(self) -> list[Any] | None:
        """All events at hand but the last; None if there are no two, or the text is not of events up to there."""
        cut = self._last_cut()
        if cut is None:
            return None
        text = "[" + self._text[self._at : cut[0]] + "]"
        try:
            batch, end = self._scan(text, 0)
        except (ValueError, RecursionError, StopIteration):
            return None
        if end != len(text):
            return None
        self.num_events += len(batch)
        self._at = cut[1]
        return batch

    def _last_cut(self) -> tuple[int, int] | None:
        """Where the last event but one ends and where the last begins."""
        start = len(self._text)
        for _ in range(_MOST_BRACES):
            start = self._text.rfind("{", self._at + 1, start)
            end = self._text.rfind("}", self._at, max(start, 0))
            if end < 0:
                return None
            found = _BETWEEN_EVENTS.match(self._text, end)
            if found and found.end() == start + 1:
                return end + 1, start
        return None

    def _decode_singly(self) -> list[Any]:
        """The events from here to the end of the text at hand, one by one; undecodable ones are counted and passed."""
        batch: list[Any] = []
        size_at_start = self._dropped_chars + len(self._text)
        while self._text[self._at] != "]":
            self.num_events += 1
            try:
                batch.append(self._value())
            except _EndOfText:
                self.num_events -= 1  # `problem` speaks for it
                self._at = len(self._text)
                return batch
            except ValueError:
                self.num_undecodable += 1
                self._seek_next_event()
            self._at = _SEPARATORS.match(self._text, self._at).end()  # type: ignore[union-attr]
            # The text that was read on for a single long event is for the fast path.
            if self._at >= len(self._text) or self._dropped_chars + len(self._text) > size_at_start:
                break
        return batch

    def _seek_next_event(self) -> None:
        start = self._dropped_chars + self._at
        self._at += 1
        while (found := _EVENT_START.search(self._text, self._at)) is None:
            # The pattern may begin in this text and end in the next.
            self._at = max(self._at, len(self._text) - 1024)
            if not self._try_more():
                self.problem = self.problem or f"its JSON breaks off near character {start:,}"
                self._at = len(self._text)
                return
        self._at = found.end() - 1

    # --- the text ---

    def _value(self) -> Any:
        """The JSON value that starts here, at most MAX_EVENT_CHARS long. Raises ValueError if it is none."""
        while True:
            try:
                value, end = self._scan(self._text, self._at)
            except json.JSONDecodeError as error:
                may_go_on = error.msg.startswith("Unterminated") or error.pos > len(self._text) - _NEAR_END_CHARS
            except StopIteration as stop:
                may_go_on = stop.value > len(self._text) - _NEAR_END_CHARS
            except RecursionError:
                may_go_on = False
            # (any other ValueError: an integer of more digits than Python converts)
            else:
                # (at the end of the text, the rest of a number may follow)
                if end < len(self._text) or self._text[-1] in '"}]':
                    self._at = end
                    return value
                may_go_on = True
            if not may_go_on or len(self._text) - self._at > MAX_EVENT_CHARS:
                raise ValueError("no JSON value that can be decoded")
            self._more(at_least_chars=len(self._text) - self._at)

    def _next_char(self, blanks: re.Pattern[str] = _BLANKS) -> str:
        while (at := blanks.match(self._text, self._at).end()) == len(self._text):  # type: ignore[union-attr]
            self._at = at
            self._more()
        self._at = at
        return self._text[at]

    def _more(self, at_least_chars: int = 1) -> None:
        """Adds text; what lies before `_at` goes. Raises _EndOfText if there is no more."""
        parts = []
        while at_least_chars > 0 and (block := self._next_block()):
            parts.append(block)
            at_least_chars -= len(block)
        if not parts:
            raise _EndOfText
        self._dropped_chars += self._at
        self._text, self._at = "".join([self._text[self._at :], *parts]), 0

    def _try_more(self) -> bool:
        try:
            self._more()
        except _EndOfText:
            return False
        return True

    def _next_block(self) -> str:
        if not self._at_end:
            try:
                for block in self._blocks:
                    if block:
                        return block
            except _Damage as damage:
                self.problem = str(damage)
            self._at_end = True
        return ""


def _blocks(path: Path, max_decompressed_bytes: int | None) -> Iterator[str]:
    """The file's text in pieces; bytes that are not UTF-8 become U+FFFD. Raises UserError, or _Damage halfway."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    is_first = True
    for data in _bytes(path, max_decompressed_bytes):
        text = decoder.decode(data)
        if is_first:
            text = text.removeprefix("\ufeff")
            is_first = not text
        yield text
    yield decoder.decode(b"", final=True)


def _bytes(path: Path, max_decompressed_bytes: int | None) -> Iterator[bytes]:
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise UserError(
            f"there is no file {path}", cause="the path is mistyped", cure="give the path of a trace"
        ) from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a trace", cure="give one of the files in it") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be opened: {error}", cure="give a file that you may read") from None
    with file:
        try:
            head = file.read(BLOCK_BYTES)
            if head.startswith(_GZIP_MAGIC):
                yield from _gunzip(file, head, max_decompressed_bytes)
                return
            while head:
                yield head
                head = file.read(BLOCK_BYTES)
        except OSError as error:
            raise _Damage(f"the file cannot be read on: {error.strerror or error}") from None


def _gunzip(file: BinaryIO, data: bytes, max_decompressed_bytes: int | None) -> Iterator[bytes]:
    """Members one after the other, as gzip joins them. Raises _Damage for a cut, a bad byte or a bomb."""
    compressed_bytes, plain_bytes, is_between_members = len(data), 0, False
    inflater = zlib.decompressobj(wbits=31)
    try:
        while True:
            if inflater.eof:
                data = inflater.unused_data
                inflater = zlib.decompressobj(wbits=31)
                is_between_members = True
            if not data:
                data = file.read(BLOCK_BYTES)
                compressed_bytes += len(data)
                if not data and is_between_members:
                    return
                if not data:
                    raise _Damage("its gzip data is cut off")
            if is_between_members:  # where some writers pad with zeros
                data = data.lstrip(b"\0")
                is_between_members = not data
                continue
            plain = inflater.decompress(data, BLOCK_BYTES)
            data = inflater.unconsumed_tail
            plain_bytes += len(plain)
            _check_size(plain_bytes, compressed_bytes, max_decompressed_bytes)
            if plain:
                yield plain
    except zlib.error as error:
        raise _Damage(f"its gzip data is damaged ({str(error).removeprefix('Error ')})") from None


def _check_size(plain_bytes: int, compressed_bytes: int, max_decompressed_bytes: int | None) -> None:
    if max_decompressed_bytes is not None:
        is_bomb = plain_bytes > max_decompressed_bytes
    else:
        ratio_counts = plain_bytes > _RATIO_COUNTS_FROM_BYTES
        is_bomb = plain_bytes > MAX_DECOMPRESSED_BYTES or (ratio_counts and plain_bytes > MAX_RATIO * compressed_bytes)
    if is_bomb:
        raise _Damage(
            f"{compressed_bytes:,} bytes of gzip data grew past the limit, to {plain_bytes:,}: no trace shrinks so well"
        )
