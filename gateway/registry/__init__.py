"""Who is where: the places of tenants, in this process (`gateway.registry.memory`) or over several.

`gateway.registry.port` says what a registry does; all of them pass tests/contracts/test_registry.py.
"""
