"""# What is guaranteed, and what is not

- **All or nothing.** A save that fails or is killed leaves the target as it was, and at most a staging folder, which
  the next save to that target, or `varstore clean`, removes. If two processes save to one path, one succeeds and the
  other gets `CheckpointExists`. Where the target is an empty mount point or the working directory, which cannot be
  renamed over, the files are written into it, and the marker alone says that the checkpoint is complete.
- **Overwriting.** Without `overwrite=True`, a target that is not empty is never touched. With it, the old checkpoint
  and the new one are exchanged in one step. On a file system without that step (`renameat2`), the path holds nothing
  for an instant between two renames, and `varstore clean` gives the old one its name back after a crash.
- **Links.** A save does not follow a symbolic link at its target.
- **Reading while it is replaced.** `open`, `load` and `load_into` by path give the old checkpoint or the new one, and
  start again if it changes while they read. A handle that was opened before the change says so; open it again.
- **Durability.** `save` returns after data, manifest, marker and folders were flushed with `fsync` or `syncfs`.
  `durable=False` leaves that to the system: it is fast, and a power cut may cost the checkpoint. No software can do
  more than the disk and its driver admit.
- **Digests are not signatures.** They find damage. Whoever can change the files can change the manifest too.
- **What is checked, and when.** `load`, `load_into` and `Variable.numpy()` compare every byte that they read. Slices
  (`variable[3:5]`), `mmap=True`, `verify=False` and `varstore show` check sizes only. `verify` reads everything.
- **`load_into` and damaged data.** Names, shapes, types and sizes are compared before the first array changes. A
  digest can only be compared after the bytes have been read into their place: after `DigestMismatch`, the arrays hold
  a mixture. `load_variables` reads everything first and changes all variables or none.
- **`load_into` and arrays that share memory.** The values that they would get are compared first. Different ones are an
  error, unless `on_tied` says whose values are taken.
- **What `base=` trusts.** It compares digests with those in the base's manifest, and reads no file of the base. If
  one is damaged on disk, the new checkpoint shares it; `verify` of either says so.
- **Hard links and changes by hand.** Linked checkpoints share files. Removing one never harms another. Forcing a
  change into an `out` or `meta` (they are read-only) changes it in every checkpoint that shares it, and `verify`
  reports each. Copy the file, change the copy, put it in place, and run `varstore seal`. Across file systems, and
  where a file system does not have links, values are copied instead.
- **Network file systems.** Atomicity and durability are those of the file system's `rename` and `fsync`. Where it does
  not have locks, saving works without them; `clean` then leaves staging folders alone.
- **Untrusted checkpoints.** Reading runs no code from the checkpoint, follows no link that leads out of it, and opens
  no pipe or device. A file that says that it is enormous can still ask for much memory.
"""
