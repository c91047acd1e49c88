import sys

import pytest

from at_smooth.module_source import importable, source_of


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """The working directory, and what is imported in a test forgotten after it."""
    path = tmp_path / "here"
    path.mkdir()
    monkeypatch.chdir(path)
    before = set(sys.modules)
    yield path
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder on the Python path."""
    path = tmp_path / "elsewhere"
    path.mkdir()
    monkeypatch.syspath_prepend(path)
    return path


def write(path, text="raise RuntimeError('it was imported')\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_module_is_found_and_not_imported(here, elsewhere):
    own, other = write(here / "own_one.py"), write(elsewhere / "other_one.py")
    assert source_of("own_one") == (here, own)
    assert source_of("other_one") == (elsewhere, other)
    assert source_of("no_such_module") is None


@pytest.mark.parametrize("init", [True, False])
def test_a_submodule_is_found_and_its_packages_are_not_imported(here, init):
    file = write(here / "pack" / "inner" / "leaf.py")
    if init:
        write(here / "pack" / "__init__.py")
        write(here / "pack" / "inner" / "__init__.py")
    assert source_of("pack.inner.leaf") == (here, file)
    assert source_of("pack.inner") == ((here, here / "pack" / "inner" / "__init__.py") if init else None)
    assert source_of("pack.inner.other") is None
    assert source_of("pack.inner.leaf.more") is None
    assert not [name for name in sys.modules if name.partition(".")[0] == "pack"]


def test_the_working_directory_comes_first_as_in_the_import(here, elsewhere):
    write(elsewhere / "twice.py")
    assert source_of("twice").root == elsewhere
    write(here / "twice.py")
    assert source_of("twice").root == here


def test_a_package_with_an_init_comes_before_a_folder_without_one(here, elsewhere):
    write(here / "half" / "leaf.py")
    write(elsewhere / "half" / "__init__.py", "")
    assert source_of("half.leaf") is None
    file = write(elsewhere / "half" / "leaf.py")
    assert source_of("half.leaf") == (elsewhere, file)


def test_what_is_imported_already_stays_what_it_is(here, elsewhere):
    file = write(elsewhere / "known_one.py", "")
    __import__("known_one")
    write(here / "known_one.py")
    assert source_of("known_one") == (elsewhere, file)


@pytest.mark.parametrize("module", ["sys", "builtins", "_imp", "sys.flags", "math.pi"])
def test_what_is_built_into_python_has_no_file_or_python_s_own(module):
    source = source_of(module)
    assert source is None or str(source.root).startswith(sys.base_prefix)


def test_a_link_to_a_module_is_another_module(here, elsewhere):
    file = write(elsewhere / "linked.py")
    (here / "linked.py").symlink_to(file)
    assert source_of("linked").file == here / "linked.py"


def test_a_folder_is_the_same_by_any_way_to_it(here, elsewhere, tmp_path, monkeypatch):
    file = write(elsewhere / "some_module.py")
    way = tmp_path / "way"
    way.symlink_to(elsewhere)
    monkeypatch.chdir(way)
    assert source_of("some_module") == (elsewhere, file)


def test_files_of_the_working_directory_take_no_place_in_modules_from_elsewhere(here, elsewhere):
    write(elsewhere / "outer_one.py", "import inner_one")
    write(elsewhere / "inner_one.py", "where = 'elsewhere'")
    write(here / "inner_one.py")
    with importable("outer_one"):
        assert __import__("outer_one").inner_one.where == "elsewhere"


def test_a_module_of_the_working_directory_reaches_those_beside_it(here):
    write(here / "outer_two.py", "import inner_two")
    write(here / "inner_two.py", "")
    before = list(sys.path)
    with importable("outer_two"):
        __import__("outer_two")
    assert sys.path == before


def test_a_removed_working_directory_is_no_error(here):
    here.rmdir()
    assert source_of("no_such_module") is None
    with importable("no_such_module"):
        pass


def test_a_failing_import_hook_is_no_error(monkeypatch):
    class Hook:
        def find_spec(self, *arguments):
            raise RuntimeError("no luck")

    monkeypatch.setattr(sys, "meta_path", [Hook()])
    assert source_of("no_such_module") is None
