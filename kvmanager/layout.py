"""The shared files, word by word: `tables`, `<key>.log`, and the words inside them.

Everything here is a view of u64/u32/f32 arrays over bytes that somebody else mapped;
nothing opens a file. Words that change under a reader are aligned u64 and change by one
store. Structured dtypes are not used: their assignments tear.

    tables   written by the manager, read by the executor
        header      64 words           `Header` names them
        page_word   u64[pages]         state in bits 0..7, generation in bits 32..63
        page_hash   u64[pages, 2]      content hash; valid while sealed
        page_parent u64[pages, 2]      hash of the page before it
        page_used   u64[pages]         last use: a turn number, not a time
        page_tokens u32[pages, page_size]
        row_word    u64[rows + 64]     state in bits 0..7, output index 8..31, generation 32..63
        row_key     u64[rows + 64, 2]  the request's key
        row_length  u64[rows + 64]     entries in use
        row_entry   u64[rows + 64, entries]  page id in bits 0..31, page generation in bits 32..63
        pin_name    u64[64, 32]        tenant, NUL, name in UTF-8: of the pinned row `rows` + this
                                       (rows for sequences come first, 64 for pinned prefixes last)
        scales      f32[layers, 2, kv_heads]  of K and V, fixed when the pool is made: an element's value is
                                       what is stored x its scale; fp8 pools only, else there is none

    <key>.log  made by the manager, from then on written by the executor
        header      8 words            magic, version, outputs, capacity, prompt length, flags
        then for each output, 64-byte aligned:
        words       8 x u64            progress, terminal, cached tokens; rest unused
        tokens      u32[capacity]      token at position p, prompt included
        logprobs    f32[capacity]      only with FLAG_LOGPROBS
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kvmanager.logwords import (
    FLAG_LOGPROBS,
    LAYOUT_VERSION,
    LOG_HEADER_WORDS,
    LOG_MAGIC,
    OUTPUT_WORDS,
    output_nbytes,
)

U64 = npt.NDArray[np.uint64]
U32 = npt.NDArray[np.uint32]
F32 = npt.NDArray[np.float32]

TABLES_MAGIC: Final = 0x50414745484F4C44  # "PAGEHOLD"
HEADER_WORDS: Final = 64
MOST_PINS: Final = 64  # rows that only pinned prefixes use, behind those for sequences
PIN_NAME_WORDS: Final = 32
NO_PAGE: Final = 0  # the reserved id: `none` entries name it, no row ever gets it
LOW32: Final = 0xFFFFFFFF

# Layout ids. A slot holds head_dim elements of `KvDtype`; those of int8 are followed by their scale.
PAGE_MAJOR: Final = 1  # [page][layer][k, v][kv_head][slot]
LAYER_MAJOR: Final = 2  # [layer][page][k, v][kv_head][slot]; device pools only
IN_WORDS: Final = 3  # [page][layer][k, v][kv_head] planes as kernels/cpu/pages.py has them; host pools only


class Header(IntEnum):
    """Index of each word in the header of `tables`."""

    MAGIC = 0
    LAYOUT = 1
    PAGES = 2
    ROWS = 3
    ROW_ENTRIES = 4
    PAGE_SIZE = 5
    LAYERS = 6
    KV_HEADS = 7
    HEAD_DIM = 8
    KV_DTYPE = 9
    LAYOUT_ID = 10
    MAX_MODEL_LEN = 11
    PAGE_BYTES = 12
    EPOCH = 13
    EXECUTOR_ID = 14  # two words
    POOL_UUID = 16  # two words
    BOOT_ID = 18  # two words
    FINGERPRINT = 20  # four words
    POOL_BYTES = 24  # backed by memory so far; grows by whole extents
    READY = 25  # 1 once the pool's geometry is complete; stored last
    POOL_KIND = 26  # where the pool's memory is: `PoolKind`
    DEVICE_UUID = 27  # two words; of the device whose memory it is
    POOL_GENERATION = 29  # device memories behind these tables so far; each also draws a POOL_UUID


class PoolKind(IntEnum):
    """Where the pool's memory is, and how it goes from its owner to its user. As in `pagehold.kv.v1.PoolKind`."""

    HOST = 0  # a file of shared memory
    IPC = 1  # device memory, by a legacy CUDA IPC handle: it cannot be exported again by another manager
    VMM = 2  # device memory, by a file descriptor: whoever holds one keeps it alive


class KvDtype(IntEnum):
    FLOAT32 = 1
    BFLOAT16 = 2
    FLOAT16 = 3
    FP8_E4M3 = 4  # with scales in `tables`
    INT8 = 5  # each slot with a scale of its own, a float32; host pools only

    def slot_bytes(self, head_dim: int) -> int:
        """Of K or V of one token and head."""
        if self is KvDtype.INT8:
            return head_dim + 4
        return head_dim * {KvDtype.FLOAT32: 4, KvDtype.FP8_E4M3: 1}.get(self, 2)


class PageState(IntEnum):
    FREE = 0
    FILLING = 1  # one row writes it
    SEALED = 2  # immutable, hashed, shareable


