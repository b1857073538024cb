"""Where bytes lie: a disk or an object store, who holds a run, and who owns a block."""
