"""Break a save at every one of its system calls, and look at what is left: ``python -m tools.faults``.

A scenario is one call of varstore's face on small variables: a new save, one that replaces, one with ``base=``, a seal.
Its file system calls are counted once. Then it is run again and again, each time with a fault at the next of them,
and what lies on the disk afterwards must be the old checkpoint or the new one, whole.

What it cannot show: a killed process loses nothing that it gave to the kernel, so a missing sync goes unnoticed. Only a
sync that fails and is ignored is seen.

========== ===================================================================================
injector.c catches calls, counts them, injects the fault
injector   compiles and loads that; the faults
children   runs something in a child under a plan: why a child, what it tells
readback   reads a checkpoint without varstore
scenarios  what is done, what was there before, what must be there afterwards
campaign   a fault at every point of a scenario, and the judgement of each
known      what is lost today, each with its reason
verdict    the figures of a scenario under a fault, held against what is known
strace     compares the count with strace's
========== ===================================================================================
"""
