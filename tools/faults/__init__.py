"""Inject faults into saves, seals and their like, and check what remains: ``python -m tools.faults``.

A command of the campaign tries one family of faults on scenarios. The table of commands is in ``__main__``.

========== ===================================================================================
jobs       what a command consists of
calls      a fault at each file system call of a scenario
count      compares the counted calls with those of strace
power      a power cut at each moment of a scenario, in a model of what strace recorded
retention  what can happen to a run of a manager, in any order, beside a model of retention
scenarios  what is called, what exists before, what must exist afterwards
injector.c intercepts and counts calls, and injects the fault
injector   compiles and loads it, and defines the faults
rot        changes of single files
races      readers beside a writer that overwrites
tracing    runs a function under strace
children   runs a function in a child process with a plan, and returns how it ended
readback   reads a checkpoint without varstore
known      the losses that are known, with their reasons
verdict    compares the losses of a job with the known ones
========== ===================================================================================

Limit of ``calls``: a killed process does not lose what it has passed to the kernel. What a power cut may lose is the
part of ``power``.
"""
