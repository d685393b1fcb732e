"""A request and its sequences, as the executor holds them while it works on them.

Everything here can be made again from the record, the log and the tables: `load` does it
for a new request, for a client that comes back, and after a death, alike.

A sequence is two numbers, `computed` <= `known`. A step raises `computed`; when it reaches
`known`, a token is sampled and `known` grows by one, or by more where guesses at the tokens after it were right.

        0 ............ computed ............ known ............ limit
        K/V in pages,  | tokens known,       | nothing yet
        final          | K/V to be computed  |

Each of them is held twice. What is planned counts a step as soon as it is submitted; what is committed counts it
once it is collected, and is what the log says. They differ only while a step of the sequence is under way.

    planned     committed   used by
    computed    settled
    known       committed
    ---------------------------------------------------------------------------------------------------
    planned                 scheduler.plan: where the next chunk begins, and whether its page is there
                            pages: growth, starving, what a trim leaves;  trace: what lacks a page
    committed               publisher, parking, stop rules, cancel, stop_at, attach offsets: `length`
                            forks: a source has its prompt;  scheduler.filling: a page that is sealed soon
                            preemption: tokens since the row came;  progress words that are stored
    either                  admission, grants, requests.adopt, runner.prepare: no row, so nothing is under way

A sequence that loses its row while a step of it is under way goes back to what is committed; the step's result is
dropped when it comes (`row` < 0 until then: the next row is asked for after the `close`, which waits for the step).

    WAITING  no row; asks for one when there is room
    RUNNING  has a row; in every step's plan unless it lacks a page or is parked
    ENDED    its terminal word is stored
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvmanager.layout import OutputLog, Reason, RequestLog
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.runtime.mapping import map_shared
from pagehold.v1 import inference_pb2 as api
from services.executor.drafting import Drafting
from services.executor.runner.base import Lane, SamplingParams

if TYPE_CHECKING:
    from services.executor.publisher import Connection


_SMALLEST_PAGE: Final = 8  # tokens


class Phase(Enum):
    WAITING = auto()
    RUNNING = auto()
    ENDED = auto()


@dataclass(frozen=True, slots=True)
class StopRules:
    """What ends a sequence, as far as token ids tell. Stop strings are the frontend's."""

    token_ids: frozenset[int]
    min_tokens: int
    max_tokens: int

    def reason(self, token: int, length: int) -> Reason:
        """For the output's `length`-th token. A pure function, so that recovery repeats it."""
        if token in self.token_ids and length >= self.min_tokens:
            return Reason.STOP
        if length >= self.max_tokens:
            return Reason.LENGTH
        return Reason.NONE


@dataclass(slots=True, eq=False)
class Sequence:
    """One output of a request."""

    request: Request
    index: int
    log: OutputLog
    lane: Lane
    arrival: int
    opening: bytes = b""  # salt and first tokens: sequences that differ here share no page
    phase: Phase = Phase.WAITING
    computed: int = 0
    known: int = 0
    settled: int = 0
    committed: int = 0
    row: int = -1
    row_generation: int = 0
    capacity: int = 0  # tokens that the row holds
    ask_from: int = 0  # no further pages are asked for while `known` is below this
    asking: bool = False  # a call for its row, or for more pages, is on its way
    starved: bool = False  # lacks a page for its next step, and there was none to be had
    preempted: bool = False  # has lost a row: what it finds cached may be its own
    resumed_at: int | None = None  # `committed` when it got a row back
    forking: Sequence | None = None  # the sibling whose row it has asked to fork
    forkable: bool = True  # until such a row was found gone
    held_until: float = 0.0  # waits for a neighbour's pages until this time, at most
    cached_tokens: int = 0
    cursor: int = 0  # the next of the output's tokens that its stream wants
    end_sent: bool = False
    drafting: Drafting = field(default_factory=Drafting)
    prompt_length: int = field(init=False)
    # K/V positions that the sequence can come to need: its last token is never fed.
    limit: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_length = self.log.prompt_length
        self.limit = max(self.log.capacity - 1, self.prompt_length)

    @property
    def length(self) -> int:
        """Tokens of the output so far."""
        return self.log.final_length if self.phase is Phase.ENDED else self.committed - self.prompt_length

    @property
    def priority(self) -> int:
        return self.request.priority

    @property
    def since_resumed(self) -> int | None:
        """Tokens committed since it got its row back; None: it has lost none."""
        return None if self.resumed_at is None else self.committed - self.resumed_at

    def settle(self, computed: int) -> None:
        """So much is computed in its row, and no step that is under way counts any more."""
        self.computed = self.settled = computed
        self.known = self.committed

    @property
    def is_being_forked(self) -> bool:
        """A sibling's call that relies on this row, and on what is computed in it, is on its way."""
        return any(sibling.forking is self for sibling in self.request.sequences)

    @property
    def priority_key(self) -> tuple[int, int, int]:
        """Sorts those to be served first to the front."""
        return (-self.request.priority, self.arrival, self.index)


