"""Chronos-Bolt and Chronos-2 for other runtimes: written here, run by `runtime`."""
