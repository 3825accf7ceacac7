"""Code generated from ``protos/gateway/v1`` by the package build; see ``protos/build_hook.py``."""
