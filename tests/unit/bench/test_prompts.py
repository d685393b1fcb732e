from __future__ import annotations

from peers_lib.prompts import ask, copies, passages


def test_passages_are_text_enough_to_be_copied() -> None:
    found = passages()
    assert len(found) > 100
    assert {len(passage.split()) for passage in found} == {160}


def test_every_task_has_the_whole_passage() -> None:
    passage = passages()[40]
    asked = [ask(passage, task) for task in range(4)]
    assert all(passage in text for text in asked)
    assert asked[1].count(passage) == 2
    assert len(set(asked)) == 4
    assert ask(passage, 4) == asked[0]


def test_an_edit_is_of_a_word_that_is_there() -> None:
    assert ask("some words and other words", 2).startswith(
        'Copy the following text, but write "widget" wherever it says "words"'
    )


def test_copies_take_each_passage_once() -> None:
    said: list[str] = []

    def speak(text: str) -> list[int]:
        said.append(text)
        return [1, 2, 3]

    requests = copies(7, 12, 5, "c", speak)
    assert [request.id for request in requests] == [f"c-{number}" for number in range(12)]
    assert len(set(said)) == 12
    assert copies(7, 12, 5, "c", speak) == requests
