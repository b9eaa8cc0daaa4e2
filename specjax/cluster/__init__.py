"""Several machines: starting the same command on all of them, and their processes as one run."""
