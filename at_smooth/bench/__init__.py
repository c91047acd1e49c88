"""How fast training is here: the engine beside a plain loop, beside the bare passes, beside the machine's own rate.

Each contender works in a process of its own, one at a time, in alternating rounds, so that what slows the machine
slows them all, and so that each has a peak of memory of its own.
"""
