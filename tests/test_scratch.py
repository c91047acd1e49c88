"""Memory that convolutions leave to each other."""

import threading

import torch

from at_smooth.scratch import Scratch


def place(tensor):
    return tensor.untyped_storage().data_ptr()


def test_inside_a_block_one_name_is_one_memory_that_grows():
    scratch = Scratch()
    with scratch.kept():
        first, other = scratch.empty("a", 4, 3), scratch.empty("b", 4, 3)
        assert (first.shape, first.dtype) == ((4, 3), torch.float32)
        assert place(first) != place(other)
        with scratch.kept():  # a teacher in an attack, say
            assert place(scratch.empty("a", 2, 5)) == place(first)
        assert place(scratch.empty("a", 12)) == place(first)
        large = scratch.empty("a", 5, 5)
        assert large.shape == (5, 5)
        assert place(scratch.empty("a", 1)) == place(large)


def test_outside_each_has_its_own_and_nothing_is_kept():
    scratch = Scratch()
    with scratch.kept():
        kept = scratch.empty("a", 4)
    all_of_them = [kept, scratch.empty("a", 4), scratch.empty("a", 4)]
    assert len({place(each) for each in all_of_them}) == 3
    with scratch.kept():
        assert place(scratch.empty("a", 4)) != place(kept)


def test_threads_do_not_share():
    scratch, found = Scratch(), []

    def other():
        with scratch.kept():
            found.append(scratch.empty("a", 4))

    with scratch.kept():
        own = scratch.empty("a", 4)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert place(found[0]) != place(own)