@dataclass(slots=True, eq=False)
class Request:
    """One client call: its record, its sequences, and the stream that reads it."""

    key: str
    record: kv.RequestRecord
    message: api.GenerateRequest
    rules: StopRules
    sequences: list[Sequence] = field(default_factory=list)
    connection: Connection | None = None  # None: detached
    stream_id: int = 0
    describe: bool = False  # the stream wants the record before any token
    recomputed: bool = False  # its stream is to be told that pages were lost
    expires: float = 0.0  # monotonic seconds: a detached request is cancelled then

    @property
    def priority(self) -> int:
        return self.message.priority

    @property
    def is_ranked(self) -> bool:
        """Whether the client gets only the best of its outputs, renumbered."""
        return len(self.sequences) > max(self.message.n, 1)

    @property
    def ended(self) -> bool:
        return all(sequence.phase is Phase.ENDED for sequence in self.sequences)


def sampling_params(message: api.GenerateRequest, record: kv.RequestRecord, stops: tuple[int, ...]) -> SamplingParams:
    """The request's sampling with every default filled in. stops: token ids that end it."""
    asked = message.sampling

    def value(name: str, default: float) -> float:
        return float(getattr(asked, name)) if asked.HasField(name) else default

    return SamplingParams(
        temperature=value("temperature", 1.0),
        top_p=value("top_p", 1.0),
        top_k=int(value("top_k", 0)),
        min_p=value("min_p", 0.0),
        seed=record.seed,
        repetition_penalty=value("repetition_penalty", 1.0),
        presence_penalty=value("presence_penalty", 0.0),
        frequency_penalty=value("frequency_penalty", 0.0),
        logit_bias=tuple(sorted(asked.logit_bias.items())),
        suppressed=stops if message.stopping.min_tokens else (),
        min_tokens=message.stopping.min_tokens,
        logprobs=record.logprobs,
    )


def map_log(path: Path) -> RequestLog:
    """Maps a log for writing. Raises FileNotFoundError when it was forgotten."""
    # No child inherits it: holding executor.lock proves that writers are dead.
    return RequestLog(map_shared(path, writable=True))


def load(records: Path, key: str, eos_token_ids: tuple[int, ...], arrival: int) -> Request:
    """Makes a request from its files. Raises FileNotFoundError when there is no record."""
    record = kv.RequestRecord.FromString((records / f"{key}.req").read_bytes())
    log = map_log(records / f"{key}.log")
    message = api.GenerateRequest.FromString(record.request)
    eos = () if message.stopping.ignore_eos else eos_token_ids
    stops = tuple(sorted({*eos, *message.stopping.stop_token_ids}))
    rules = StopRules(frozenset(stops), message.stopping.min_tokens, record.max_tokens)
    request = Request(key, record, message, rules)
    params = sampling_params(message, record, stops)
    for index, output in enumerate(log.outputs):
        lane = Lane(output.tokens, output.prompt_length, index, params)
        sequence = Sequence(request, index, output, lane, arrival)
        sequence.opening = message.cache_salt.encode() + b"\0" + output.tokens[:_SMALLEST_PAGE].tobytes()
        sequence.committed = output.known
        sequence.settle(output.computed)
        sequence.cached_tokens = output.cached_tokens
        if not output.ended:
            _derive_end(output, rules, sequence)
        if output.ended:
            sequence.phase = Phase.ENDED
        request.sequences.append(sequence)
    return request


def _derive_end(output: OutputLog, rules: StopRules, sequence: Sequence) -> None:
    """A death between the last token and its terminal word: the tokens say what was meant."""
    length = sequence.length
    if length > 0:
        reason = rules.reason(int(output.tokens[sequence.committed - 1]), length)
        if reason is not Reason.NONE:
            output.set_terminal(reason, length)
