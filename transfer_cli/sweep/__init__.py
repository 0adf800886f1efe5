"""Sweeps: points of a search, the jobs of a sweep and what became of them. The class that Hydra finds is in `hydra_plugins`."""
