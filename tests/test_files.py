"""What is there is not replaced: links are written through, devices written to, and a new name is taken once."""

import multiprocessing
import os
import shutil
import socket
import stat
import threading
from contextlib import contextmanager

import pytest

from at_smooth import InputError, StorageError, TakenError, train
from at_smooth.files import (
    claimed_folder,
    create,
    create_first_free,
    creating_folder,
    refuse_taken_file,
    replacing,
    usable_path,
    write_atomically,
)
from at_smooth.results import keep_in_run, kept_in_run

ROUNDS, AT_ONCE = 5, 4

fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes cannot be forked")


def together(function):
    """What a function of a number gives, or which error it raises, in processes that begin it at the same moment."""
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(AT_ONCE), context.SimpleQueue()

    def child(number):
        barrier.wait()
        try:
            answers.put(function(number))
        except Exception as error:
            answers.put(error)

    children = [context.Process(target=child, args=(number,)) for number in range(AT_ONCE)]
    for each in children:
        each.start()
    found = [answers.get() for _ in children]
    for each in children:
        each.join()
    return found


@contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("write", [create, write_atomically])
def test_a_link_is_written_through(tmp_path, write):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "file").touch()
    link = tmp_path / "link"
    link.symlink_to("elsewhere/file")
    write(link, b"content")
    assert link.is_symlink()
    assert (folder / "file").read_bytes() == b"content"
    assert os.listdir(folder) == ["file"]


@pytest.mark.parametrize("write", [create, write_atomically])
def test_permissions_are_those_of_the_file_or_of_the_umask(tmp_path, write):
    (tmp_path / "own").touch()
    (tmp_path / "own").chmod(0o600)
    with umask(0o022):
        write(tmp_path / "own", b"content")
        write(tmp_path / "new", b"content")
    with umask(0o077):
        write(tmp_path / "private", b"content")
    assert [mode(tmp_path / name) for name in ("own", "new", "private")] == [0o600, 0o644, 0o600]


@pytest.mark.parametrize("write", [create, write_atomically])
def test_a_fifo_is_written_to(tmp_path, write):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    read = []
    reader = threading.Thread(target=lambda: read.append(path.read_bytes()))
    reader.start()
    refuse_taken_file(path)
    write(path, b"content")
    reader.join()
    assert read == [b"content"]
    assert stat.S_ISFIFO(path.stat().st_mode)


@pytest.mark.parametrize("write", [create, write_atomically])
def test_a_device_is_written_to(write):
    before = os.stat(os.devnull)
    write(usable_path(os.devnull), b"content")
    assert os.path.samestat(before, os.stat(os.devnull))


def test_a_full_device_is_told(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no such device here")
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"cannot write .*full \(No space left on device\)"):
        create(tmp_path / "full", b"content")


def test_what_cannot_be_written_is_refused_and_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        for name, words in {
            "folder": "is a folder",
            "dangling": "is a symbolic link to nowhere, which is not there",
            "socket": "is a socket",
            "a\0b": "holds a NUL",
            "\ud800": "cannot hold such characters",
        }.items():
            for function in (
                refuse_taken_file,
                lambda path: create(path, b""),
                lambda path: write_atomically(path, b""),
            ):
                with pytest.raises(InputError, match=words):
                    function(type(tmp_path)(name))
        with pytest.raises(StorageError, match="loop"):
            refuse_taken_file(tmp_path / "loop")
        assert sorted(os.listdir(tmp_path)) == ["dangling", "folder", "loop", "socket"]
    assert os.readlink(tmp_path / "dangling") == "nowhere"


