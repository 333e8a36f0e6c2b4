"""# What can be promised on which file system

`varstore check-storage DIR`, or `varstore.check_storage`, tries a directory's file system and names its class. On each
class varstore promises this:

| file system | whole or absent | two writers | durable | links | readers elsewhere |
| --- | --- | --- | --- | --- | --- |
| local | yes | one succeeds | yes | yes; copies on vfat and exFAT | not shared |
| image layer | yes; replacing takes a moment | one succeeds | yes | yes; copied up first | not shared |
| read-only image | only read | none can save | only read | only read | yes |
| read-only mount | only read | none can save | only read | only read | old, new, or an error |
| NFS | yes | one succeeds | yes | yes | old, new, or an error |
| FUSE, pass-through or encrypted | yes | one succeeds | as its store is | yes | old, new, or an error |
| sshfs | yes; replacing takes a moment | one succeeds | as its server is | yes | old, new, or an error |
| FUSE that renames in parts | no | not kept apart | no | copies | mixtures are found, not prevented |
| other shared | as its rename is | as its rename is | as its fsync is | if it has them | not known |

- **Whole or absent.** A save that fails or is killed leaves the target as it was. Where two folders cannot be exchanged
  in one step, as on most of FUSE, nothing is at the path for an instant while a checkpoint is replaced; a reader waits
  for it, and `varstore clean` ends what a crash left there.
- **Two writers.** Of two that save to one path, one succeeds and the other gets `CheckpointExists`, also from two
  machines. Two that overwrite take turns.
- **Durable.** A durable save returns when each file, and then each folder, was flushed. On FUSE that is as much as the
  daemon makes of it: sshfs needs a server that has fsync, and an object store uploads later. Memory (tmpfs, ramfs) ends
  with the machine.
- **Links.** Unchanged variables of `base=` share their files where the file system has hard links; elsewhere they are
  copied. Some unions and sshfs show a link as two files, and it is one all the same.
- **Readers elsewhere.** What another machine reads while a checkpoint is replaced is the old one or the new one, or an
  error that says that it was replaced; never a mixture, and no damage that is not there. It may be seen a few seconds
  late.

**Object stores behind FUSE** (rclone, s3fs, gcsfuse), and unions that spread one folder over several branches, rename
file by file, and two writers are not kept apart. Save to a local disk, and copy the checkpoint there, the file
`snapshot_done` last; a reader finds no checkpoint before that. rclone is best mounted with `--vfs-cache-mode writes`.

**Image layers** of containers (overlayfs): a checkpoint in a lower layer cannot be renamed. It is replaced and deleted
file by file, while the new one waits, complete. What `base=` links from it is copied up first.

## What was seen

`python -m tools.storage` mounts each file system that the machine can mount, and does there what users do. "In part"
says that some of it does not hold; the tool tells what and why. On Linux 6.18 with Debian 12's drivers, without NFS:

| seen on | save, load, verify | base= | overwrite | two writers | readers beside a writer | kill and clean | manager |
| --- | --- | --- | --- | --- | --- | --- | --- |
| local disk | yes | yes | yes | yes | yes | yes | yes |
| tmpfs | yes | yes | yes | yes | yes | yes | yes |
| ramfs | yes | yes | yes | yes | yes | yes | yes |
| ext4 | yes | yes | yes | yes | yes | yes | yes |
| xfs | yes | yes | yes | yes | yes | yes | yes |
| btrfs | yes | yes | yes | yes | yes | yes | yes |
| overlayfs | yes | yes | yes | yes | yes | yes | yes |
| squashfs | yes | – | – | – | – | – | – |
| erofs | yes | – | – | – | – | – | – |
| bindfs | yes | yes | yes | yes | yes | yes | yes |
| mergerfs | yes | yes | yes | yes | yes | yes | yes |
| mergerfs, random branch | yes | yes | yes | yes | yes | yes | yes |
| unionfs-fuse | yes | yes | yes | yes | yes | yes | yes |
| ntfs-3g | yes | yes | yes | yes | yes | yes | yes |
| exfat-fuse | yes | yes | yes | yes | yes | yes | yes |
| gocryptfs | yes | yes | yes | yes | yes | yes | yes |
| encfs | yes | yes | yes | in part | yes | yes | yes |
| sshfs | yes | yes | yes | yes | yes | yes | yes |
| rclone, no cache | yes | yes | in part | in part | no | in part | yes |
| rclone, cached writes | in part | yes | no | yes | in part | in part | yes |
| rclone, all cached | in part | yes | yes | yes | no | in part | yes |
"""
