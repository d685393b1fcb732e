"""An executor that dies at every hit of every failpoint of a short life: the next one goes on as if nothing was.

The scene has all there is to lose: prompts in chunks, a full prefix hit, outputs that share a prompt and copy its
last page, a pool so small that rows are taken away, an end by a stop token, an end by length.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.runtime import failpoint
from tests.unit.executor.checking_runner import expected
from tests.unit.executor.test_engine import prompt_of
from tests.unit.executor.world import Frontend, World

LONG = prompt_of(1, 48)
STOPPED = expected(prompt_of(3, 20), 80)[69]
OUTPUTS = {
    # (stream, output): what it must come to
    (1, 0): expected(LONG, 80),
    (2, 0): expected(LONG, 64, index=0),
    (2, 1): expected(LONG, 64, index=1),
    (3, 0): expected(prompt_of(3, 20), 70),
    **{(4, index): expected(prompt_of(4, 21), 20, index=index) for index in range(4)},
}


class Scene:
    """Clients that reconnect whenever the executor has died."""

    def __init__(self, root: Path, depth: int = 0) -> None:
        self.world = World(root, pages=13, max_batch_tokens=32, depth=depth)
        self.heard: dict[tuple[int, int], list[int]] = {output: [] for output in OUTPUTS}
        self.accepted: set[int] = set()
        self.frontend = self.connect()

    def connect(self) -> Frontend:
        frontend = self.world.connect()
        for stream in (1, 2, 3, 4):
            if stream in self.accepted:
                attach = ex.Attach(stream_id=stream, tenant="default", request_id=f"r{stream}")
                for (number, index), tokens in self.heard.items():
                    if number == stream:
                        attach.positions.add(index=index, offset=len(tokens))
                self.world.send(frontend, attach=attach)
            else:
                self.submit(frontend, stream)
        return frontend

    def submit(self, frontend: Frontend, stream: int) -> None:
        if stream == 1:
            self.world.submit(frontend, 1, LONG, 80)
        elif stream == 2:
            self.world.submit(frontend, 2, LONG, 64, n=2)
        elif stream == 4:
            self.world.submit(frontend, 4, prompt_of(4, 21), 20, n=4, priority=1)
        else:
            self.world.submit(frontend, 3, prompt_of(3, 20), 80, stopping={"stop_token_ids": [STOPPED]})

    def listen(self) -> None:
        """Takes over what the present frontend has heard."""
        for (stream, index), tokens in self.heard.items():
            heard = self.frontend.stream(stream)
            tokens += heard.tokens.get(index, [])
            if heard.accepted:
                self.accepted.add(stream)

    def play(self, armed: str, restart_manager: bool, then: str = "") -> int:
        """To the end; how many deaths there were on the way. then: what is armed in the second life."""
        deaths = 0
        for life in (armed, then, ""):
            if not self._live(life):
                break
            deaths += 1
            if restart_manager:
                self.world.manager = self.world._new_manager()
            self.world.start_executor()
            self.frontend = self.connect()
        return deaths

    def _live(self, armed: str) -> bool:
        """Whether it ended with a death."""
        failpoint.arm(armed)
        try:
            self.world.run(turns=5000)
        except failpoint.FailpointError:
            return True
        finally:
            failpoint.arm("")
            self.listen()
        return False

    def check(self) -> None:
        for (stream, index), tokens in OUTPUTS.items():
            assert self.heard[stream, index] == tokens, f"output {index} of stream {stream}"
            ended = self.frontend.stream(stream).ended[index]
            assert ended.length == len(tokens)
            assert ended.reason == (ex.END_REASON_STOP if stream == 3 else ex.END_REASON_LENGTH)
        core = self.world.manager.core
        assert core is not None and not core.live_rows and core.pages.available == core.pages.usable


def test_the_scene_has_all_there_is_to_lose(tmp_path: Path) -> None:
    scene = Scene(tmp_path / "state")
    assert not scene.play("", False)
    scene.check()
    assert scene.world.page_calls.preemptions > 0
    assert scene.frontend.stream(2).ended[0].cached_tokens == 48
    assert scene.world.runner.copied_slots >= 3 * 5


@pytest.mark.parametrize(
    ("point", "stride"),
    [
        ("executor.ensure.before", 1),
        ("executor.ensure.after", 1),
        ("executor.submit.before", 1),
        ("executor.accept.before", 1),
        ("executor.grant.before", 1),
        ("executor.copy.before", 1),
        ("executor.copy.after", 1),
        ("executor.preempt.before", 1),
        ("executor.preempt.after", 1),
        ("executor.run.before", 7),
        ("executor.run.after", 7),
        ("executor.token.after", 31),
        ("executor.commit.before", 11),
        ("executor.commit.after", 11),
        ("executor.finish.before", 1),
        ("executor.finish.after", 1),
        ("executor.publish.before", 9),
        ("executor.publish.after", 9),
    ],
)
def test_death_at_every_hit(tmp_path: Path, point: str, stride: int) -> None:
    hit = 1
    while True:
        scene = Scene(tmp_path / str(hit))
        died = scene.play(f"{point}=error@{hit}", restart_manager=hit % 2 == 0)
        scene.check()
        if not died:
            break
        hit += stride
    print(f"{point}: died at {(hit - 1) // stride} places")
    assert hit > 3


@pytest.mark.parametrize(
    "point",
    [
        "executor.map.after",
        "executor.adopt.before",
        "executor.adopt.after",
        "executor.resume.before",
        "executor.resume.after",
        "executor.grant.before",
        "executor.run.after",
    ],
)
def test_death_in_the_middle_of_a_recovery(tmp_path: Path, point: str) -> None:
    hit = 1
    while hit <= 4:
        scene = Scene(tmp_path / str(hit))
        deaths = scene.play("executor.commit.after=error@120", hit % 2 == 0, then=f"{point}=error@{hit}")
        scene.check()
        if deaths == 1:
            break
        hit += 1
    assert hit > 1
