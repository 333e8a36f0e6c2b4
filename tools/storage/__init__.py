"""Use every file system that this machine can mount: see `tools.storage.__main__`."""