class RowState(IntEnum):
    FREE = 0
    LIVE = 1  # a sequence's; its index is the output's
    PINNED = 2  # a reserved prefix, all sealed; its key is the pin's, its index the place in `pin_name`


class Reason(IntEnum):
    """Why an output ended: bits 8..15 of its terminal word."""

    NONE = 0
    STOP = 1
    LENGTH = 2
    CANCELLED = 3


def page_word(state: PageState, generation: int) -> int:
    return int(state) | (generation & LOW32) << 32


def row_word(state: RowState, index: int, generation: int) -> int:
    return int(state) | (index & 0xFFFFFF) << 8 | (generation & LOW32) << 32


def state_of(word: int) -> int:
    return int(word) & 0xFF


def index_of(word: int) -> int:
    return int(word) >> 8 & 0xFFFFFF


def generation_of(word: int) -> int:
    return int(word) >> 32


def entry(page: int, generation: int) -> int:
    return page | (generation & LOW32) << 32


def page_of(entry_word: int) -> int:
    return int(entry_word) & LOW32


def progress_word(computed: int, known: int) -> int:
    return computed | known << 32


def terminal_word(reason: Reason, length: int) -> int:
    """`length` counts the output's own tokens. Zero is: not ended."""
    return 1 | int(reason) << 8 | length << 32


class Strides(NamedTuple):
    """Bytes. Of a slot: page x `page` + layer x `layer` + (0 for K, 1 for V) x `half`, and within those
    [kv_head][slot]."""

    page: int
    layer: int
    half: int


