"""Inject a fault at each system call of a save, and check what remains: ``python -m tools.faults``.

A scenario is one call of a public function on small variables: a new save, an overwrite, a save with ``base=``, a seal.
Its file system calls are counted once. Then it is repeated, each time with a fault at the next call. Afterwards, the
old or the new checkpoint must be on disk, complete.

Limit: a killed process does not lose what it has passed to the kernel, so a missing sync is not detected. Only a sync
that fails and whose error is ignored is detected.

========== ===================================================================================
injector.c intercepts and counts calls, and injects the fault
injector   compiles and loads it, and defines the faults
children   runs a function in a child process with a plan, and returns how it ended
readback   reads a checkpoint without varstore
scenarios  what is called, what exists before, what must exist afterwards
campaign   runs a scenario with a fault at each point, and checks the results
known      the losses that are known, with their reasons
verdict    compares the losses of a scenario with the known ones
strace     compares the counted calls with those of strace
========== ===================================================================================
"""
