"""The `local` launcher: a sweep's jobs side by side, each in a process of its own. The class that Hydra finds is in `hydra_plugins`."""
