import pytest
import torch
from torch import nn

from at_smooth.interfaces import Outcome
from at_smooth.journal import Journal, Memory, digest, digest_of_model, digest_of_tensors


def outcome(n=4):
    return Outcome([], torch.full((n,), -1), torch.full((n,), float("inf")))


def begun():
    """An outcome in the middle of a stage."""
    state = outcome()
    state.broken_by[1], state.distances[1], state.seconds, state.notes = 0, 0.25, 1.5, ["a note"]
    return state


def test_an_outcome_comes_back_as_it_was_kept(tmp_path):
    kept, found = begun(), outcome()
    Memory(Journal(tmp_path / "new" / "folder"), "page").keep(kept, 2, 7)
    assert Memory(Journal(tmp_path / "new" / "folder"), "page").recall(found) == (2, 7)
    assert torch.equal(found.broken_by, kept.broken_by)
    assert torch.equal(found.distances, kept.distances)
    assert (found.seconds, found.notes) == (1.5, ["a note"])


def test_pages_are_apart_and_the_last_word_counts(tmp_path):
    journal = Journal(tmp_path)
    Memory(journal, "one").keep(begun(), 0, 1)
    Memory(journal, "one").keep(begun(), 0, 2)
    Memory(journal, "other").keep(begun(), 5, 5)
    assert Memory(Journal(tmp_path), "one").recall(outcome()) == (0, 2)
    assert Memory(Journal(tmp_path), "another").recall(outcome()) == (0, 0)


@pytest.mark.parametrize("damage", [b"", b"junk", None])
def test_a_damaged_page_counts_as_none(tmp_path, damage):
    Memory(Journal(tmp_path), "page").keep(begun(), 1, 1)
    [file] = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100] if damage is None else damage)
    found = outcome()
    assert Memory(Journal(tmp_path), "page").recall(found) == (0, 0)
    assert (found.broken_by == -1).all()


def test_what_a_killed_process_left_half_written_is_removed_when_it_is_carried_on(tmp_path):
    Memory(Journal(tmp_path), "page").keep(begun(), 0, 1)
    (tmp_path / ".page.pt.123.part").write_bytes(b"half")
    (tmp_path / ".other.pt.123.part").write_bytes(b"another's")
    assert Memory(Journal(tmp_path), "page").recall(outcome()) == (0, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"page.pt", ".other.pt.123.part"}


def test_closing_forgets_what_was_read_or_written_and_nothing_else(tmp_path):
    for name in ("read", "stranger"):
        Memory(Journal(tmp_path), name).keep(begun(), 0, 1)
    journal = Journal(tmp_path)
    Memory(journal, "read").recall(outcome())
    Memory(journal, "missing").recall(outcome())
    Memory(journal, "written").keep(begun(), 0, 1)
    journal.close()
    assert [file.name for file in tmp_path.iterdir()] == ["stranger.pt"]


def test_a_journal_without_a_folder_remembers_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    memory = Memory(Journal(None), "page")
    memory.keep(begun(), 1, 1)
    assert memory.recall(outcome()) == (0, 0)
    assert not list(tmp_path.iterdir())


def test_a_digest_follows_the_facts_and_not_their_order():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def test_a_digest_of_tensors_sees_values_shapes_types_and_order():
    one, two = torch.arange(6.0), torch.zeros(6)
    seen = [
        digest_of_tensors("", one, two),
        digest_of_tensors("", two, one),
        digest_of_tensors("x", one, two),
        digest_of_tensors("", one.view(2, 3), two),
        digest_of_tensors("", one.double(), two),
        digest_of_tensors("", one + torch.tensor([0, 0, 0, 0, 0, 1e-6]), two),
    ]
    assert len(set(seen)) == len(seen)
    assert digest_of_tensors("", one.view(2, 3).T) == digest_of_tensors("", one.view(2, 3).T.contiguous())


def test_a_digest_of_a_model_sees_weights_buffers_and_structure():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU())
    seen = [digest_of_model(model)]
    model[1].running_mean += 1
    seen.append(digest_of_model(model))
    model[0].weight.data[0, 0] += 1
    seen.append(digest_of_model(model))
    model[2] = nn.Tanh()
    seen.append(digest_of_model(model))
    assert len(set(seen)) == 4
