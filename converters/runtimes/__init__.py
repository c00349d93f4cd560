"""The runtimes in which written files are proven: the real thing, not a model of it."""