def test_a_new_file_takes_no_name_that_something_has(tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(TakenError, match="file exists already"):
        create(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"mine"
    assert os.listdir(tmp_path) == ["file"]


def test_without_hard_links_a_name_is_taken_once_too(tmp_path, monkeypatch):
    def refuse(*names):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    create(tmp_path / "file", b"first")
    with pytest.raises(TakenError):
        create(tmp_path / "file", b"second")
    assert (tmp_path / "file").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["file"]


@fork
@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
def test_of_several_processes_one_gets_the_name(tmp_path, there):
    for number in range(ROUNDS):
        path = tmp_path / str(number)
        if there:
            path.touch()
        contents = [bytes([65 + each]) * 100_000 for each in range(AT_ONCE)]
        found = together(lambda each, path=path, contents=contents: create(path, contents[each]))
        assert [type(each) for each in found].count(TakenError) == AT_ONCE - 1
        assert found.count(None) == 1
        assert path.read_bytes() in contents
    assert len(os.listdir(tmp_path)) == ROUNDS


@fork
def test_several_processes_take_a_free_name_each(tmp_path):
    names = [tmp_path / f"report-{number}" for number in range(ROUNDS * AT_ONCE)]
    for _ in range(ROUNDS):
        found = together(lambda each: create_first_free(names, b"%d" % each))
        assert len(set(found)) == AT_ONCE
        assert {path.read_bytes() for path in found} == {b"%d" % each for each in range(AT_ONCE)}
    assert sorted(tmp_path.iterdir()) == sorted(names)


@fork
def test_evaluations_at_the_same_moment_are_all_kept(tmp_path):
    facts = {"n": 5, "checkpoint": "final.pt", "weights": "raw", "part": "test", "dataset": "digits", "results": {}}
    content = {**facts, "threat": {"norm": "Linf", "eps": 0.1}}
    for number in range(ROUNDS):
        run = tmp_path / str(number)
        run.mkdir()
        together(lambda each, run=run: keep_in_run(run, "evaluation", {**content, "by": each}))
        assert sorted(each["by"] for each in kept_in_run(run, "evaluation")) == list(range(AT_ONCE))


@fork
@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
def test_of_several_processes_one_gets_the_folder(tmp_path, there):
    def fill(each, path):
        with creating_folder(path) as folder:
            (folder / f"by-{each}").touch()
            (folder / "all").touch()

    for number in range(ROUNDS):
        path = tmp_path / str(number)
        if there:
            path.mkdir()
        found = together(lambda each, path=path: fill(each, path))
        assert sorted(type(each).__name__ for each in found) == ["NoneType"] + ["TakenError"] * (AT_ONCE - 1)
        assert len(os.listdir(path)) == 2
    assert len(os.listdir(tmp_path)) == ROUNDS


@fork
def test_several_processes_claim_a_folder_each(tmp_path):
    def claim(each):
        with claimed_folder(tmp_path / "runs" / f"run-{number}" for number in range(100)) as path:
            (path / str(each)).touch()
            return path

    assert len(set(together(claim))) == AT_ONCE
    assert sorted(os.listdir(tmp_path / "runs")) == [f"run-{number}" for number in range(AT_ONCE)]


def test_processes_of_one_id_do_not_write_into_one_file(tmp_path, monkeypatch):  # in containers, on several machines
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with replacing(tmp_path / "file") as file:
        file.write(b"first, ")
        file.flush()
        write_atomically(tmp_path / "file", b"second")
        file.write(b"and whole")
    assert (tmp_path / "file").read_bytes() == b"first, and whole"
    assert os.listdir(tmp_path) == ["file"]


def test_a_claimed_folder_with_nothing_in_it_goes(tmp_path):
    with claimed_folder([tmp_path / "run"]) as path:
        assert path.is_dir()
    assert not os.listdir(tmp_path)


def test_a_folder_that_fails_leaves_nothing(tmp_path):
    def fail():
        with creating_folder(tmp_path / "out") as folder:
            (folder / "part").touch()
            raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match=r"cannot write .*out \(No space"):
        fail()
    assert not os.listdir(tmp_path)


def test_a_link_to_an_empty_folder_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("real")
    with creating_folder(tmp_path / "link") as folder:
        (folder / "file").touch()
    assert (tmp_path / "link").is_symlink()
    assert os.listdir(tmp_path / "real") == ["file"]
    assert mode(tmp_path / "real") == 0o700


def test_the_working_directory_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="is the working directory"), creating_folder(usable_path(".")):
        pass


def test_what_another_process_writes_into_a_run_is_no_leftover_of_training(tmp_path, plain_run):
    shutil.copytree(plain_run.path, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "run" / "evaluations").mkdir()
    leftovers = [".last.pt.12.part", ".metrics.csv.12ab.part"]
    others = [".evaluation-1.json.34.part", ".report.html.34.part"]
    places = ["checkpoints", ".", "evaluations", "."]
    for folder, name in zip(places, leftovers + others, strict=True):
        (tmp_path / "run" / folder / name).write_bytes(b"half")
    train(plain_run.recipe, tmp_path / "run", resume=True)
    assert {path.name for path in (tmp_path / "run").rglob("*.part")} == set(others)
