"""Keep model variables on disk, one folder a variable."""