@dataclass(frozen=True, slots=True)
class Geometry:
    """The shape of a pool and its tables; fixed for the pool's life."""

    pages: int  # with page 0, which is reserved
    rows: int
    page_size: int  # tokens
    layers: int
    kv_heads: int
    head_dim: int
    kv_dtype: KvDtype
    layout_id: int
    max_model_len: int  # tokens

    @property
    def row_entries(self) -> int:
        return -(-self.max_model_len // self.page_size)

    @property
    def page_bytes(self) -> int:
        """K and V of all layers for `page_size` tokens."""
        return self.layers * 2 * self._half_bytes

    @property
    def _half_bytes(self) -> int:
        """K or V of one layer."""
        return self.kv_heads * self.page_size * self.kv_dtype.slot_bytes(self.head_dim)

    @property
    def strides(self) -> Strides:
        half = self._half_bytes
        if self.layout_id == LAYER_MAJOR:
            return Strides(page=2 * half, layer=self.pages * 2 * half, half=half)
        return Strides(page=self.page_bytes, layer=2 * half, half=half)

    @property
    def scales(self) -> int:
        """How many scales `tables` holds."""
        return self.layers * 2 * self.kv_heads if self.kv_dtype is KvDtype.FP8_E4M3 else 0


class Tables:
    """Views over the bytes of `tables`; see the module's table."""

    def __init__(
        self,
        buffer: memoryview | bytearray,
        pages: int,
        rows: int,
        entries: int,
        page_size: int,
        scales: int = 0,
    ) -> None:
        """rows: for sequences. scales: as in `Geometry`; they come last, whoever needs none may leave them out."""
        self._buffer = buffer
        self._offset = 0
        self.rows = rows
        self.header: U64 = self._words(HEADER_WORDS)
        self.page_word: U64 = self._words(pages)
        self.page_hash: U64 = self._words(pages * 2).reshape(pages, 2)
        self.page_parent: U64 = self._words(pages * 2).reshape(pages, 2)
        self.page_used: U64 = self._words(pages)
        self.page_tokens: U32 = (
            self._words(-(-pages * page_size // 2)).view(np.uint32)[: pages * page_size].reshape(pages, page_size)
        )
        all_rows = rows + MOST_PINS
        self.row_word: U64 = self._words(all_rows)
        self.row_key: U64 = self._words(all_rows * 2).reshape(all_rows, 2)
        self.row_length: U64 = self._words(all_rows)
        self.row_entry: U64 = self._words(all_rows * entries).reshape(all_rows, entries)
        self.pin_name: U64 = self._words(MOST_PINS * PIN_NAME_WORDS).reshape(MOST_PINS, PIN_NAME_WORDS)
        self.scales: F32 = self._words(-(-scales // 2)).view(np.float32)[:scales]  # [layers * 2 * kv_heads]

    def _words(self, count: int) -> U64:
        """The next `count` words; each array starts at a multiple of 64 bytes."""
        view = np.frombuffer(self._buffer, np.uint64, count, self._offset)
        self._offset += -(-view.nbytes // 64) * 64
        return view

    @staticmethod
    def nbytes(pages: int, rows: int, entries: int, page_size: int, scales: int = 0) -> int:
        all_rows = rows + MOST_PINS
        parts = (
            HEADER_WORDS * 8,
            pages * 8,
            pages * 16,
            pages * 16,
            pages * 8,
            pages * page_size * 4,
            all_rows * 8,
            all_rows * 16,
            all_rows * 8,
            all_rows * entries * 8,
            MOST_PINS * PIN_NAME_WORDS * 8,
            scales * 4,
        )
        return sum(-(-part // 64) * 64 for part in parts)


class OutputLog:
    """One output's part of a log: its progress, its end, its tokens by position."""

    __slots__ = ("capacity", "logprobs", "prompt_length", "tokens", "words")

    def __init__(self, words: U64, tokens: U32, logprobs: F32 | None, prompt_length: int) -> None:
        self.words = words  # u64[8]: progress, terminal, cached tokens
        self.tokens = tokens  # u32[capacity]
        self.logprobs = logprobs  # f32[capacity]
        self.prompt_length = prompt_length
        self.capacity = len(tokens)

    @property
    def computed(self) -> int:
        return int(self.words[0]) & LOW32

    @property
    def known(self) -> int:
        return int(self.words[0]) >> 32

    @property
    def ended(self) -> bool:
        return bool(int(self.words[1]) & 1)

    @property
    def reason(self) -> Reason:
        return Reason(int(self.words[1]) >> 8 & 0xFF)

    @property
    def final_length(self) -> int:
        """Tokens of the output itself; only meaningful once it has ended."""
        return int(self.words[1]) >> 32

    @property
    def cached_tokens(self) -> int:
        return int(self.words[2])

    @property
    def is_sound(self) -> bool:
        """Whether the words can be what an executor has stored; positions that they name exist."""
        terminal = int(self.words[1])  # first: a live executor stores it last
        progress = int(self.words[0])
        computed, known = progress & LOW32, progress >> 32
        reason, length = terminal >> 8 & 0xFF, terminal >> 32
        return (
            computed <= known <= self.capacity
            and self.prompt_length <= known
            and (not terminal or (terminal & 1 == 1 and 0 < reason < len(Reason)))
            and length <= known - self.prompt_length
        )

    def set_progress(self, computed: int, known: int) -> None:
        self.words[0] = progress_word(computed, known)

    def set_terminal(self, reason: Reason, length: int) -> None:
        self.words[1] = terminal_word(reason, length)

    def set_cached_tokens(self, cached: int) -> None:
        self.words[2] = cached


class RequestLog:
    """Views over the bytes of one `<key>.log`."""

    def __init__(self, buffer: memoryview | bytearray) -> None:
        header = np.frombuffer(buffer, np.uint64, LOG_HEADER_WORDS)
        if len(buffer) < LOG_HEADER_WORDS * 8 or int(header[0]) != LOG_MAGIC or int(header[1]) != LAYOUT_VERSION:
            raise ValueError("not a request log of this layout version")
        outputs, capacity, prompt_length, flags = (int(word) for word in header[2:6])
        if len(buffer) < self.nbytes(outputs, capacity, bool(flags & FLAG_LOGPROBS)):
            raise ValueError("request log is shorter than its header says")
        self.header: U64 = header
        self.outputs: list[OutputLog] = []
        offset = LOG_HEADER_WORDS * 8
        for _ in range(outputs):
            words = np.frombuffer(buffer, np.uint64, OUTPUT_WORDS, offset)
            offset += OUTPUT_WORDS * 8
            tokens = np.frombuffer(buffer, np.uint32, capacity, offset)
            offset += -(-capacity * 4 // 64) * 64
            logprobs = None
            if flags & FLAG_LOGPROBS:
                logprobs = np.frombuffer(buffer, np.float32, capacity, offset)
                offset += -(-capacity * 4 // 64) * 64
            self.outputs.append(OutputLog(words, tokens, logprobs, prompt_length))

    @staticmethod
    def nbytes(outputs: int, capacity: int, logprobs: bool) -> int:
        return LOG_HEADER_WORDS * 8 + outputs * output_nbytes(capacity, logprobs)

    @classmethod
    def create(
        cls, buffer: memoryview | bytearray, outputs: int, capacity: int, prompt: U32, logprobs: bool
    ) -> RequestLog:
        """Fills zeroed bytes: computed 0, known the prompt's length, for every output."""
        header = np.frombuffer(buffer, np.uint64, LOG_HEADER_WORDS)
        header[:6] = (LOG_MAGIC, LAYOUT_VERSION, outputs, capacity, len(prompt), FLAG_LOGPROBS if logprobs else 0)
        log = cls(buffer)
        for output in log.outputs:
            output.tokens[: len(prompt)] = prompt
            output.set_progress(0, len(prompt))
        return log


def usable_computed(tables: Tables, row: int, progress_computed: int) -> int:
    """How far a row's K/V can be trusted, in tokens: what successors, sealing and fsck go by.

    min(max(computed, page_size x leading sealed or `none` entries), page_size x entries).
    """
    page_size = int(tables.page_tokens.shape[1])
    length = int(tables.row_length[row])
    pages = (tables.row_entry[row, :length] & np.uint64(LOW32)).astype(np.int64)
    states = tables.page_word[pages] & np.uint64(0xFF)
    settled = (pages == NO_PAGE) | (states == np.uint64(PageState.SEALED))
    leading = length if settled.all() else int(np.argmin(settled))
    return min(max(progress_computed, page_size * leading), page_size * length)
