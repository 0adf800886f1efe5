"""The `local` launcher: jobs of a sweep side by side, each in a process of its own. Hydra finds its class in `hydra_plugins`."""
