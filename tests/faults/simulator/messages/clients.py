"""Clients over the product's own client library, and what each of them may hear."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from typing import Any

import grpc

from pagehold.client import Client
from pagehold.v1 import inference_pb2 as api
from pagehold.v1 import inference_pb2_grpc as api_grpc
from tests.faults.simulator.faults import Violation
from tests.faults.simulator.messages.components import FRONTEND_ADDRESS
from tests.faults.simulator.messages.loop import Process, VirtualLoop
from tests.faults.simulator.messages.network import Network
from tests.faults.simulator.messages.requests import Conduct, Planned

_PAUSE_SECONDS = 4.0
_RETRY_SECONDS = 0.05
_PATIENCE_SECONDS = 600.0

_REFUSALS = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.FAILED_PRECONDITION)


class Heard:
    """What has reached one client: every (output, offset, token) once, in order, equal to an undisturbed run."""

    def __init__(self, planned: Planned) -> None:
        self._planned = planned
        self._outputs = planned.outputs
        self.tokens: list[list[int]] = [[] for _ in self._outputs]
        self.ends: dict[int, api.Finished] = {}
        self.accepted = False

    @property
    def count(self) -> int:
        return sum(map(len, self.tokens))

    @property
    def finished(self) -> bool:
        return len(self.ends) == len(self.tokens)

    def again(self) -> None:
        """The request was sent once more: all is heard from the start."""
        self.tokens = [[] for _ in self.tokens]
        self.ends = {}

    def take(self, response: api.GenerateResponse) -> None:
        match response.WhichOneof("event"):
            case "accepted":
                self._accepted(response.accepted)
            case "tokens":
                self._tokens(response.tokens)
            case "finished":
                self._finished(response.finished)

    def _accepted(self, accepted: api.Accepted) -> None:
        self.accepted = True
        if accepted.request_id != self._planned.name or accepted.prompt_tokens != self._planned.prompt_tokens:
            raise Violation(f"{self._planned.name} was accepted as {accepted.request_id}")

    def _tokens(self, run: api.Tokens) -> None:
        name = f"output {run.index} of {self._planned.name}"
        if run.index >= len(self.tokens) or run.index in self.ends:
            raise Violation(f"tokens of {name}, which has ended or was never asked for")
        tokens = self.tokens[run.index]
        if run.offset != len(tokens):
            raise Violation(f"{name}: a gap or a repetition at offset {run.offset}, {len(tokens)} are there")
        tokens += run.token_ids
        truth = self._outputs[run.index].tokens[self._planned.prompt_tokens :]
        if tokens != truth[: len(tokens)]:
            raise Violation(f"{name}: tokens that an undisturbed run does not have")

    def _finished(self, finished: api.Finished) -> None:
        index, planned = finished.index, self._planned
        name = f"output {index} of {planned.name}"
        if index in self.ends:
            raise Violation(f"{name} has finished twice")
        self.ends[index] = finished
        length, truth = len(self.tokens[index]), self._outputs[index].tokens[planned.prompt_tokens :]
        if finished.usage.completion_tokens != length:
            raise Violation(f"{name} has {finished.usage.completion_tokens} tokens, and {length} were sent")
        if finished.reason != api.FINISH_REASON_CANCELLED:
            stops = truth[-1] in planned.message.stopping.stop_token_ids
            reason = api.FINISH_REASON_STOP if stops else api.FINISH_REASON_LENGTH
            if length != len(truth) or finished.reason != reason:
                raise Violation(f"{name} ended for another reason, or elsewhere")


class ClientActor:
    """One request's client, or several of them after each other."""

    def __init__(self, network: Network, planned: Planned, rng: random.Random) -> None:
        self._network = network
        self._loop: VirtualLoop = network.loop
        self._rng = rng
        self.planned = planned
        self.heard = Heard(planned)
        self.refused = False
        self.lives = 0
        self.taken_over = 0
        self._process: Process | None = None

    async def run(self) -> None:
        """To the end of what this client wants. Raises Violation."""
        await asyncio.sleep(self.planned.arrives)
        life = self._generate(self.planned.conduct)
        while True:
            try:
                left = await self._live(life)
            except grpc.aio.AioRpcError as error:
                self._take_error(error)
                if self.refused:
                    return
                left = True
            if not left or self.planned.conduct in (Conduct.LEAVE, Conduct.VANISH):
                return
            await asyncio.sleep(self._rng.uniform(0.01, 0.3))
            life = self._next_life()

    def _next_life(self) -> Coroutine[Any, Any, bool]:
        if self.planned.conduct is Conduct.RESUME and self.heard.accepted:
            return self._resume()
        self.heard.again()
        return self._generate(Conduct.READ)

    def _take_error(self, error: grpc.aio.AioRpcError) -> None:
        """Raises Violation for what may not come."""
        if error.code() in _REFUSALS and not self.heard.accepted:
            self.refused = True
        elif error.code() is grpc.StatusCode.ABORTED and self._has_broken_stream:
            # By its own older stream, whose frontend has not noticed yet that it broke.
            self.taken_over += 1
        else:
            raise Violation(f"{self.planned.name} was given {error.code().name}: {error.details()}")

    @property
    def _has_broken_stream(self) -> bool:
        return self.lives > 1 or self._network.client_breaks > 0

    async def _live(self, life: Coroutine[Any, Any, bool]) -> bool:
        """Runs one client process to its end, or to its death. Whether it left before the request was over."""
        self.lives += 1
        process = self._process = Process(self._loop, f"client {self.planned.name}")
        self._network.attach(process)
        task = process.spawn(life)
        try:
            return bool(await asyncio.shield(task))
        except asyncio.CancelledError:
            if process.alive:
                raise
            return True
        finally:
            process.kill()

    async def _generate(self, conduct: Conduct) -> bool:
        request = api.GenerateRequest()
        request.CopyFrom(self.planned.message)
        async with Client(FRONTEND_ADDRESS, _PATIENCE_SECONDS) as client:
            done = False
            async for response in client.generate(request):
                self.heard.take(response)
                if not done and self.heard.accepted and self.heard.count >= self.planned.after:
                    done = True
                    if await self._act(conduct, client):
                        return True
        return False

    async def _act(self, conduct: Conduct, client: Client) -> bool:
        """What is not reading. Whether that was the last that this process does."""
        assert self._process is not None
        match conduct:
            case Conduct.REPEAT | Conduct.RESUME | Conduct.VANISH:
                self._process.kill()
                await asyncio.sleep(0)  # its end
            case Conduct.PAUSE:
                await asyncio.sleep(_PAUSE_SECONDS)
            case Conduct.CANCEL:
                await client.cancel(self.planned.name)
            case Conduct.LEAVE:
                return True
            case _:
                pass
        return False

    async def _resume(self) -> bool:
        """As a client without the library: at exactly its offsets, at any frontend, until all is over."""
        async with grpc.aio.insecure_channel(FRONTEND_ADDRESS) as channel:
            stub = api_grpc.InferenceServiceStub(channel)
            while not self.heard.finished:
                request = api.ResumeRequest(request_id=self.planned.name)
                for index, tokens in enumerate(self.heard.tokens):
                    request.positions.add(index=index, offset=len(tokens))
                known = set(self.heard.ends)
                try:
                    async for response in stub.Resume(request):
                        if response.WhichOneof("event") == "finished" and response.finished.index in known:
                            known.discard(response.finished.index)  # `finished` is repeated for what has ended
                            continue
                        self.heard.take(response)
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.UNAVAILABLE:
                        raise
                await asyncio.sleep(_RETRY_SECONDS)
        return False

    def check(self) -> None:
        """Whoever stayed has heard all there is."""
        if self.refused or self.planned.conduct in (Conduct.LEAVE, Conduct.VANISH):
            return
        if not self.heard.finished:
            raise Violation(f"{self.planned.name} never heard the end")
        cancelled = [end for end in self.heard.ends.values() if end.reason == api.FINISH_REASON_CANCELLED]
        if cancelled and self.planned.conduct is not Conduct.CANCEL and not self._may_be_cancelled:
            raise Violation(f"{self.planned.name} was cancelled, which nobody asked for")

    @property
    def _may_be_cancelled(self) -> bool:
        """Its client went away for longer than its grace."""
        grace = self.planned.message.response.detach_grace.ToMilliseconds()
        return grace < 30_000
