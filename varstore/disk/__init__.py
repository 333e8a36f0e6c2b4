"""# What is guaranteed, and what is not

## Saving

- **A save is complete or absent.** A save that fails or is killed leaves the target as it was. At most a staging folder
  remains, which the next save to that target, or `varstore clean`, removes. If two processes save to one path, one
  succeeds and the other gets `CheckpointExists`. An empty mount point or the working directory cannot be renamed over;
  there the files are written into the directory, and the marker, written last, says that the checkpoint is complete.
- **Overwriting.** Without `overwrite=True`, a target that is not empty is never changed. With it, the old and the new
  checkpoint are exchanged in one step. If the file system cannot exchange them (`renameat2`), nothing is at the path
  for an instant between two renames; after a crash in that instant, `varstore clean` gives the old one its name back.
  A checkpoint in a lower layer of an overlay, as in an image of a container, cannot be renamed at all: while it is
  removed, the path is incomplete; after a crash then, `varstore clean` puts the new one there.
- **Other people's files.** Files in a checkpoint that it does not know are not deleted unasked: `overwrite=True`
  refuses, or keeps or deletes them by request (`foreign`). What appears there during the save is given to the new one.
  `CheckpointManager` keeps them when it saves a step again or trims it.
- **Other users.** A save does not follow a symbolic link at its target, and what it is writing is closed to other
  users. What belongs to another user is not cleaned or deleted, and is copied rather than linked.
- **Durability.** `save` returns after data, manifest, marker and folders were flushed with `fsync` or `syncfs`.
  `durable=False` leaves that to the system: it is faster, and a power cut may lose the checkpoint. Neither can do more
  than the disk and its driver do.
- **Incremental saves.** `base=` compares digests with those in the base's manifest and does not read the base's files.
  If a file of the base is damaged, the new checkpoint shares it, and `verify` of either one reports it.
- **Hard links and changes by hand.** Linked checkpoints share files, and removing one of them never harms another. The
  files are read-only, because a change in an `out` or `meta` changes every checkpoint that shares it; `verify` reports
  it in each. To change a variable by hand, copy the file, change the copy, move it into place, and run
  `varstore seal`. Between file systems, and on those that do not have hard links, files are copied instead.
- **Copies of a run.** `cp -a`, `tar`, `rsync -aH` and `btrfs send` keep hard links. `cp -r`, `scp`, git, zip archives,
  rclone and the tools of object stores turn each into a file of its own, so a copy takes the space of all steps.
  `varstore links RUN` makes equal files one again, in the copy that came back or in one that is to be kept; its
  ``--dry-run`` says what that would free. An upload that is to be used elsewhere is best a single step, or one archive
  of the run: ``tar -cf run.tar run``. Copy each checkpoint's ``snapshot_done`` last, or let `CheckpointManager` choose
  the step: it passes over those whose files are not all there. In a repository with Git LFS, run ``git lfs pull``
  before loading: a pointer in the place of a file is named as that.

## Loading

- **What is checked, and when.** `load`, `load_into` and `Variable.numpy()` compare every byte that they read with its
  digest. Slices (`variable[3:5]`), `mmap=True`, `verify=False` and `varstore show` check sizes only. Of a variable that
  several processes wrote, each has digests of its own region: a slice is compared with those of the regions that lie
  inside it, and not where it has a region in part; `varstore verify` compares all.
- **The manifest and `meta`.** Where there is a manifest, loading and slicing take shapes and types from it and do not
  read the `meta` files. `verify` reads every `out` and every `meta` and compares them with the manifest.
- **Digests are not signatures.** They find damage. Whoever can change the files can change the manifest too.
- **Reading while a checkpoint is replaced or removed.** What is given a path (`open`, `load`, `load_into`,
  `load_state`, `verify`, `seal`, `diff`, `convert`) works with the old checkpoint or the new one, and starts again if
  it changes meanwhile. A handle that was opened before the change gives the old values or raises an error that says
  so; open the path again. Neither reports damage that is not there. A checkpoint is known by its manifest's digest or,
  without a manifest, by its marker. On file systems that other machines change (NFS, SMB, FUSE), an error is reported
  only after a look at what the path leads to a few seconds later.
- **`load_into` and damaged data.** Names, shapes, types and sizes are compared before the first array changes. A digest
  can be compared only after the bytes have been read into the array: after `DigestMismatch`, the arrays hold a mixture.
  `load_variables` reads everything first, and changes all variables or none.
- **`load_into` and arrays that share memory.** The values that they would get are compared first. Different values are
  an error, unless `on_tied` chooses between them.
- **Untrusted checkpoints.** Reading runs no code from the checkpoint, follows no link that leads out of it, and opens
  no pipe or device. A file that declares an enormous size can still make a program ask for much memory.

## File systems

`varstore check-storage DIR` says what can be promised on a directory's file system; the guide of `varstore.storage`
has a table of all.

- **Network file systems.** Saves are as atomic and as durable as the `rename` and `fsync` of the file system. Locks
  are often missing there, or known to one mount only. So each staging folder says which process writes to it:
  `varstore clean`, `save` and `CheckpointManager` remove those of this machine whose process is gone; what another
  machine left, when nothing in it has changed for a day. `varstore clean` lists those that stay, with whose they are.
- **Two writers to one path on a network file system.** What the loser gets is `CheckpointExists`, whatever the file
  system says of its rename; and after the rename, a save looks at what lies at the target.
"""
